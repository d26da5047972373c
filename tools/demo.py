"""`rcmae demo`: a small world drawn on the spot, and every stage run on it as a user would."""

from pathlib import Path

from core.config import load_config
from core.errors import ConfigError, shown
from pretrain.run import PretrainConfig, pretrain
from tools.world import draw_world

RECIPE = Path(__file__).resolve().parent.parent / "configs" / "demo" / "pretrain.yaml"
NUM_TRAIN, NUM_VAL = 4000, 500


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
    figures = summary["figures"]
    print(
        f"\nreconstruction {figures['train/reconstruction']:.3f}, consistency {figures['train/consistency']:.4f}, "
        f"k-NN top-1 {figures['probe/knn_top1_pct']:.1f} % of ten kinds of shapes\n"
        f"pictures   {shown(run / 'pictures')}\ncurves     {shown(run / 'curves.png')}\n"
        f"backbone   timm.create_model('local-dir:{shown(run / 'backbone')}', pretrained=True)"
    )
