"""The one training loop: `train_step`, `fit`, and what a checkpoint of it holds.

A step: take this process's micro-batches of one global batch, accumulate gradients, decide on the device whether loss
and gradient are finite on all processes, update or suppress, let the task follow (EMA). Off the log interval nothing is
read from the device but flags and counters, copied without blocking and read two steps later.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from rich.console import Console
from torch import Tensor

from core.checkpoint import Checkpoint, CheckpointConfig, CheckpointStore
from core.compiling import Compile
from core.config import Config
from core.distributed import Processes, Tensors
from core.errors import CheckpointError, ConfigError, DistributedError, NumericError, Preempted
from core.flags import FLAG_DELAY_STEPS, Counts, FlagReader, stop_signal
from core.loader import Feed, worker_faults
from core.log import LogConfig, ProgressBar, RunLog
from core.machine import global_rng_digest, memory_gib
from core.optim import load_optimizer_state, optimizer_state
from core.parallel import Mode, Parallel, fingerprints, full, gathered, like
from core.task import Place, Task
from core.watch import BACKWARD, EVALUATING, FIRST, FORWARD, LOADING, SAVING, UPDATING

MAX_NON_FINITE_IN_ROW = 3

# What must be as it was for a resumed run to give the same bits, and what another value does.
_INEXACT = {
    "threads": "",
    "device": "",
    "torch": "",
    "instruction_set": "",
    "rng": "",
    "processes": ": gradients are summed in another order",
    "micro_batch": ": losses are averaged, and model noise drawn, over other groups of images",
    "parallel": ": gradients are summed in another order",
    "compiled": ": fused code rounds otherwise",
}

logger = logging.getLogger("rcmae")


class EngineConfig(Config):
    """How the loop runs; nothing here is part of the method."""

    accumulation: PositiveInt | None = None  # micro-batches per global batch; None: as few as the memory allows
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast on a GPU, fp32 on a CPU
    parallel: Mode = "ddp"  # how several processes share the gradient; fsdp2 for models that do not fit
    timeout_s: PositiveInt = 300  # longest silence of a process in a step; five times that for loading, saving, start
    compile: Compile = "auto"  # torch.compile of the transformer blocks; auto: on a GPU
    evaluate_every_steps: PositiveInt = 1000  # probes and pictures; also before the first and after the last step


@dataclass(frozen=True)
class Plan:
    """Batch arithmetic of a run."""

    num_images: int
    batch_size: int
    accumulation: int  # micro-batches per process
    epochs: int
    num_processes: int = 1
    steps: int | None = None  # of recipes that count optimizer steps; None: whole epochs

    @property
    def micro_batches(self) -> int:
        """Micro-batches in a global batch, over all processes."""
        return self.accumulation * self.num_processes

    @property
    def micro_batch(self) -> int:
        """Images per forward pass."""
        return self.batch_size // self.micro_batches

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; what does not fill a batch is left out, another part each epoch."""
        return self.num_images // self.batch_size

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.epochs * self.steps_per_epoch if self.steps is None else self.steps

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
    processes: Processes
    parallel: Parallel
    store: CheckpointStore | None  # on the first process, as the log
    log: RunLog | None
    console: Console
    info: dict[str, Any] = field(default_factory=dict)  # goes into manifests: versions, threads, config hash


@dataclass
class Progress:
    """What changes from step to step and is neither weights nor optimizer."""

    step: int = 0
    skipped: int = 0  # non-finite steps, suppressed


