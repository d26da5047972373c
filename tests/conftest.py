"""Fixtures of all tests. `shared` is the folder of reference results beside the clone; without it tests skip."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.chromium import Browser, chromium
from tests.harness import ForkServer
from tests.tiny import draw_ade, draw_coco, draw_images, tiny_backbone, tiny_segmentation

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """../shared beside the clone: golden files and small real data sets."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("../shared is absent: no reference results and data sets here")
    return folder


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    """A process that forks pretraining runs."""
    with ForkServer() as running:
        yield running


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 small images in two class folders."""
    return draw_images(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen scenes to learn from and five to evaluate on, in COCO's layout."""
    return draw_coco(tmp_path_factory.mktemp("world") / "world")


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone directory with random weights."""
    return tiny_backbone(tmp_path_factory.mktemp("backbone") / "backbone")


@pytest.fixture(scope="session")
def ade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parent of a tree like ADE20K's: 14 images to learn from, 5 to evaluate on."""
    return draw_ade(tmp_path_factory.mktemp("ade"))


@pytest.fixture(scope="session")
def segmented(
    server: ForkServer, ade: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The directory of a whole segmentation run, by head."""
    found = {}
    for head in ("upernet", "linear"):
        out = tmp_path_factory.mktemp(head) / "out"
        log = out.parent / "log"
        assert server.run(tiny_segmentation(ade, out, backbone, head), log, stage="segment") == 0, log.read_text()
        found[head] = out
    return found


@pytest.fixture(scope="session")
def mmseg() -> ModuleType:
    """mmsegmentation, imported as framework=mmseg does."""
    if any(importlib.util.find_spec(name) is None for name in ("mmseg", "mmengine", "mmcv")):
        pytest.skip("mmsegmentation is absent: pip install --no-deps -r requirements-mmseg.lock")
    from transfer.segmentation.mmseg_engine.operators import stand_in

    stand_in()
    import mmseg.models

    return mmseg


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Headless Chromium."""
    if chromium() is None:
        pytest.skip("chromium is absent: reports are not looked at in a browser; apt-get install chromium")
    with Browser(tmp_path_factory.mktemp("profile") / "new") as started:
        yield started
