"""The loop: accumulation, non-finite steps, late flags, signals, precision, schedules."""

import io
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from core.checkpoint import CheckpointConfig, CheckpointStore
from core.config import load_config
from core.distributed import Processes
from core.engine import EngineConfig, Fit, Plan, autocast, choose_accumulation, fit, train_step
from core.errors import ConfigError, NumericError, Preempted
from core.flags import FlagReader
from core.log import LogConfig, RunLog
from core.optim import OptimConfig, adamw, decay_groups
from core.parallel import Parallel
from core.task import Place
from pretrain.settings import PretrainConfig
from tests.tiny import tiny_overrides
from tools.bench import random_batch, suite_run


class Toy:
    """A linear map and its running average; `poison` maps a step to "loss", "gradient" or nothing."""

    def __init__(self, poison: Mapping[int, str] | None = None, on_step: Any = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model, self.average = nn.Linear(4, 4), nn.Linear(4, 4)
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        self.average.load_state_dict(self.model.state_dict())
        self.poison, self.on_step = poison or {}, on_step
        self.evaluated: list[int] = []

    def losses(self, batch: "ToyBatch", at: Place) -> dict[str, Tensor]:
        if self.on_step:
            self.on_step(at.step)
        out = self.model(batch.x)
        kind = self.poison.get(at.step)
        if kind == "gradient":
            out.register_hook(lambda g: g.index_fill(0, torch.tensor([0]), float("nan")))
        loss = out.square().mean()
        return {"square": loss * (float("inf") if kind == "loss" else 1.0), "small": 0.1 * out.mean()}

    def after_update(self, step: int, finite: Tensor) -> None:
        with torch.no_grad():
            for a, p in zip(self.average.parameters(), self.model.parameters(), strict=True):
                a.lerp_(p, finite.to(a.dtype) * 0.1)

    def observe(self, step: int) -> dict[str, float]:
        return {}

    def evaluate(self, step: int) -> dict[str, float]:
        self.evaluated.append(step)
        return {}

    def pictures(self, step: int) -> dict[str, np.ndarray]:
        return {}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()

    def modules(self) -> Mapping[str, nn.Module]:
        return {"student": self.model, "teacher": self.average}


class ToyBatch:
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device) -> "ToyBatch":
        return ToyBatch(self.x.to(device))


class ToyFeed:
    """Global batches of 8 rows, a pure function of the step."""

    def __init__(self, accumulation: int = 1, step: int = 0) -> None:
        self.accumulation, self.step, self.wait_s = accumulation, step, 0.0
        self.broken: dict[str, str] = {}
        self.shards: list[int] = []

    def shared(self, processes: Processes) -> tuple[dict[str, str], list[int]]:
        return self.broken, self.shards

    def take(self) -> list[ToyBatch]:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(self.step))
        self.step += 1
        return [ToyBatch(part) for part in x.chunk(self.accumulation)]


def setup(
    folder: Path, task: Toy, accumulation: int = 1, epochs: int = 3, every: int = 4, clip: float | None = None
) -> Fit:
    log = RunLog(folder, LogConfig(every_steps=1, tensorboard=False))
    log.open(0, "toy", {})
    (folder / "checkpoints").mkdir(exist_ok=True)
    config = CheckpointConfig(every_steps=every)
    return Fit(
        plan=Plan(32, 8, accumulation, epochs),
        config=EngineConfig(evaluate_every_steps=5),
        log_config=LogConfig(every_steps=1, tensorboard=False),
        checkpoint_config=config,
        optimizer=adamw(decay_groups(task.named_parameters(), 0.05), OptimConfig()),
        lr_at=lambda step: 0.01,
        clip_grad=clip,
        device=torch.device("cpu"),
        processes=Processes(),
        parallel=Parallel(task, "ddp", Processes()),
        console=Console(file=io.StringIO()),
        store=CheckpointStore(folder / "checkpoints", config),
        log=log,
    )


def weights(task: Toy, run: Fit) -> list[Tensor]:
    state = [v for p in task.model.parameters() for v in run.optimizer.state[p].values()]
    return [p.detach().clone() for m in (task.model, task.average) for p in m.parameters()] + [v.clone() for v in state]


def test_accumulation_changes_nothing_beyond_rounding(tmp_path: Path) -> None:
    results = []
    for accumulation in (1, 2, 4):
        task, folder = Toy(), tmp_path / str(accumulation)
        folder.mkdir()
        fit(task, ToyFeed(accumulation), None, setup(folder, task, accumulation))
        results.append(torch.cat([p.flatten() for p in task.model.parameters()]))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_non_finite_step_changes_no_weight_no_moment_and_no_average(tmp_path: Path, kind: str) -> None:
    task = Toy(poison={1: kind})
    run, feed, flags = setup(tmp_path, task), ToyFeed(), FlagReader(torch.device("cpu"))
    train_step(task, feed.take(), run, 0, flags)
    before = weights(task, run)
    train_step(task, feed.take(), run, 1, flags)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(task, run), strict=True))
    train_step(task, feed.take(), run, 2, flags)
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(task, run), strict=True))
    assert flags.read(3) == (1, 1, 0)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_two_bad_steps_are_counted_and_the_run_goes_on(tmp_path: Path, kind: str) -> None:
    task = Toy(poison={3: kind, 4: kind})
    progress = fit(task, ToyFeed(), None, setup(tmp_path, task))
    assert (progress.step, progress.skipped) == (12, 2)


def test_three_bad_steps_in_a_row_stop_naming_the_last_good_checkpoint(tmp_path: Path) -> None:
    task = Toy(poison={5: "loss", 6: "gradient", 7: "loss", 8: "loss"})
    run = setup(tmp_path, task)
    with pytest.raises(NumericError, match=r"the last good checkpoint is step 4"):
        fit(task, ToyFeed(), None, run)
    newest = run.store.newest()
    assert newest is not None and newest.step == 4  # step 8 was due with its flags bad: not written