def fit(task: Task, feed: Feed, resumed: Checkpoint | None, run: Fit) -> Progress:
    """Train `task` to the end of the plan; resume from `resumed` if given. Returns the final progress.

    Raises: NumericError after three non-finite steps in a row, Preempted after a signal (state saved), and what the
    feed raises. At a raise the newest checkpoint on disk is good.
    """
    require_steps_left(resumed, run)
    progress = restore(task, resumed, run) if resumed else Progress()
    flags = FlagReader(run.device)
    skipped_before = progress.skipped
    with stop_signal() as stopped, worker_faults():
        if run.parallel.needs_warm_up and progress.step < run.plan.total_steps:
            run.processes.enter(LOADING, progress.step)
            _warm_up(task, feed.peek(), run, progress.step)
        if progress.step == 0:
            evaluate(task, run, 0)
        meter = Meter(feed, run, progress.step)
        first_step, saved_step = progress.step, progress.step if resumed else -1
        try:
            while progress.step < run.plan.total_steps:
                run.processes.enter(LOADING, progress.step)
                batches = feed.take()
                run.processes.enter(FIRST if progress.step == first_step else FORWARD, progress.step)
                figures = train_step(task, batches, run, progress.step, flags, bool(stopped))
                progress.step += 1
                counts = flags.read(progress.step - 1 - FLAG_DELAY_STEPS)
                # Alone, a process need not wait to hear that it was asked to stop itself.
                stop = bool(stopped) if run.processes.size == 1 else bool(counts.stop)
                due = is_due(progress.step, run) or stop
                if due:  # no checkpoint before its own flags were read
                    counts = flags.read(progress.step)
                _check(counts, progress, skipped_before, saved_step)
                record_step(task, feed, progress, run, meter, figures, due)
                saved_step = progress.step if due else saved_step
                if stop and progress.step < run.plan.total_steps:
                    raise preempted(stopped[0] if stopped else "a signal to another process", progress.step)
        finally:
            meter.stop()
    return progress


def record_step(
    task: Task, feed: Feed, progress: Progress, run: Fit, meter: "Meter", figures: dict[str, Any], due: bool
) -> None:
    """What follows a finished step: its figures in the log, an evaluation where one is due, a checkpoint if `due`."""
    meter.update(progress.step, figures)
    observed = task.observe(progress.step - 1)
    if observed and run.log is not None:
        run.log.metrics(progress.step, observed)
    if progress.step % run.config.evaluate_every_steps == 0 or progress.step == run.plan.total_steps:
        with meter.paused():
            evaluate(task, run, progress.step)
    if due:
        save(task, feed, progress, run)


def preempted(by: str, step: int) -> Preempted:
    """The end of a run that was asked to stop, once its step is saved."""
    return Preempted(f"stopped by {by} at step {step}, saved; the same command goes on")


def train_step(
    task: Task, micro_batches: list[Any], run: Fit, step: int, flags: FlagReader, stop: bool = False
) -> dict[str, Any]:
    """One optimizer update, suppressed on the device if loss or gradient are not finite on any process.

    Args:
        micro_batches: this process's share of the global batch.
        stop: whether this process was asked to stop; told to the others with the same reduction.
    Returns: this process's mean losses and the gradient norm as 0-dim device tensors, and the rate; no host sync.
    """
    lr = run.lr_at(step)
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    figures: dict[str, Any] = {}
    for turn, batch in enumerate(micro_batches):
        at = Place(step, turn * run.processes.size + run.processes.rank, turn)
        with run.parallel.exchange(last=turn == len(micro_batches) - 1):
            with autocast(run.device, run.config.precision):
                losses = run.parallel.losses(batch.to(run.device), at)
            total = torch.stack(list(losses.values())).sum() / len(micro_batches)
            run.processes.enter(BACKWARD, step)
            total.backward()
        for name, value in {**losses, "loss": total.detach() * len(micro_batches)}.items():
            figures[name] = figures.get(name, 0) + value.detach() / len(micro_batches)
    run.processes.enter(UPDATING, step)
    gradients = [p.grad for _, p in task.named_parameters() if p.grad is not None]
    norm = full(torch.nn.utils.get_total_norm(gradients))
    bad = ~(torch.isfinite(norm) & torch.isfinite(figures["loss"]))
    told = run.processes.any_(torch.stack([bad, torch.full_like(bad, stop)]).to(torch.int32))
    finite = told[0] == 0
    if run.clip_grad is not None:
        torch.nn.utils.clip_grads_with_norm_([p for _, p in task.named_parameters()], run.clip_grad, norm)
    update(run.optimizer, finite)
    task.after_update(step, finite)
    flags.record(step, told[0], told[1])
    return {**figures, "grad_norm": norm, "lr": lr}


