"""`rcmae bench`: this suite beside a plain baseline, in one process and in turn. Figures, never tests.

Every table ends with one JSON line. Rates are medians over rounds, ratios medians of round by round: the speed of a
shared machine drifts. A baseline does what is usually done: `tools/plain_step.py` for a step, PIL for images.
"""

import ctypes
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from core.checkpoint import CheckpointConfig
from core.compiling import compile_blocks, compiles
from core.config import load_config
from core.distributed import Processes
from core.engine import Fit, Plan, train_step
from core.errors import ConfigError
from core.flags import FlagReader
from core.log import LogConfig
from core.machine import choose_device, environment, keep_freed_memory
from core.optim import OptimConfig, adamw, decay_groups
from core.parallel import Parallel
from core.start import RunConfig
from core.task import Task
from core.transforms import normalize
from pretrain.cost import step_flops
from pretrain.data import PretrainBatch
from pretrain.rc_mae import RCMAETask
from pretrain.run import build_task
from pretrain.settings import PretrainConfig, Setting
from tools.plain_step import PlainMAE, plain_optimizer, plain_step

PEAK_TFLOPS = {"H200": (790, 989), "H100": (790, 989)}  # dense bf16: measured on an H200; datasheet (SXM)
LR = 1e-4  # of every benchmarked step: far from the first step's rate of 0, and steady
BASELINE, FUSED, EAGER, SUITE = "baseline", "baseline, fused attention", "this suite, eager", "this suite"


@dataclass
class Row:
    """One contestant: how to do one step of `images` images, and what was found."""

    name: str
    images: int
    step: Callable[[], None]
    peak_bytes: int = 0
    rates: list[float] = field(default_factory=list)  # images/s, one per round
    keeps_memory: bool = False  # as `rcmae pretrain` does, see `keep_freed_memory`

    @property
    def images_per_s(self) -> float:
        """Median over rounds."""
        return statistics.median(self.rates)

    def ratio_to(self, other: "Row") -> float:
        """Median of the ratios round by round."""
        return statistics.median(a / b for a, b in zip(self.rates, other.rates, strict=True))


def bench_pretrain(path: Path | None, overrides: list[str], batch_sizes: Sequence[int], rounds: int) -> None:
    """Time whole training steps on images that are already on the device, and print what was found.

    Args:
        path, overrides: a pretraining configuration; data= and out= are not needed.
        batch_sizes: tried one after the other; the best of this suite is set against the best of the baseline.
    """
    config, device = read_config(path, overrides)
    if config.method != "rc_mae":
        raise ConfigError("method=mae: the baseline is the published RC-MAE step; leave method out")
    rows: list[Row] = []
    for batch_size in batch_sizes:
        found = [*_contestants(config, device, batch_size)]
        race(found, device, rounds)
        rows += found
        for row in found:
            row.step = nothing  # lets go of its networks
        torch.compiler.reset()  # a shape of another batch size would count against the number of its recompilations
        gc.collect()
    flops = step_flops(config.vit_config(), config.decoder_config(), config.mask_ratio, with_teacher=True)
    _report_pretrain(config, device, rows, flops)


def _contestants(config: PretrainConfig, device: torch.device, batch_size: int) -> Iterator[Row]:
    """Every way to do the step that fits into the memory, after its first steps."""
    batch = random_batch(config, device, batch_size)
    builders: dict[str, Callable[[], Callable[[], None]]] = {
        BASELINE: lambda: _plain(config, device, batch, fused=False),
        FUSED: lambda: _plain(config, device, batch, fused=True),
        EAGER: lambda: _suite(config, device, batch, compiled=False),
    }
    if config.engine.compile == "on" or compiles(config.engine.compile, device):
        builders[SUITE] = lambda: _suite(config, device, batch, compiled=True)
    yield from contestants(builders, batch_size, device)


