"""`rcmae demo`: a small world drawn on the spot, and every stage run on it as a user would, by a chain."""

from pathlib import Path

from core.errors import ConfigError, shown
from tools.chain import REPORT, run_chain
from tools.world import draw_world

CHAINS = Path(__file__).resolve().parent.parent / "configs" / "chain"
WORLD = {"num_train": 2400, "num_val": 500}
QUICK_WORLD = {"num_train": 480, "num_val": 100}


def run_demo(out: Path, quick: bool = False) -> None:
    """Draw the world below `out`, run every stage on it, and say where everything is.

    Args:
        quick: the same stages on a smaller world and with fewer steps.
    Raises: ConfigError where `out` holds something else; what the chain raises.
    """
    world = out / "world"
    print(f"drawing a world of textured shapes into {shown(world)}", flush=True)
    try:
        draw_world(world, **(QUICK_WORLD if quick else WORLD))
    except ValueError as error:
        raise ConfigError(f"{error}; give another --out") from None
    run_chain(CHAINS / ("demo_quick.yaml" if quick else "demo.yaml"), [f"out={out}"])
    print(f"report     {shown(out / REPORT)}")
    backbone = f"local-dir:{out / 'pretrain' / 'backbone'}"
    print(f"backbone   timm.create_model({backbone!r}, pretrained=True)")
