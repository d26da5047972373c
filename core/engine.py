"""The one training loop: Task protocol, `train_step`, `fit`.

A step: take the micro-batches of one global batch, accumulate gradients, decide on the device whether loss and
gradient are finite, update or suppress, let the task follow (EMA). Off the log interval nothing is read from the device
but the finite counters, copied without blocking and read two steps later.
"""

import logging
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from core.checkpoint import Checkpoint, CheckpointConfig, CheckpointStore
from core.config import Config
from core.errors import CheckpointError, ConfigError, NumericError, Preempted
from core.loader import Feed, worker_faults
from core.log import LogConfig, ProgressBar, RunLog
from core.machine import global_rng_digest, memory_gib
from core.optim import load_optimizer_state, optimizer_state

MAX_NON_FINITE_IN_ROW = 3
FLAG_DELAY_STEPS = 2

logger = logging.getLogger("rcmae")


class EngineConfig(Config):
    """How the loop runs; nothing here is part of the method."""

    accumulation: PositiveInt | None = None  # micro-batches per global batch; None: as few as the memory allows
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast on a GPU, fp32 on a CPU
    evaluate_every_steps: PositiveInt = 1000  # probes and pictures; also before the first and after the last step


class Task(Protocol):
    """What is trained. The engine knows nothing else about it."""

    def losses(self, batch: Any, step: int) -> dict[str, Tensor]:
        """Weighted losses of one micro-batch, each its mean, 0-dim; their sum is differentiated."""

    def after_update(self, step: int, finite: Tensor) -> None:
        """Follow an optimizer update (EMA); where the 0-dim bool `finite` is False, change nothing."""

    def evaluate(self, step: int) -> dict[str, float]:
        """Figures that need a pass over other data."""

    def pictures(self, step: int) -> dict[str, np.ndarray]:
        """Pictures worth keeping, name -> uint8 [H, W, 3]."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the optimizer sees, by the names of a checkpoint."""

    def modules(self) -> Mapping[str, nn.Module]:
        """Modules that a checkpoint holds, by file stem."""


@dataclass(frozen=True)
class Plan:
    """Batch arithmetic of a run."""

    num_images: int
    batch_size: int
    accumulation: int
    epochs: int

    @property
    def micro_batch(self) -> int:
        """Images per forward pass."""
        return self.batch_size // self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; what does not fill a batch is left out, another part each epoch."""
        return self.num_images // self.batch_size

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.epochs * self.steps_per_epoch

    def epoch(self, step: int) -> float:
        """The fractional epoch at an optimizer step, of which every schedule is a function."""
        return step / self.steps_per_epoch


@dataclass(frozen=True)
class Fit:
    """All that `fit` needs beside the task: a frozen bundle, built by each stage's `run.py`."""

    plan: Plan
    config: EngineConfig
    log_config: LogConfig
    checkpoint_config: CheckpointConfig
    optimizer: torch.optim.Optimizer
    lr_at: Callable[[int], float]
    clip_grad: float | None
    device: torch.device
    store: CheckpointStore
    log: RunLog
    info: dict[str, Any] = field(default_factory=dict)  # goes into manifests: versions, threads, config hash


@dataclass
class Progress:
    """What changes from step to step and is neither weights nor optimizer."""

    step: int = 0
    skipped: int = 0  # non-finite steps, suppressed


