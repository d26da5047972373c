"""The one command, `rcmae`. Verbs import what they need when they run, so that help and refusals are quick."""

if __name__ == "__main__":  # as a worker of torchrun, it must be tied to its parent before anything slow
    from core.worker import begin

    begin()

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from core.errors import OUT_OF_MEMORY, ConfigError, MachineError, Preempted, RcmaeError, machine_error, shown
from core.worker import is_worker, leave
from tools import cli_bench
from tools.cli_options import (
    DEFAULT_CACHE,
    Cache,
    DryRun,
    Endpoint,
    Evaluate,
    Nnodes,
    Nproc,
    Prepared,
    Restarts,
    Resume,
    Settings,
    as_command,
    carry_out,
    numbers,
    split,
)
from tools.launch import Launch

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="RC-MAE pretraining of Vision Transformers, and what they are worth on dense prediction and robustness.",
)


@app.command()
def pretrain(
    settings: Settings = None,
    dry_run: DryRun = False,
    resume: Resume = "auto",
    nproc: Nproc = 1,
    nnodes: Nnodes = 1,
    rdzv_endpoint: Endpoint = None,
    max_restarts: Restarts = 3,
) -> int:
    """Pretrain a ViT with RC-MAE or MAE on a folder of images; the same command again goes on.

    Example: rcmae pretrain configs/pretrain/photos_tiny.yaml data=my_photos out=runs/photos
    """
    plan = Launch(nproc, nnodes, rdzv_endpoint, max_restarts)

    def prepare() -> Prepared:
        from core.config import load_config
        from pretrain import run
        from pretrain.settings import PretrainConfig

        config = load_config(PretrainConfig, *split(settings or []))
        return Prepared(config, lambda: run.pretrain(config, resume), lambda: run.dry_run(config, plan.size, nproc))

    return carry_out(as_command("pretrain", settings, False, resume), plan, dry_run, prepare)


@app.command()
def classify(
    settings: Settings = None,
    dry_run: DryRun = False,
    evaluate: Evaluate = False,
    resume: Resume = "auto",
    nproc: Nproc = 1,
    nnodes: Nnodes = 1,
    rdzv_endpoint: Endpoint = None,
    max_restarts: Restarts = 3,
) -> int:
    """Fine-tune a backbone, or probe it with a linear layer or k-NN, on a labelled set; the same command goes on.

    Example: rcmae classify configs/transfer/cifar10_finetune.yaml data=cifar10.tgz backbone=runs/cifar10_tiny/backbone
    """

    def prepare() -> Prepared:
        from core.config import load_config
        from transfer.classification import run
        from transfer.classification.settings import ClassifyConfig

        config = load_config(ClassifyConfig, *split(settings or []))
        act = (lambda: run.evaluate(config)) if evaluate else (lambda: run.classify(config, resume))
        return Prepared(config, act, lambda: run.dry_run(config))

    plan = Launch(nproc, nnodes, rdzv_endpoint, max_restarts)
    return carry_out(as_command("classify", settings, evaluate, resume), plan, dry_run, prepare)


@app.command()
def detect(
    settings: Settings = None,
    dry_run: DryRun = False,
    evaluate: Evaluate = False,
    resume: Resume = "auto",
    nproc: Nproc = 1,
    nnodes: Nnodes = 1,
    rdzv_endpoint: Endpoint = None,
    max_restarts: Restarts = 3,
) -> int:
    """Train a Mask R-CNN on a ViT on data in COCO's format; the same command goes on.

    Example: rcmae detect configs/transfer/detect_tiny.yaml data=coco backbone=runs/photos/backbone
    """

    def prepare() -> Prepared:
        from core.config import load_config
        from transfer.detection import run
        from transfer.detection.settings import DetectConfig

        config = load_config(DetectConfig, *split(settings or []))
        act = (lambda: run.evaluate_detector(config)) if evaluate else (lambda: run.detect(config, resume))
        return Prepared(config, act, lambda: run.dry_run(config))

    plan = Launch(nproc, nnodes, rdzv_endpoint, max_restarts)
    return carry_out(as_command("detect", settings, evaluate, resume), plan, dry_run, prepare)


