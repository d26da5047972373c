"""Compiled blocks: the same figures, the same names, only in training steps, and what is said where they cannot be."""

import shutil
from pathlib import Path

import pytest
import torch

from core import compiling
from core.compiling import compile_blocks, compiles
from core.engine import train_step
from core.errors import ConfigError
from core.flags import FlagReader
from core.parallel import full
from pretrain.settings import PretrainConfig
from tests.test_detection_model import tiny_detector
from tests.tiny import tiny_overrides
from tools.bench import random_batch, suite_run

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def tiny() -> PretrainConfig:
    from core.config import load_config

    overrides = tiny_overrides(Path("none"), Path("none"), vit__depth=2)
    return load_config(PretrainConfig, None, overrides)


@pytest.mark.skipif(not any(shutil.which(name) for name in ("g++", "clang++")), reason="no C++ compiler here")
def test_compiled_blocks_train_as_eager_ones_do() -> None:
    config, figures, states = tiny(), {}, {}
    batch = random_batch(config, CPU, 4)
    for compiled in (False, True):
        task, run = suite_run(config, CPU, 4, compiled=compiled)
        flags = FlagReader(CPU)
        figures[compiled] = [train_step(task, [batch], run, step, flags)["loss"].item() for step in range(3)]
        states[compiled] = task.student.state_dict()
        if compiled:
            counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            assert counted >= 4  # both networks, with and without gradient
            with torch.compiler.set_stance("force_eager"):  # as the engine evaluates
                task.student.tokens(torch.zeros(2, 3, 16, 16))
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted
    assert figures[True] == pytest.approx(figures[False], rel=1e-5)
    assert figures[True][2] != figures[True][0]
    assert list(states[True]) == list(states[False])  # a checkpoint knows nothing of it
    for name, value in states[True].items():
        torch.testing.assert_close(full(value), states[False][name], atol=2e-4, rtol=0, msg=name)


def test_every_block_is_compiled_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: seen.append(function.__self__) or function)
    task, _ = suite_run(tiny(), CPU, 4, compiled=False)
    compile_blocks(task)
    wanted = [b for n in (task.student, task.teacher) for b in (*n.blocks, *n.decoder_blocks)]  # type: ignore[union-attr]
    assert {id(block) for block in seen} == {id(block) for block in wanted}
    assert len(seen) == 6


def test_heads_of_a_detector_are_no_blocks() -> None:
    """What they are given changes shape with every image: each would be compiled again and again."""
    model = tiny_detector(with_cascade=True)
    assert compiling.blocks(model) == list(model.backbone.vit.blocks)


def test_when_blocks_are_compiled(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(compiling, "_missing", lambda device: None)
    assert [compiles(choice, CPU) for choice in ("auto", "on", "off")] == [False, True, False]
    assert [compiles(choice, GPU) for choice in ("auto", "on", "off")] == [True, True, False]
    monkeypatch.setattr(compiling, "_missing", lambda device: "torch.compile needs a C++ compiler, and there is none")
    with pytest.raises(
        ConfigError, match=r"engine.compile=on: torch.compile needs a C\+\+ compiler.*engine.compile=off"
    ):
        compiles("on", CPU)
    with caplog.at_level("WARNING", logger="rcmae"):
        assert not compiles("auto", GPU)
    assert "nothing is compiled" in caplog.text


def test_a_missing_compiler_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "C++ compiler" in (compiling._missing(CPU) or "")
