"""`framework=detectron2` where detectron2 is not, and what it refuses before it is asked for anything."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from core.config import load_config
from core.distributed import Processes
from core.errors import ConfigError
from core.start import require_alone
from tests.test_detection_model import tiny_detector
from tests.test_layers import ALLOWED, ROOT, imported_modules
from transfer.detection import settings
from transfer.detection.settings import INSTALL_DETECTRON2, DetectConfig
from transfer.detection.weights import from_detectron2, to_detectron2

ENGINE = "transfer/detection/detectron2_engine"
KNOWING = (f"{ENGINE}/", "tools/verify/live_detectron2")  # beginnings of the names of files that may import detectron2


def load(*overrides: str) -> DetectConfig:
    return load_config(DetectConfig, None, ["data=x", "out=y", "backbone=z", "framework=detectron2", *overrides])


def found(monkeypatch: pytest.MonkeyPatch, is_there: bool) -> None:
    """Whether detectron2 seems to be installed."""
    whole = importlib.util.find_spec
    monkeypatch.setattr(
        settings.importlib.util, "find_spec",
        lambda name: (object() if is_there else None) if name == "detectron2" else whole(name),
    )  # fmt: skip


def faults(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    return str(caught.value).splitlines()


def test_its_absence_is_one_line_with_the_way_to_mend_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, False)
    assert faults() == [f"command line: framework=detectron2: detectron2 is not installed; {INSTALL_DETECTRON2}"]
    assert load("framework=native").framework == "native"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [("activation_checkpointing=true", "activation_checkpointing: not with framework=detectron2: needs fairscale"),
     ("keep_background=true", "keep_background: not with framework=detectron2: its mapper fails"),
     ("optim.clip_grad=1", "optim.clip_grad: not with framework=detectron2: it clips each tensor by itself"),
     ("decay_rule=clean", "decay_rule=clean: not with framework=detectron2: its parameter groups"),
     ("engine.compile=on", "engine.compile=on: not with framework=detectron2: its blocks are not compiled"),
     ("engine.accumulation=2", "engine.accumulation: not with framework=detectron2: its trainer takes a batch"),
     ("milestones=[250, 300]", "milestones: not with framework=detectron2: its warm-up ends before"),
     ("framework=mmdet", "framework: expected 'native' or 'detectron2'")],
)  # fmt: skip
def test_what_it_cannot_do_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, overrides: str, line: str) -> None:
    found(monkeypatch, True)
    assert load("engine.accumulation=1", "milestones=[251, 300]").framework == "detectron2"
    (said,) = faults(*overrides.split(" m"))
    assert said.startswith(f"command line: {line}")


def test_one_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, True)
    with pytest.raises(ConfigError, match="framework=detectron2: runs on one process here; leave --nproc out"):
        require_alone("detectron2", Processes(rank=0, size=2))
    require_alone("detectron2", Processes())
    require_alone("native", Processes(rank=0, size=2))


def test_a_batch_that_does_not_fit_at_once_is_refused(
    monkeypatch: pytest.MonkeyPatch, coco: Path, backbone: Path, tmp_path: Path
) -> None:
    from tests.tiny import tiny_detection
    from transfer.detection.run import dry_run

    found(monkeypatch, True)
    config = load_config(DetectConfig, None, tiny_detection(coco, tmp_path / "out", backbone, framework="detectron2"))
    assert any(line.startswith("framework  detectron2") for line in dry_run(config))
    monkeypatch.setattr(settings, "accumulation_of", lambda *_: 2)
    with pytest.raises(ConfigError, match="batch_size=4: needs 2 micro-batches here, and detectron2's trainer takes"):
        dry_run(config)


def test_nothing_else_imports_it() -> None:
    """Nor does anything import the engine at its start: only when it is wanted."""
    for room in ALLOWED:
        for path in (ROOT / room).rglob("*.py"):
            name, modules = str(path.relative_to(ROOT)), imported_modules(path)
            theirs = {module for module in modules if module.partition(".")[0] in {"detectron2", "fvcore"}}
            assert not theirs or name.startswith(KNOWING), f"{name} imports {theirs}"
            engines = {module for module in modules if module.startswith(ENGINE.replace("/", "."))}
            assert not engines or name.startswith((*KNOWING, "transfer/detection/run.py")), f"{name} imports {engines}"
    code = "import sys, tools.cli, transfer.detection.run; print({'detectron2', 'fvcore', 'iopath'} & set(sys.modules))"
    command = [sys.executable, "-W", "error::FutureWarning", "-W", "error::UserWarning", "-c", code]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"


def test_a_single_convolution_of_the_rpn_has_no_number_there() -> None:
    """As detectron2's head has it; a file in which it has one is read too."""
    state: dict[str, Any] = dict(tiny_detector(False).state_dict())
    theirs, _ = to_detectron2(state)
    name = "proposal_generator.rpn_head.conv.weight"
    assert name in theirs and "proposal_generator.rpn_head.conv.conv0.weight" not in theirs
    numbered = {key.replace("rpn_head.conv.", "rpn_head.conv.conv0."): tensor for key, tensor in theirs.items()}
    for stored in (theirs, numbered):
        back, _ = from_detectron2(stored)
        assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    several = state | {"rpn.head.convs.1.weight": torch.ones(1), "rpn.head.convs.1.bias": torch.ones(1)}
    names = [key for key in to_detectron2(several)[0] if "rpn_head.conv." in key]
    assert sorted(names) == sorted(
        f"proposal_generator.rpn_head.conv.conv{k}.{leaf}" for k in (0, 1) for leaf in ("weight", "bias")
    )