class FiniteGuard:
    """Counts non-finite steps on the device and reports them two steps late, without ever waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._counters = torch.zeros(2, dtype=torch.int64, device=device)  # in a row, most in a row
        self._total = torch.zeros((), dtype=torch.int64, device=device)
        self._pending: deque[tuple[int, Tensor, Any]] = deque()
        self._cuda = device.type == "cuda"

    def record(self, step: int, finite: Tensor) -> None:
        """Note the flag of a step; starts a copy to the host."""
        bad = (~finite).to(torch.int64)
        in_row = (self._counters[0] + 1) * bad
        self._counters = torch.stack([in_row, torch.maximum(self._counters[1], in_row)])
        self._total = self._total + bad
        counts = torch.stack([*self._counters, self._total])
        host = torch.empty(3, dtype=torch.int64, pin_memory=self._cuda).copy_(counts, non_blocking=True)
        event = torch.cuda.Event() if self._cuda else None
        if event:
            event.record()
        self._pending.append((step, host, event))

    def read(self, upto_step: int) -> tuple[int, int] | None:
        """(most bad steps in a row, bad steps in all) as of the last recorded step <= upto_step, or None."""
        latest = None
        while self._pending and self._pending[0][0] <= upto_step:
            _, host, event = self._pending.popleft()
            if event:
                event.synchronize()
            latest = host
        return (int(latest[1]), int(latest[2])) if latest is not None else None


def fit(task: Task, feed: Feed, resumed: Checkpoint | None, run: Fit) -> Progress:
    """Train `task` to the end of the plan; resume from `resumed` if given. Returns the final progress.

    Raises: NumericError after three non-finite steps in a row, Preempted after a signal (state saved), and what the
    feed raises. At a raise the newest checkpoint on disk is good.
    """
    progress = restore(task, resumed, run) if resumed else Progress()
    guard = FiniteGuard(run.device)
    skipped_before = progress.skipped
    if progress.step == 0:
        _evaluate(task, run, 0)
    meter = _Meter(feed, run, progress.step)
    saved_step = progress.step if resumed else -1
    with stop_signal() as stopped, worker_faults():
        try:
            while progress.step < run.plan.total_steps:
                figures = train_step(task, feed.take(), run, progress.step, guard)
                progress.step += 1
                counts = guard.read(progress.step - 1 - FLAG_DELAY_STEPS)
                due = _due(progress.step, run) or bool(stopped)
                if due:  # no checkpoint before its own flags were read
                    counts = guard.read(progress.step) or counts
                _check(counts, progress, skipped_before, saved_step)
                meter.update(progress.step, figures)
                if progress.step % run.config.evaluate_every_steps == 0 or progress.step == run.plan.total_steps:
                    with meter.paused():
                        _evaluate(task, run, progress.step)
                if due:
                    save(task, feed, progress, run)
                    saved_step = progress.step
                if stopped and progress.step < run.plan.total_steps:
                    raise Preempted(f"stopped by {stopped[0]} at step {progress.step}, saved; the same command goes on")
        finally:
            meter.stop()
    return progress


def train_step(task: Task, micro_batches: list[Any], run: Fit, step: int, guard: FiniteGuard) -> dict[str, Any]:
    """One optimizer update, suppressed on the device if loss or gradient are not finite.

    Returns: mean losses and gradient norm as 0-dim device tensors, and the rate; no host sync.
    """
    lr = run.lr_at(step)
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    figures: dict[str, Any] = {}
    for batch in micro_batches:
        with autocast(run.device, run.config.precision):
            losses = task.losses(batch.to(run.device), step)
        total = torch.stack(list(losses.values())).sum() / len(micro_batches)
        total.backward()
        for name, value in {**losses, "loss": total.detach() * len(micro_batches)}.items():
            figures[name] = figures.get(name, 0) + value.detach() / len(micro_batches)
    gradients = [p.grad for _, p in task.named_parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    finite = torch.isfinite(norm) & torch.isfinite(figures["loss"])
    if run.clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_([p for _, p in task.named_parameters()], run.clip_grad, norm)
    update(run.optimizer, finite)
    task.after_update(step, finite)
    guard.record(step, finite)
    return {**figures, "grad_norm": norm, "lr": lr}


def update(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """Optimizer step that leaves weights, moments and step counters untouched where the 0-dim bool `finite` is False.

    Uses the fused kernels' own input for that, as GradScaler does: the decision stays on the device.
    """
    optimizer.found_inf = (~finite).to(torch.float32)  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast of a precision name on a device."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bf16(device, precision))


def uses_bf16(device: torch.device, precision: str) -> bool:
    """Whether a precision name means bf16 autocast on a device: on a GPU and not on a CPU by default."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def choose_accumulation(batch_size: int, bytes_per_image: int, fixed_bytes: int, available_bytes: int) -> int:
    """The fewest micro-batches that divide the global batch and fit into 70 % of the available memory.

    Raises: ConfigError if not even one image at a time fits.
    """
    budget = 0.7 * available_bytes - fixed_bytes
    for accumulation in range(1, batch_size + 1):
        if batch_size % accumulation == 0 and batch_size // accumulation * bytes_per_image <= budget:
            return accumulation
    raise ConfigError(
        f"model: one image needs about {(fixed_bytes + bytes_per_image) / 2**30:.1f} GiB, "
        f"{available_bytes / 2**30:.1f} GiB are free; take a smaller model or img_size"
    )