@app.command()
def segment(
    settings: Settings = None,
    dry_run: DryRun = False,
    evaluate: Evaluate = False,
    resume: Resume = "auto",
    nproc: Nproc = 1,
    nnodes: Nnodes = 1,
    rdzv_endpoint: Endpoint = None,
    max_restarts: Restarts = 3,
) -> int:
    """Train UperNet on a ViT, or a linear head on a frozen one, on images with label PNGs; the same command goes on.

    Example: rcmae segment configs/transfer/segment_camvid.yaml data=camvid backbone=runs/photos/backbone
    """

    def prepare() -> Prepared:
        from core.config import load_config
        from transfer.segmentation import run
        from transfer.segmentation.settings import SegmentConfig

        config = load_config(SegmentConfig, *split(settings or []))
        act = (lambda: run.evaluate_segmentor(config)) if evaluate else (lambda: run.segment(config, resume))
        return Prepared(config, act, lambda: run.dry_run(config))

    plan = Launch(nproc, nnodes, rdzv_endpoint, max_restarts)
    return carry_out(as_command("segment", settings, evaluate, resume), plan, dry_run, prepare)


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="A detector or segmentor directory, as detect and segment write them.")],
    images: Annotated[Path, typer.Argument(help="A photograph, a folder or a tar of them.")],
    out: Annotated[Path, typer.Option(help="The folder to write into; it must be empty.")],
    min_score: Annotated[
        float | None, typer.Option(min=0, max=1, help="From which score on detections are drawn; default 0.5.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    cache: Cache = DEFAULT_CACHE,
) -> None:
    """Detect in photographs, or label their pixels; files for programs, and pictures to look at.

    A detector gives COCO results as JSON, a segmentor PNGs of class indices.

    Example: rcmae predict runs/detect/detector my_photos --out runs/found
    """
    from tools.predict import predict as run

    run(model, images, out, min_score, device, precision, cache.expanduser())


@app.command()
def robust(
    settings: Settings = None,
    dry_run: DryRun = False,
    nproc: Nproc = 1,
    nnodes: Nnodes = 1,
    rdzv_endpoint: Endpoint = None,
    max_restarts: Restarts = 3,
) -> int:
    """Evaluate a classifier, detector, segmentor or backbone on robustness benchmarks; the same command goes on.

    Example: rcmae robust configs/robustness/cifar10_corruptions.yaml data=cifar10.tgz model=runs/finetune/classifier
    Example: rcmae robust data=coco model=runs/detect/detector out=runs/robust_coco
    """
    plan = Launch(nproc, nnodes, rdzv_endpoint, max_restarts)

    def prepare() -> Prepared:
        from core.config import load_config
        from robustness import run
        from robustness.settings import RobustConfig

        config = load_config(RobustConfig, *split(settings or []))
        return Prepared(config, lambda: run.robust(config), lambda: run.dry_run(config, plan.size))

    return carry_out(["robust", *(settings or [])], plan, dry_run, prepare)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or one checkpoint of it.")],
    out: Annotated[Path | None, typer.Option(help="Where to write; default RUN/backbone_BRANCH.")] = None,
    branch: Annotated[str, typer.Option(help="teacher (as published) or student.")] = "teacher",
) -> None:
    """Write a backbone directory from a pretraining run; timm loads it with local-dir:NAME and pretrained=True."""
    from tools.export import export_run

    target = export_run(source, branch, out)
    print(f"{shown(target)}: timm.create_model({f'local-dir:{target}'!r}, pretrained=True)")


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint of MAE, RC-MAE, timm, Hugging Face, ViTDet or mmsegmentation; or the directory of a "
            "detector or a segmentor."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The directory to write; of a directory a .safetensors or .pth file.")],
    branch: Annotated[str, typer.Option(help="teacher or student, for RC-MAE's files.")] = "teacher",
    num_heads: Annotated[int | None, typer.Option(help="For sizes that are not published ones.")] = None,
    names_json: Annotated[
        Path | None, typer.Option(help="COCO-format JSON that a ViTDet was trained on; default: COCO's 80 classes.")
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="Names that an UperNet was trained on, a class per line; default: ADE20K's 150 classes."),
    ] = None,
) -> None:
    """Turn a foreign checkpoint into a backbone, detector or segmentor directory; say what became of every tensor.

    A detector directory is turned into a file with detectron2's names, a segmentor directory into one with
    mmsegmentation's.
    """
    from tools.convert import convert_checkpoint

    print("\n".join(convert_checkpoint(source, out, branch, num_heads, names_json, classes)))