def test_three_bad_steps_apart_do_not_stop(tmp_path: Path) -> None:
    task = Toy(poison={1: "loss", 3: "loss", 5: "loss", 7: "loss"})
    assert fit(task, ToyFeed(), None, setup(tmp_path, task)).skipped == 4


def test_resume_keeps_the_count_of_skipped_steps_and_every_bit(tmp_path: Path) -> None:
    whole, part, again = Toy({2: "loss"}), Toy({2: "loss"}), Toy({2: "loss"})
    for name in "abc":
        (tmp_path / name).mkdir()
    fit(whole, ToyFeed(), None, setup(tmp_path / "a", whole))
    fit(part, ToyFeed(), None, setup(tmp_path / "b", part, epochs=1))
    run = setup(tmp_path / "b", again)
    checkpoint = run.store.newest()
    assert checkpoint is not None and checkpoint.step == 4
    progress = fit(again, ToyFeed(step=4), checkpoint, run)
    assert (progress.step, progress.skipped) == (12, 1)
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_clipping_bounds_the_update_and_reports_the_unclipped_norm(tmp_path: Path) -> None:
    task = Toy()
    figures = train_step(task, ToyFeed().take(), setup(tmp_path, task, clip=1e-3), 0, FlagReader(torch.device("cpu")))
    assert figures["grad_norm"] > 0.1
    run = setup(tmp_path, task, clip=1e-3)
    losses = task.losses(ToyFeed().take()[0], Place(0, 0, 0))
    sum(losses.values()).backward()
    torch.nn.utils.clip_grad_norm_(task.model.parameters(), 1e-3)
    assert torch.nn.utils.get_total_norm([p.grad for p in task.model.parameters()]) <= 1.001e-3
    assert run.clip_grad == 1e-3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_stops_and_the_run_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    task = Toy(on_step=lambda step: os.kill(os.getpid(), number) if step == 5 else None)
    run, before = setup(tmp_path, task), signal.getsignal(number)
    with pytest.raises(Preempted, match=rf"{number.name} at step 6"):
        fit(task, ToyFeed(), None, run)
    newest = run.store.newest()
    assert newest is not None and newest.step == 6
    assert signal.getsignal(number) is before


def test_fit_works_outside_the_main_thread(tmp_path: Path) -> None:
    task, results = Toy(), []
    thread = threading.Thread(target=lambda: results.append(fit(task, ToyFeed(), None, setup(tmp_path, task))))
    thread.start()
    thread.join(timeout=30)
    assert results and results[0].step == 12


def test_evaluations_at_the_start_the_interval_and_the_end(tmp_path: Path) -> None:
    task = Toy()
    fit(task, ToyFeed(), None, setup(tmp_path, task))
    assert task.evaluated == [0, 5, 10, 12]


class _NoHostRead(TorchDispatchMode):
    """Raises where a value would be copied from the device to Python."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "host sync"
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_from_the_device(tmp_path: Path) -> None:
    from tests.test_rc_mae import small_batch, small_task

    task: Any = small_task()
    run, flags = setup(tmp_path, task, clip=1.0), FlagReader(torch.device("cpu"))
    batch = small_batch(0)
    with _NoHostRead():
        figures = train_step(task, [batch, batch], run, 0, flags)
        with pytest.raises(AssertionError, match="host sync"):
            float(figures["loss"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_pretraining_step_never_waits_for_the_gpu() -> None:
    config = load_config(PretrainConfig, None, [*tiny_overrides(Path("none"), Path("none")), "device=cuda"])
    device = torch.device("cuda")
    task, run = suite_run(config, device, 4, compiled=False)
    batch, flags = random_batch(config, device, 4), FlagReader(device)
    train_step(task, [batch, batch], run, 0, flags)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(task, [batch, batch], run, 1, flags)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_flags_are_read_late_and_only_as_far_as_was_asked_for() -> None:
    flags = FlagReader(torch.device("cpu"))
    assert flags.read(5) == (0, 0, 0)
    for step, (bad, stop) in enumerate([(0, 0), (1, 0), (1, 0), (0, 1)]):
        flags.record(step, torch.tensor(bad, dtype=torch.int32), torch.tensor(stop, dtype=torch.int32))
    assert flags.read(0) == (0, 0, 0)
    assert flags.read(2) == (2, 2, 0)
    assert flags.read(2) == (2, 2, 0)
    assert flags.read(9) == (2, 2, 1)


def test_plan_leaves_out_what_does_not_fill_a_batch() -> None:
    plan = Plan(num_images=1_281_167, batch_size=4096, accumulation=2, epochs=1600)
    assert (plan.steps_per_epoch, plan.total_steps, plan.micro_batch) == (312, 499_200, 2048)
    assert plan.epoch(312) == 1.0


def test_accumulation_follows_from_memory() -> None:
    assert choose_accumulation(64, bytes_per_image=10, fixed_bytes=100, available_bytes=1200) == 1
    assert choose_accumulation(64, bytes_per_image=10, fixed_bytes=100, available_bytes=600) == 2
    assert choose_accumulation(60, bytes_per_image=10, fixed_bytes=0, available_bytes=200) == 5  # 14 fit, 12 divide 60
    with pytest.raises(ConfigError, match="smaller model"):
        choose_accumulation(64, bytes_per_image=100, fixed_bytes=100, available_bytes=200)


def test_precision_by_name() -> None:
    cpu = torch.device("cpu")
    for name, dtype in (("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with autocast(cpu, name):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