def contestants(
    builders: Mapping[str, Callable[[], Callable[[], None]]], images: int, device: torch.device
) -> Iterator[Row]:
    """Every one of these that fits into the memory, after its first steps.

    Args:
        builders: by name, what makes a step of `images` images.
    """
    for name, build in builders.items():
        try:
            held = _held_bytes(device)
            row = Row(name, images, build(), keeps_memory=name in (EAGER, SUITE))
            keep_freed_memory(row.keeps_memory)
            for _ in range(2):
                row.step()
            row.peak_bytes = _peak_bytes(row.step, device, held)
        except torch.OutOfMemoryError:
            print(f"{name}, batch {images}: out of memory")
            continue
        yield row


def random_batch(config: PretrainConfig, device: torch.device, batch_size: int) -> PretrainBatch:
    """Noise as images, uint8 on the device."""
    vit, generator = config.vit_config(), torch.Generator().manual_seed(0)
    return PretrainBatch(
        images=torch.randint(0, 256, (batch_size, vit.in_chans, *vit.img_size), dtype=torch.uint8, generator=generator),
        sizes=torch.tensor([vit.img_size] * batch_size),
        valid=torch.ones(batch_size, dtype=torch.bool),
        noise=torch.rand(batch_size, vit.num_patches, generator=generator),
    ).to(device)


def suite_run(
    config: PretrainConfig, device: torch.device, micro_batch: int, compiled: bool, processes: Processes | None = None
) -> tuple[RCMAETask, Fit]:
    """The task and all that `train_step` needs without a run directory; of this process alone where none are given."""
    processes = processes or Processes()
    batch_size = micro_batch * processes.size
    plan = Plan(batch_size, batch_size, 1, 1, processes.size)
    vit, decoder = config.vit_config(), config.decoder_config()
    task = build_task(Setting(config, vit, decoder, device, None, batch_size, plan, 0), processes)
    if compiled:
        compile_blocks(task)
    optimizer = adamw(decay_groups(task.named_parameters(), config.weight_decay), config.optim)
    return task, bench_fit(task, config, plan, optimizer, LR, config.optim.clip_grad, device, processes)


def bench_fit(
    task: Task,
    config: RunConfig,
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    lr: float,
    clip_grad: float | None,
    device: torch.device,
    processes: Processes,
) -> Fit:
    """All that `train_step` needs without a run directory: nothing is logged or saved, and the rate is `lr`."""
    return Fit(
        plan=plan,
        config=config.engine,
        log_config=LogConfig(),
        checkpoint_config=CheckpointConfig(),
        optimizer=optimizer,
        lr_at=lambda step: lr,
        clip_grad=clip_grad,
        device=device,
        processes=processes,
        parallel=Parallel(task, config.engine.parallel, processes),
        store=None,
        log=None,
        console=Console(quiet=True),
    )


def bench_steps(
    task: Task,
    config: RunConfig,
    groups: list[dict],
    optim: OptimConfig,
    lr: float,
    batch: Any,
    device: torch.device,
    compiled: bool,
) -> Callable[[], None]:
    """Whole optimizer steps of a task on one batch, with AdamW over these groups at a steady rate."""
    if compiled:
        compile_blocks(task)
    images = len(batch.images)
    plan, processes = Plan(images, images, 1, 1), Processes()
    run = bench_fit(task, config, plan, adamw(groups, optim), lr, optim.clip_grad, device, processes)
    return steps_of(task, batch, run)


def steps_of(task: Task, batch: Any, run: Fit) -> Callable[[], None]:
    """Optimizer steps on one batch, one after the other, as `core.engine` makes them."""
    flags, steps = FlagReader(run.device), itertools.count()

    def step() -> None:
        number = next(steps)
        train_step(task, [batch], run, number, flags)
        flags.read(number - 2)

    return step


def _suite(config: PretrainConfig, device: torch.device, batch: PretrainBatch, compiled: bool) -> Callable[[], None]:
    task, run = suite_run(config, device, len(batch.images), compiled)
    return steps_of(task, batch, run)