@app.command()
def corrupt(
    source: Annotated[Path, typer.Argument(metavar="IMAGE_OR_FOLDER", help="A picture, or a folder of them.")],
    out: Annotated[Path, typer.Option(help="The folder to write into; nothing in it is overwritten.")],
    name: Annotated[
        str | None, typer.Option(help="One of the 19 corruptions; left out: the contact sheet of all of them.")
    ] = None,
    severity: Annotated[int, typer.Option(help="1 to 5.")] = 3,
    definition: Annotated[
        str, typer.Option(help="imagenet_c, or imagecorruptions as detection benchmarks use it.")
    ] = "imagenet_c",
    seed: Annotated[int, typer.Option(help="Other draws for the same pictures.")] = 0,
    textures: Annotated[
        Path | None, typer.Option(help="Folder of frost1.png ... frost5.jpg; default: imagecorruptions' own.")
    ] = None,
    jpeg_step: Annotated[
        bool, typer.Option("--jpeg-step", help="Code as JPEG of quality 85 afterwards, like ImageNet-C's files.")
    ] = False,
) -> None:
    """Corrupt pictures as ImageNet-C does, into PNGs; or draw all corruptions of one picture.

    Example: rcmae corrupt photo.jpg --out runs/corrupted --name fog --severity 3
    """
    from tools.corrupt import Recipe, corrupt_pictures

    print(corrupt_pictures(source, out, name, Recipe(severity, definition, seed, textures, jpeg_step)))


@app.command()
def doctor(settings: Settings = None) -> int:
    """Look at the installation, or at a data set before training: what is wrong, and what is to be done about it.

    Without arguments: versions, GPU, decoders, loader workers, memory, where runs are written. A line each, and exit
    code 0 if all works, else that of the first fault. With a data set, 0: it can be trained on; 3: it cannot. COCO's
    layout, or any COCO-format JSON and its image folder; images with label PNGs: every stored value, and what classes=,
    label_shift=, label_map= and ignore_index= make of it.
    Example: rcmae doctor; rcmae doctor out=/mnt/runs loader.num_workers=8
    Example: rcmae doctor data=my_coco; rcmae doctor data=my_set classes=classes.txt label_shift=1 out=pictures
    """
    try:
        from core.config import load_config
        from tools.doctor import DoctorConfig
        from tools.doctor import doctor as run
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        raise MachineError(
            f"a library cannot be imported: {shown(str(error))}; make venv sets all up in .venv"
        ) from None

    return run(load_config(DoctorConfig, *split(settings or [])))


app.add_typer(cli_bench.app, name="bench")
dynamics_app = typer.Typer(no_args_is_help=True, help="What the teacher does.")
app.add_typer(dynamics_app, name="dynamics")


@app.command()
def compare(
    settings: Settings = None,
    out: Annotated[Path, typer.Option(help="Where the runs and the comparison go.")] = Path("runs/compare"),
    seeds: Annotated[str, typer.Option(metavar="N[,N...]", help="Seeds of each method.")] = "0,1",
    methods: Annotated[str, typer.Option(help="Any of rc_mae, rc_mae_own_mask, mae.")] = "rc_mae,rc_mae_own_mask,mae",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once; they share the cores.")] = 1,
) -> None:
    """RC-MAE, RC-MAE with a mask of the teacher's own, and MAE over seeds: what their features are worth, on one plot.

    Example: rcmae compare configs/pretrain/cifar10_tiny.yaml data=cifar10.tgz probe.data=cifar10.tgz --jobs 2
    """
    from tools.compare import METHODS
    from tools.compare import compare as run

    path, overrides = split(settings or [])
    if path is None:
        raise ConfigError("compare: needs a recipe, as in rcmae compare configs/pretrain/cifar10_tiny.yaml data=...")
    chosen = methods.split(",")
    unknown = [name for name in chosen if name not in METHODS]
    if unknown:
        raise ConfigError(f"--methods {shown(unknown[0])}: expected any of {', '.join(METHODS)}")
    run(path, overrides, out, numbers("--seeds", seeds, least=0), chosen, jobs)


