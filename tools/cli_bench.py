"""`rcmae bench ...`: the verbs of the benchmarks."""

from pathlib import Path
from typing import Annotated

import typer

from tools.cli_options import DEFAULT_CACHE, Cache, Settings, numbers, split

app = typer.Typer(no_args_is_help=True, help="Time this suite beside a plain baseline, in turn, in one process.")

Rounds = Annotated[int, typer.Option(min=1, help="Times that each contestant runs.")]
Workers = Annotated[int, typer.Option(min=0, help="Loader workers.")]


@app.command("pretrain")
def bench_pretrain(
    settings: Settings = None,
    batch_sizes: Annotated[str, typer.Option(metavar="N[,N...]", help="Images per step, each tried.")] = "16",
    rounds: Rounds = 5,
) -> None:
    """Whole RC-MAE steps beside the published step; the default is ViT-S/16 at 224 px.

    Example: rcmae bench pretrain model=base --batch-sizes 256,512
    """
    from tools.bench import bench_pretrain as run

    path, overrides = split(settings or [])
    run(path, overrides, numbers("--batch-sizes", batch_sizes, least=1), rounds)


@app.command("loader")
def bench_loader(
    data: Annotated[str, typer.Argument(help="Folder or tar of images.")],
    img_size: Annotated[int, typer.Option(min=1, help="Side of the crops, in pixels.")] = 224,
    num_workers: Workers = 1,
    rounds: Rounds = 5,
    cache: Cache = DEFAULT_CACHE,
) -> None:
    """Reading, decoding and cropping beside PIL with torchvision's transforms."""
    from tools.bench_data import bench_loader as run

    run(data, img_size, num_workers, rounds, cache.expanduser())


@app.command("feed")
def bench_feed(
    settings: Settings = None,
    num_workers: Workers = 16,
    seconds: Annotated[float, typer.Option(min=1, help="About how long it takes.")] = 60,
) -> None:
    """Training steps fed from disk beside the same steps on a batch in place; needs data=..."""
    from tools.bench_data import bench_feed as run

    run(*split(settings or []), num_workers, seconds)


@app.command("corruptions")
def bench_corruptions(
    data: Annotated[str | None, typer.Argument(help="Photographs; drawn where none are given.")] = None,
    device: Annotated[str, typer.Option(help="cpu, of which one thread is used, or cuda.")] = "cpu",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per call.")] = 32,
    definition: Annotated[
        str, typer.Option(help="imagecorruptions, which the reference computes, or imagenet_c.")
    ] = "imagecorruptions",
    rounds: Rounds = 3,
    reference: Annotated[bool, typer.Option(help="Install and run imagecorruptions beside it.")] = True,
    work: Annotated[Path, typer.Option(help="Where photographs and its environment are made.")] = Path("runs/bench"),
) -> None:
    """The 19 corruptions beside the imagecorruptions package, ms per photograph.

    Example: rcmae bench corruptions --device cuda --batch-size 256
    """
    from tools.bench_corruptions import bench_corruptions as run

    run(data, work, device, batch_size, definition, rounds, reference)


@app.command("detect")
def bench_detect(
    settings: Settings = None,
    model: Annotated[str, typer.Option(help="A published size of ViT: tiny, small, base, large or huge.")] = "base",
    batch_sizes: Annotated[str, typer.Option(metavar="N[,N...]", help="Images per training step, each tried.")] = "1",
    rounds: Rounds = 3,
) -> None:
    """Training steps and inference of a detector beside a plain one; the default is ViTDet-B at 1024 px.

    Example: rcmae bench detect configs/transfer/detect_tiny.yaml --model tiny --batch-sizes 4
    """
    from tools.bench_detect import bench_detect as run

    path, overrides = split(settings or [])
    run(path, overrides, model, numbers("--batch-sizes", batch_sizes, least=1), rounds)


@app.command("robust")
def bench_robust(
    settings: Settings = None,
    model: Annotated[str, typer.Option(help="A published size of ViT: tiny, small, base, large or huge.")] = "base",
    images: Annotated[int, typer.Option(min=1, help="Photographs of 640 x 480 px.")] = 1,
    rounds: Rounds = 1,
    work: Annotated[Path, typer.Option(help="Where they are drawn.")] = Path("runs/bench"),
) -> None:
    """What corrupting costs in the sweep of a detector, beside all else; the default is ViTDet-B at 1024 px.

    Example: rcmae bench robust configs/transfer/detect_tiny.yaml --model tiny --images 8
    """
    from tools.bench_robust import bench_robust as run

    path, overrides = split(settings or [])
    run(path, overrides, model, images, rounds, work)


@app.command("segment")
def bench_segment(
    settings: Settings = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="tiny, small, base, large or huge; default: base on a GPU, tiny on a CPU.", show_default=False
        ),
    ] = None,
    batch_sizes: Annotated[
        str | None,
        typer.Option(metavar="N[,N...]", help="Images per training step; default: 16 on a GPU, 2 on a CPU."),
    ] = None,
    image: Annotated[
        str, typer.Option(metavar="WIDTHxHEIGHT", help="Of the image that windows slide over.")
    ] = "683x512",
    rounds: Rounds = 3,
) -> None:
    """Training steps and sliding-window evaluation of UperNet beside a plain one; crops of 512 px, 150 classes.

    Sizes are keys: img_size, inference.crop, inference.stride, inference.window_batch_size, eval_precision.
    Example: rcmae bench segment img_size=256 eval_precision=bf16 --model small --batch-sizes 4
    """
    from tools.bench_segment import bench_segment as run

    path, overrides = split(settings or [])
    sizes = numbers("--batch-sizes", batch_sizes, least=2) if batch_sizes else None
    run(path, overrides, model, sizes, image, rounds)


@app.command("coco-eval")
def bench_coco_eval(
    images: Annotated[int, typer.Option(min=1, help="How many, made up.")] = 5000,
    detections: Annotated[int, typer.Option(min=1, help="Of each image.")] = 100,
    rounds: Rounds = 1,
) -> None:
    """COCO's average precision of boxes and masks beside pycocotools: the same numbers, sooner."""
    from tools.bench_coco_eval import bench_coco_eval as run

    run(images, detections, rounds)


@app.command("gpu")
def bench_gpu(
    data: Annotated[str | None, typer.Argument(help="Photographs for the loader; drawn where none are given.")] = None,
    work: Annotated[Path, typer.Option(help="Where they are drawn.")] = Path("runs/bench"),
    only: Annotated[str, typer.Option(help="Some of pretrain, images, detect, segment; default: all.")] = "",
) -> None:
    """Every GPU row of docs/benchmarks.md; --only for a machine that is lent by the minute."""
    from tools.bench_data import bench_gpu as run

    run(data, work, only.split(",") if only else ())
