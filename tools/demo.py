"""`rcmae demo`: a small world drawn on the spot, and every stage run on it as a user would."""

from pathlib import Path

from core.config import load_config
from core.errors import ConfigError, shown
from core.log import read_metrics
from pretrain.run import pretrain
from pretrain.settings import PretrainConfig
from robustness.run import robust
from robustness.settings import RobustConfig
from tools.world import draw_world
from transfer.classification.run import classify
from transfer.classification.settings import ClassifyConfig
from transfer.detection.run import detect
from transfer.detection.settings import DetectConfig
from transfer.segmentation.run import segment
from transfer.segmentation.settings import SegmentConfig

RECIPES = Path(__file__).resolve().parent.parent / "configs" / "demo"
NUM_TRAIN, NUM_VAL = 2400, 500


def run_demo(out: Path) -> None:
    """Draw the world below `out`, run every stage on it, and say where everything is."""
    world = out / "world"
    print(f"drawing a world of textured shapes into {shown(world)}")
    try:
        draw_world(world, num_train=NUM_TRAIN, num_val=NUM_VAL)
    except ValueError as error:
        raise ConfigError(f"{error}; give another --out") from None
    images = world / "imagefolder"
    common = [f"data={images}", f"cache={out / 'cache'}"]
    first, last = _pretrain(out / "pretrain", [*common, f"probe.data={images}"])
    names = ("train/reconstruction", "train/consistency", "probe/knn_top1_pct")
    lines = [f"{name:22} {first[name]:8.4g} -> {last[name]:.4g}" for name in names]

    tuned = out / "finetune"
    overrides = [*common, f"out={tuned}", f"backbone={out / 'pretrain' / 'backbone'}"]
    figures = classify(load_config(ClassifyConfig, RECIPES / "finetune.yaml", overrides))["figures"]
    lines.append(f"{'fine-tuned top-1, %':22} {figures['eval/top1_pct']:8.4g}")

    swept = out / "corruptions"
    overrides = [f"data={images / 'val'}", f"cache={out / 'cache'}", f"out={swept}", f"model={tuned / 'classifier'}"]
    errors = robust(load_config(RobustConfig, RECIPES / "corruptions.yaml", overrides))["figures"]
    lines += [f"{name:22} {value:8.4g}" for name, value in errors.items() if name.endswith("mean_error_pct")]

    found, labelled = out / "detect", out / "segment"
    shared = [f"cache={out / 'cache'}", f"backbone={out / 'pretrain' / 'backbone'}"]
    precision = _detect(found, world / "coco", shared)
    lines += [f"{name + ' of shapes, %':22} {100 * precision[name]:8.4g}" for name in ("box_ap50", "mask_ap50")]
    overrides = [*shared, f"data={world / 'ade20k'}", f"classes={world / 'ade20k' / 'shapes.txt'}", f"out={labelled}"]
    overlap = segment(load_config(SegmentConfig, RECIPES / "segment.yaml", overrides))["figures"]
    lines.append(f"{'miou of shapes, %':22} {overlap['miou_pct']:8.4g}")
    print("\n" + "\n".join(lines))
    where = (out / "pretrain" / "pictures", tuned / "confusion.png", swept, found / "pictures", labelled / "pictures")
    print(f"pictures   {', '.join(map(shown, where))}")
    print(f"backbone   timm.create_model('local-dir:{shown(out / 'pretrain' / 'backbone')}', pretrained=True)")


def _detect(run: Path, coco: Path, overrides: list[str]) -> dict[str, float]:
    """Average precision of a detector of shapes, whatever their kind: two minutes do not tell ten kinds apart."""
    given = [f"data={coco}", f"out={run}", *overrides]
    for split, folder in (("train", "train2017"), ("val", "val2017")):
        given.append(f"{split}_json={coco / 'annotations' / f'shapes_{folder}.json'}")
        given.append(f"{split}_images={coco / folder}")
    return detect(load_config(DetectConfig, RECIPES / "detect.yaml", given))["figures"]


def _pretrain(run: Path, overrides: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """The first and the last value of every figure."""
    summary = pretrain(load_config(PretrainConfig, RECIPES / "pretrain.yaml", [*overrides, f"out={run}"]))
    first: dict[str, float] = {}
    for row in read_metrics(run / "metrics.jsonl"):
        first = {**row, **first}
    return first, summary["figures"]