def _plain(config: PretrainConfig, device: torch.device, batch: PretrainBatch, fused: bool) -> Callable[[], None]:
    reference, _ = suite_run(config, torch.device("cpu"), len(batch.images), compiled=False)
    networks = []
    for _ in range(2):
        networks.append(PlainMAE(config.vit_config(), config.decoder_config(), fused))
        networks[-1].load_state_dict(reference.student.state_dict())
        networks[-1].to(device)
    student, teacher = networks
    optimizer = plain_optimizer(student, LR, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
    images = normalize(batch.images, config.mean, config.std, torch.float32)  # its loader would do that

    def step() -> None:
        plain_step(
            student, teacher, optimizer, scaler, images, mask_ratio=config.mask_ratio,
            norm_pix_loss=config.norm_pix_loss, gamma=config.gamma, momentum=config.momentum,
        )  # fmt: skip

    return step


def race(rows: Sequence[Row], device: torch.device, rounds: int) -> None:
    """Let each do its steps in turn, about a second at a time."""
    times = {row.name: max(1, round(1 / seconds_of(row.step, 1, device))) for row in rows}
    for turn in range(rounds):
        for row in (*rows[turn % len(rows) :], *rows[: turn % len(rows)]):
            keep_freed_memory(row.keeps_memory)
            row.step()  # what the one before left behind is used up
            seconds = seconds_of(row.step, times[row.name], device)
            row.rates.append(times[row.name] * row.images / seconds)


def seconds_of(step: Callable[[], None], times: int, device: torch.device) -> float:
    """How long so many steps take, the device's work included."""
    synchronize(device)
    begun = time.perf_counter()
    for _ in range(times):
        step()
    synchronize(device)
    return time.perf_counter() - begun


def raced(
    builders: dict[str, Callable[[], Callable[[], None]]], images: int, device: torch.device, rounds: int
) -> list[Row]:
    """The rows of `contestants` after a `race`, without their networks."""
    rows = list(contestants(builders, images, device))
    race(rows, device, rounds)
    for row in rows:
        row.step = nothing  # lets go of its network
    return rows


def _report_pretrain(config: PretrainConfig, device: torch.device, rows: Sequence[Row], flops: int) -> None:
    def best(*names: str) -> Row:
        return max((row for row in rows if row.name in names), key=lambda row: row.images_per_s)

    baseline, ours = best(BASELINE), best(SUITE) if any(row.name == SUITE for row in rows) else best(EAGER)
    peaks = _peak_tflops(device)
    mfu = [round(ours.images_per_s * flops / 1e12 / peak, 4) for peak in peaks]
    table = Table("", "batch", "images/s", "against baseline", "peak memory, GiB", *(f"MFU of {p}" for p in peaks))
    for row in rows:
        beside = next((other for other in rows if (other.name, other.images) == (BASELINE, row.images)), None)
        shares = (f"{100 * row.images_per_s * flops / 1e12 / peak:.1f} %" for peak in peaks)
        times = f"{row.ratio_to(beside):.2f}" if beside else "-"
        memory = f"{row.peak_bytes / 2**30:.2f}"
        table.add_row(row.name, str(row.images), f"{row.images_per_s:.4g}", times, memory, *shares)
    vit = config.vit_config()
    title = f"ViT {vit.embed_dim} x {vit.depth}, patch {vit.patch_size}, {vit.img_size[0]}x{vit.img_size[1]} px"
    same = [row for row in rows if row.images == min(row.images for row in rows)]
    peaks_of = {row.name: row.peak_bytes for row in same}
    say(
        f"{title}, {flops / 1e9:.2f} published GFLOP per image and step",
        table,
        {
            "name": "pretrain",
            "model": title,
            "batch_size": ours.images,
            "ratio": ours.ratio_to(baseline),
            "images_per_s": ours.images_per_s,
            "baseline_images_per_s": baseline.images_per_s,
            "baseline_batch_size": baseline.images,
            "mfu": mfu[0] if mfu else None,
            "mfu_datasheet": mfu[1] if mfu else None,
            "peak_memory_gib": ours.peak_bytes / 2**30,
            "peak_memory_ratio": peaks_of.get(ours.name, 0) / peaks_of[BASELINE] if BASELINE in peaks_of else None,
            "peak_memory_batch_size": same[0].images,
        },
        device,
    )


# ---- what every benchmark needs -----------------------------------------------------------------------------------


def read_config(path: Path | None, overrides: list[str]) -> tuple[PretrainConfig, torch.device]:
    """A pretraining configuration, ViT-S/16 where none is named, and its device."""
    given = {text.partition("=")[0] for text in overrides}
    defaults = ["data=none", "out=none", *([] if path else ["model=small"])]
    defaults = [text for text in defaults if text.partition("=")[0] not in given]
    config = load_config(PretrainConfig, path, [*defaults, *overrides])
    return config, choose_device(config.device)


def say(title: str, table: Table, figures: dict[str, Any], device: torch.device) -> None:
    """Print a table and the JSON line of its figures."""
    facts = environment()
    keys = ("python", "torch", "torchvision", "numpy", "pillow", "threads", "cpus", "instruction_set", "git_commit")
    table.title, table.title_justify = title, "left"
    Console().print(table)
    gpu = f"{facts['gpu']}, " if device.type == "cuda" else ""
    line = {
        **{key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in figures.items()},
        **{key: None for key in ("mfu", "peak_memory_gib") if key not in figures},
        "device": f"{gpu}{_cpu_name()}",
        "versions": {key: facts[key] for key in keys},
        "date": time.strftime("%F"),
    }
    print(json.dumps(line), flush=True)


def report_rows(
    name: str, title: str, rows: Sequence[Row], device: torch.device, more: Mapping[str, Any] | None = None
) -> None:
    """Print rows named BASELINE, EAGER and SUITE as a table, and a JSON line of the best beside the best plain one.

    Args:
        more: figures that the line has besides.
    """
    table = Table("", "batch", "images/s", "s/image", "against baseline", "peak memory, GiB")
    for row in rows:
        beside = next((other for other in rows if (other.name, other.images) == (BASELINE, row.images)), None)
        ratio = f"{row.ratio_to(beside):.2f}" if beside else "-"
        rate, memory = row.images_per_s, f"{row.peak_bytes / 2**30:.2f}"
        table.add_row(row.name, str(row.images), f"{rate:.4g}", f"{1 / rate:.4g}", ratio, memory)
    ours, theirs = (
        max((row for row in rows if (row.name == BASELINE) == plain), key=lambda row: row.images_per_s, default=None)
        for plain in (False, True)
    )
    same = next((row for row in rows if ours and row.name == BASELINE and row.images == ours.images), None)
    figures = {
        "name": name,
        "ratio": ours.ratio_to(theirs) if ours and theirs else None,
        "images_per_s": ours.images_per_s if ours else None,
        "seconds_per_image": 1 / ours.images_per_s if ours else None,
        "batch_size": ours.images if ours else None,
        "baseline_images_per_s": theirs.images_per_s if theirs else None,
        "baseline_batch_size": theirs.images if theirs else None,
        "peak_memory_gib": ours.peak_bytes / 2**30 if ours else None,
        "peak_memory_ratio": ours.peak_bytes / same.peak_bytes if ours and same else None,
        **(more or {}),
    }
    say(title, table, figures, device)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def _peak_tflops(device: torch.device) -> tuple[int, ...]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peaks for part, peaks in PEAK_TFLOPS.items() if part in name), ())


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def nothing() -> None:
    """A step that does nothing."""


def _held_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the kernel, and is not counted as held
    return _status_bytes("VmRSS")


def _peak_bytes(step: Callable[[], None], device: torch.device, held: int) -> int:
    """The most memory taken during one step, beyond what was held before the contestant was built."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - held
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's record of the peak
    step()
    return _status_bytes("VmHWM") - held


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0