def restore(task: Task, checkpoint: Checkpoint, run: Fit) -> Progress:
    """Load a verified checkpoint into task and optimizer. Raises: CheckpointError if it belongs to another model."""
    try:
        for stem, module in task.modules().items():
            module.load_state_dict(checkpoint.tensors[stem])
        names: dict[Tensor, str] = {parameter: name for name, parameter in task.named_parameters()}
        load_optimizer_state(run.optimizer, names, checkpoint.tensors["optimizer"])
        progress = Progress(**checkpoint.state["progress"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(
            f"checkpoint of step {checkpoint.step} does not fit this configuration: {first}"
        ) from None
    here = {**run.info, "rng": global_rng_digest()}
    for key in ("threads", "device", "torch", "instruction_set", "rng"):
        before, now = checkpoint.manifest["info"].get(key), here.get(key)
        if before != now:
            logger.warning("not bit-exact from here: %s was %s, is %s", key, before, now)
    logger.info("resumed from step %d of %d", progress.step, run.plan.total_steps)
    return progress


def save(task: Task, feed: Feed, progress: Progress, run: Fit) -> str:
    """Write the checkpoint of the finished step; returns its digest. Call only after its finite flags were read."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in task.named_parameters()}
    tensors = {stem: dict(module.state_dict()) for stem, module in task.modules().items()}
    tensors["optimizer"] = optimizer_state(run.optimizer, names)
    state = {
        "progress": vars(progress).copy(),
        "accumulation": run.plan.accumulation,
        "schedule": {"lr": run.lr_at(progress.step), "total_steps": run.plan.total_steps},
        "feed": {"broken": feed.broken, "shards": feed.shards},
    }
    info = {**run.info, "rng": global_rng_digest()}  # the tripwire: nothing may have drawn from the global generators
    digest = run.store.save(progress.step, tensors, state, info)
    logger.info("saved step %d, digest %s", progress.step, digest[:16])
    return digest


@contextmanager
def stop_signal() -> Iterator[list[str]]:
    """While open, SIGINT, SIGTERM and SIGUSR1 append their name to the yielded list instead of ending the process."""
    received: list[str] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number).name)

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        try:
            previous[number] = signal.signal(number, note)
        except ValueError:  # not the main thread: signals are somebody else's business
            break
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _due(step: int, run: Fit) -> bool:
    return step == run.plan.total_steps or step % run.checkpoint_config.every_steps == 0


def _check(counts: tuple[int, int] | None, progress: Progress, skipped_before: int, saved_step: int) -> None:
    if counts is None:
        return
    most_in_row, total = counts
    if skipped_before + total > progress.skipped:
        logger.warning("non-finite loss or gradient: update suppressed, %d in all so far", skipped_before + total)
        progress.skipped = skipped_before + total
    if most_in_row >= MAX_NON_FINITE_IN_ROW:
        good = f"the last good checkpoint is step {saved_step}" if saved_step >= 0 else "no checkpoint was written yet"
        raise NumericError(
            f"loss or gradient not finite {most_in_row} steps in a row before step {progress.step}; {good}; "
            "try engine.precision=fp32, optim.clip_grad=1 or a lower blr, with another out= and --resume CHECKPOINT"
        )


def _evaluate(task: Task, run: Fit, step: int) -> None:
    figures = task.evaluate(step)
    if figures:
        run.log.metrics(step, figures)
        logger.info("step %d  %s", step, "  ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    for name, pixels in task.pictures(step).items():
        run.log.picture(step, name, pixels)


class _Meter:
    """Figures of the last log interval: losses, images/s, share of time waiting for data, memory, ETA."""

    def __init__(self, feed: Feed, run: Fit, step: int) -> None:
        self._feed, self._run = feed, run
        self._bar = ProgressBar(run.log.console, run.plan.total_steps, step)
        self._sums: dict[str, Any] = {}
        self._first, self._start = step, time.perf_counter()
        feed.wait_s = 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluations are no training time."""
        begun = time.perf_counter()
        yield
        self._start += time.perf_counter() - begun

    def update(self, step: int, figures: dict[str, Any]) -> None:
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._bar.advance(step)
        if step % self._run.log_config.every_steps and step != self._run.plan.total_steps:
            return
        steps = step - self._first
        means = {f"train/{name}": float(value) / steps for name, value in self._sums.items()}  # the host sync
        seconds = time.perf_counter() - self._start
        rate = steps * self._run.plan.batch_size / seconds
        wait_pct = 100 * self._feed.wait_s / seconds
        memory = memory_gib(self._run.device)
        speed = {"speed/images_per_s": rate, "speed/data_wait_pct": wait_pct, "speed/memory_gib": memory}
        row = {"epoch": self._run.plan.epoch(step), **means, **speed}
        self._run.log.metrics(step, row)
        losses = "  ".join(f"{k.removeprefix('train/')} {v:.4g}" for k, v in means.items())
        speed_text = f"{rate:.0f} images/s  data wait {wait_pct:.0f} %  {memory:.1f} GiB"
        epoch, loss = f"epoch {row['epoch']:.2f}", f"loss {means['train/loss']:.4g}"
        eta_s = (self._run.plan.total_steps - step) * seconds / steps
        self._bar.show(step, f"{epoch}  {loss}  {speed_text}", f"{epoch}  {losses}  {speed_text}", eta_s)
        self._sums, self._first, self._start, self._feed.wait_s = {}, step, time.perf_counter(), 0.0

    def stop(self) -> None:
        self._bar.stop()