def _warm_up(task: Task, micro_batches: list[Any], run: Fit, step: int) -> None:
    """One backward pass whose gradient is thrown away; leaves weights, buffers and generators as they were."""
    run.processes.enter(FIRST, step)
    buffers = {buffer: buffer.clone() for module in task.modules().values() for buffer in module.buffers()}
    with autocast(run.device, run.config.precision):
        losses = run.parallel.losses(micro_batches[0].to(run.device), Place(step, run.processes.rank, 0))
    torch.stack(list(losses.values())).sum().backward()
    run.optimizer.zero_grad(set_to_none=True)
    for buffer, before in buffers.items():
        buffer.copy_(before)


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


def require_steps_left(resumed: Checkpoint | None, run: Fit) -> None:
    """Raise ConfigError where a new run would start from the last step of another, and have nothing to leave behind."""

    def require() -> None:
        total, new = run.plan.total_steps, run.store is not None and run.store.newest() is None
        if resumed is not None and new and resumed.step >= total:
            raise ConfigError(
                f"--resume: the checkpoint is of step {resumed.step}, and this run ends at step {total}; give more "
                "epochs or steps, or another checkpoint"
            )

    run.processes.on_main(require)


def restore(task: Task, checkpoint: Checkpoint, run: Fit) -> Progress:
    """Load a verified checkpoint and say what will not be as it was. Raises: as `load_state`."""
    progress = load_state(task, checkpoint, run.optimizer)
    here = {**run.info, **_layout(run), "rng": global_rng_digest()}
    for key, effect in _INEXACT.items():
        before, now = checkpoint.manifest["info"].get(key), here.get(key)
        if before != now:
            logger.warning("not bit-exact from here: %s was %s, is %s%s", key, before, now, effect)
    logger.info("resumed from step %d of %d", progress.step, run.plan.total_steps)
    return progress


