"""`rcmae demo`: a small world drawn on the spot, and every stage run on it as a user would."""

from pathlib import Path

from core.config import load_config
from core.errors import ConfigError, shown
from core.log import read_metrics
from pretrain.run import pretrain
from pretrain.settings import PretrainConfig
from tools.world import draw_world

RECIPE = Path(__file__).resolve().parent.parent / "configs" / "demo" / "pretrain.yaml"
NUM_TRAIN, NUM_VAL = 2400, 500


def run_demo(out: Path) -> None:
    """Draw the world below `out`, pretrain on it with the k-NN probe, and say where everything is."""
    world = out / "world"
    print(f"drawing a world of textured shapes into {shown(world)}")
    try:
        draw_world(world, num_train=NUM_TRAIN, num_val=NUM_VAL)
    except ValueError as error:
        raise ConfigError(f"{error}; give another --out") from None
    images, run = world / "imagefolder", out / "pretrain"
    overrides = [f"data={images}", f"probe.data={images}", f"out={run}", f"cache={out / 'cache'}"]
    summary = pretrain(load_config(PretrainConfig, RECIPE, overrides))
    last = summary["figures"]
    first: dict[str, float] = {}
    for row in read_metrics(run / "metrics.jsonl"):
        first = {**row, **first}
    names = ("train/reconstruction", "train/consistency", "probe/knn_top1_pct")
    print(
        "\n"
        + "".join(f"{name:22} {first[name]:8.4g} -> {last[name]:.4g}\n" for name in names)
        + f"pictures   {shown(run / 'pictures')}\ncurves     {shown(run / 'curves.png')}\n"
        f"backbone   timm.create_model('local-dir:{shown(run / 'backbone')}', pretrained=True)"
    )