@dynamics_app.command("linear")
def dynamics_linear(
    out: Annotated[Path, typer.Option(help="The picture to draw.")] = Path("runs/dynamics_linear.png"),
) -> None:
    """Check the identities of the linear model, and draw how the teacher's correction depends on feature similarity."""
    from tools.dynamics import check_and_draw

    check_and_draw(out)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directories, or folders above some.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
) -> None:
    """One HTML page of runs of any stage: figures side by side, curves, pictures, published rows, what is missing.

    Example: rcmae report runs/photos runs/finetune runs/corruptions --out report.html
    """
    from tools.report.page import write_report

    print(write_report(runs, out))


@app.command()
def chain(settings: Settings = None, dry_run: DryRun = False) -> None:
    """Carry out all stages of one YAML, each an ordinary command, and write their report; the same command goes on.

    Example: rcmae chain configs/chain/own_photos.yaml data.photos=my_photos data.coco=my_coco out=runs/mine
    """
    from tools.chain import dry_run as plan
    from tools.chain import run_chain

    path, overrides = split(settings or [])
    if path is None:
        raise ConfigError("chain: needs a file of stages, as in rcmae chain configs/chain/own_photos.yaml")
    if dry_run:
        print(plan(path, overrides))
    else:
        run_chain(path, overrides)


@app.command()
def verify(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows into this file as well.")] = None,
) -> int:
    """Compare every component with its reference implementation: live where installed, else with stored results.

    Exit code 1 if one is further away than its tolerance. Half a minute, no data, no network.
    """
    from tools.verify.run import verify as run

    return run(json_file)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where to draw the small world and train on it.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Three minutes: the same stages on less, worth less.")] = False,
) -> None:
    """Draw a small world of textured shapes and run every stage on it: no download, twelve CPU minutes at most."""
    from tools.demo import run_demo

    run_demo(out, quick)


def main() -> None:
    """Entry point of the command: one line per error and the exit code of its kind."""
    code = guarded(lambda: app(standalone_mode=False))
    if is_worker():  # threads of a process group that was left in an error would abort an orderly end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def guarded(command: Callable[[], Any]) -> int:
    """Run a command; turn what a user can mend into lines on stderr and an exit code, and name faults of ours."""
    try:
        result = command()
        code = result if isinstance(result, int) else 0
        return leave(code, []) if is_worker() else code
    except RcmaeError as error:
        return _fail(error)
    except typer.Abort:
        return 1
    except typer.Exit as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        return leave(75, ["stopped; nothing was lost that a checkpoint holds"])
    except OSError as error:
        return _fail(machine_error(error))
    except MemoryError:
        return _fail(MachineError(OUT_OF_MEMORY))
    except Exception as error:
        return _from_unexpected(error)


def _fail(error: RcmaeError) -> int:
    prefix = "" if isinstance(error, Preempted) else "error: "
    lines = [f"{prefix}{line}" for line in str(error).splitlines()]
    return leave(error.exit_code, lines, error.speaks, error.final)


def _from_unexpected(error: Exception) -> int:
    if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # click's own usage errors
        return leave(ConfigError.exit_code, [f"error: command line: {error.format_message()}"])
    if type(error).__name__ == "OutOfMemoryError":
        return _fail(MachineError(OUT_OF_MEMORY))
    traceback.print_exc()
    return leave(1, [f"error: a fault of ours: {type(error).__name__}: {shown(str(error))}"])


if __name__ == "__main__":
    main()