def load_state(task: Task, checkpoint: Checkpoint, optimizer: torch.optim.Optimizer) -> Progress:
    """Load a verified checkpoint into task and optimizer. Raises: CheckpointError if it belongs to another model."""
    try:
        for stem, module in task.modules().items():
            own = module.state_dict()
            stored = checkpoint.tensors[stem]
            module.load_state_dict({name: like(t, own[name]) if name in own else t for name, t in stored.items()})
        names: dict[Tensor, str] = {parameter: name for name, parameter in task.named_parameters()}
        load_optimizer_state(optimizer, names, checkpoint.tensors["optimizer"])
        return Progress(**checkpoint.state["progress"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(
            f"checkpoint of step {checkpoint.step} does not fit this configuration: {first}"
        ) from None


def save(task: Task, feed: Feed, progress: Progress, run: Fit) -> str:
    """Write the checkpoint of the finished step; returns its digest. Call only after its finite flags were read.

    Every process calls it, at the same step; the first writes.
    """
    run.processes.enter(SAVING, progress.step)
    names: dict[Tensor, str] = {parameter: name for name, parameter in task.named_parameters()}
    tensors = {stem: dict(module.state_dict()) for stem, module in task.modules().items()}
    tensors["optimizer"] = optimizer_state(run.optimizer, names)
    if run.parallel.replicated:
        _require_equal(fingerprints(tensors), run.processes, progress.step)
    whole = gathered(tensors, run.processes) if run.processes.size > 1 else tensors
    broken, shards = feed.shared(run.processes)
    state = {
        "progress": vars(progress).copy(),
        "micro_batches": run.plan.micro_batches,
        "schedule": {"lr": run.lr_at(progress.step), "total_steps": run.plan.total_steps},
        "feed": {"broken": broken, "shards": shards},
    }
    # The random digest is a tripwire: nothing may have drawn from the global generators.
    info = {**run.info, **_layout(run), "rng": global_rng_digest()}
    digest = run.processes.on_main(lambda: _write(run.store, progress.step, whole, state, info))
    logger.info("saved step %d, digest %s", progress.step, digest[:16])
    return digest


def _write(store: CheckpointStore | None, step: int, tensors: Tensors, state: dict, info: dict) -> str:
    assert store is not None, "the first process has the store"
    return store.save(step, tensors, state, info)


def _layout(run: Fit) -> dict[str, Any]:
    mode = run.config.parallel if run.processes.size > 1 else "alone"
    return {"processes": run.processes.size, "micro_batch": run.plan.micro_batch, "parallel": mode}


def _require_equal(mine: dict[str, int], processes: Processes, step: int) -> None:
    everywhere = processes.gather(mine)
    for name, value in everywhere[0].items():
        for rank, other in enumerate(everywhere):
            if other.get(name) != value:
                raise DistributedError(
                    f"{name} of rank {rank} is not what rank 0 has, though both did the same up to step {step}: a "
                    "fault of memory or machine; nothing of it was saved; the same command goes on from the last good "
                    "checkpoint"
                )


def is_due(step: int, run: Fit) -> bool:
    """Whether a checkpoint is written after so many finished steps."""
    return step == run.plan.total_steps or step % run.checkpoint_config.every_steps == 0


def _check(counts: Counts, progress: Progress, skipped_before: int, saved_step: int) -> None:
    if skipped_before + counts.total > progress.skipped:
        progress.skipped = skipped_before + counts.total
        logger.warning("non-finite loss or gradient: update suppressed, %d in all so far", progress.skipped)
    if counts.in_row >= MAX_NON_FINITE_IN_ROW:
        good = f"the last good checkpoint is step {saved_step}" if saved_step >= 0 else "no checkpoint was written yet"
        raise NumericError(
            f"loss or gradient not finite {counts.in_row} steps in a row before step {progress.step}; {good}; "
            "try engine.precision=fp32, optim.clip_grad=1 or a lower blr, with another out= and --resume CHECKPOINT"
        )


def evaluate(task: Task, run: Fit, step: int) -> None:
    """Have a task evaluate and draw, and record what comes of it."""
    run.processes.enter(EVALUATING, step)
    with torch.compiler.set_stance("force_eager"):  # shapes of evaluations are not worth compiling
        figures = task.evaluate(step)
        pictures = task.pictures(step)
    if run.log is None:
        return
    if figures:
        run.log.metrics(step, figures)
        logger.info("step %d  %s", step, "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    for name, pixels in pictures.items():
        run.log.picture(step, name, pixels)


class Meter:
    """Figures of the last log interval: losses, images/s, share of time waiting for data, memory, ETA."""

    def __init__(self, feed: Feed, run: Fit, step: int) -> None:
        self._feed, self._run = feed, run
        self._bar = ProgressBar(run.console, run.plan.total_steps, step)
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
        """Add the figures of a finished step, numbers or 0-dim tensors; log their means where that is due."""
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._bar.advance(step)
        if step % self._run.log_config.every_steps and step != self._run.plan.total_steps:
            return
        steps = step - self._first
        sums = [torch.as_tensor(x, dtype=torch.float64, device=self._run.device) for x in self._sums.values()]
        wait = torch.full_like(sums[0], self._feed.wait_s)
        *totals, wait_s = self._run.processes.mean_(torch.stack([*sums, wait])).tolist()  # the host sync
        means = {f"train/{name}": total / steps for name, total in zip(self._sums, totals, strict=True)}
        seconds = time.perf_counter() - self._start
        rate = steps * self._run.plan.batch_size / seconds
        wait_pct = 100 * wait_s / seconds
        memory = memory_gib(self._run.device)
        speed = {"speed/images_per_s": rate, "speed/data_wait_pct": wait_pct, "speed/memory_gib": memory}
        row = {"epoch": self._run.plan.epoch(step), **means, **speed}
        if self._run.log is not None:
            self._run.log.metrics(step, row)
        losses = "  ".join(f"{k.removeprefix('train/')} {v:.4g}" for k, v in means.items())
        speed_text = f"{rate:.0f} images/s  data wait {wait_pct:.0f} %  {memory:.1f} GiB"
        epoch, loss = f"epoch {row['epoch']:.2f}", f"loss {means['train/loss']:.4g}"
        eta_s = (self._run.plan.total_steps - step) * seconds / steps
        self._bar.show(step, f"{epoch}  {loss}  {speed_text}", f"{epoch}  {losses}  {speed_text}", eta_s)
        self._sums, self._first, self._start, self._feed.wait_s = {}, step, time.perf_counter(), 0.0

    def stop(self) -> None:
        """Leave the terminal as it was."""
        self._bar.stop()
