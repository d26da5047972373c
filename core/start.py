"""How every run starts: keys that all trained stages share, processes that agree, one writer, where to go on from."""

import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from pydantic import Field, PositiveInt
from rich.console import Console

from core.checkpoint import Checkpoint, CheckpointConfig, CheckpointStore, read_checkpoint
from core.compiling import compile_blocks, compiles
from core.config import Config, config_hash
from core.datasets import ImageSource
from core.distributed import Processes, joined
from core.engine import EngineConfig, Fit, Plan, choose_accumulation
from core.errors import ConfigError, DataError, shown
from core.files import FileSystem, require_space
from core.loader import Collate, EpochOrder, Feed, LoaderConfig, Prepare, TrainingImages, image_loader
from core.log import LogConfig, RunLog, console_logging
from core.machine import (
    available_bytes,
    code_digest,
    environment,
    git_commit,
    keep_freed_memory,
    seed_everything,
)
from core.parallel import Parallel
from core.run_directory import RunDirectory
from core.task import Task
from core.worker import earlier_faults, note_run

PROGRAM_BYTES = 700 * 2**20  # what the imported libraries take, measured

# May differ when a run goes on: where things lie and how they are shown, not what is computed.
HARMLESS_KEYS = (
    "data", "out", "cache", "device", "log", "checkpoint", "loader.num_workers", "loader.timeout_s",
    "loader.max_broken_share", "engine.evaluate_every_steps", "engine.parallel", "engine.timeout_s", "engine.compile",
)  # fmt: skip

logger = logging.getLogger("rcmae")
InputsT = TypeVar("InputsT")


class RunConfig(Config):
    """What every trained stage reads. Flat keys keep MAE's names; `batch_size` is global."""

    data: str  # folder of images, tar, .tgz, or what else the stage takes
    out: Path
    cache: Path = Path("~/.cache/rcmae")
    batch_size: PositiveInt
    seed: int = Field(0, ge=0, lt=2**32)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    loader: LoaderConfig = LoaderConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    def contradictions(self) -> Iterator[str]:
        """Keys that cannot hold together; stages yield these and their own."""
        yield from super().contradictions()
        accumulation = self.engine.accumulation
        if accumulation and self.batch_size % accumulation:
            yield f"engine.accumulation={accumulation}: does not divide batch_size={self.batch_size}"


def agree_on_code(processes: Processes) -> None:
    """Raise RanksDisagree unless all processes run the same code on the same libraries."""
    facts = environment()
    processes.agree({"code": code_digest(), **{key: facts[key] for key in ("torch", "torchvision", "numpy")}})


def agree_on_run(processes: Processes, config: RunConfig, resume: str, paths: Collection[str] = ()) -> None:
    """Raise RanksDisagree unless all processes run the same code with the same configuration.

    Args:
        paths: keys beside data and cache that say where something lies, which may differ between machines.
    """
    agree_on_code(processes)
    # Where the data lie may differ between machines, what they are may not.
    values = config.model_dump(mode="json", exclude={"data", "cache", *paths})
    processes.agree({"--resume": resume, **{f"configuration: {key}": value for key, value in values.items()}})


@dataclass(frozen=True)
class Writer:
    """What only the first process has: the run directory, its checkpoints and its log."""

    directory: RunDirectory
    store: CheckpointStore
    log: RunLog


@contextmanager
def claimed(
    config: RunConfig, harmless: Collection[str], processes: Processes, fs: FileSystem | None
) -> Iterator[Writer | None]:
    """Own `out=` while open: a Writer on the first process, None on the others."""
    writer: list[Writer] = []  # filled on the first process

    def claim() -> None:
        directory = RunDirectory(config.out, config, harmless)
        note_run(config.out)
        (directory.path / "checkpoints").mkdir(exist_ok=True)
        store = CheckpointStore(directory.path / "checkpoints", config.checkpoint, fs)
        writer.append(Writer(directory, store, RunLog(directory.path, config.log)))
        store.clean()

    try:
        processes.on_main(claim)
        yield writer[0] if writer else None
    finally:
        if writer:
            writer[0].log.close()
            writer[0].directory.close()


def starting_point(writer: Writer | None, resume: str, out: Path, processes: Processes) -> Checkpoint | None:
    """The checkpoint to go on from, chosen and read by the first process and told to the others."""
    found: list[Checkpoint | None] = [None]

    def find() -> dict[str, Any] | None:
        assert writer is not None, "only the first process reads"
        found[0] = _find(writer.store, resume, out)
        if found[0] is None:
            return None
        checkpoint = found[0]
        return {"step": checkpoint.step, "state": checkpoint.state, "digest": checkpoint.digest} | {
            "manifest": checkpoint.manifest
        }

    told = processes.on_main(find)
    if told is None or processes.size == 1:
        return found[0]
    return Checkpoint(tensors=processes.spread(found[0].tensors if found[0] else None), **told)


def _find(store: CheckpointStore, resume: str, out: Path) -> Checkpoint | None:
    newest = store.newest()
    if resume == "auto":
        return newest
    if newest is not None:
        raise ConfigError(
            f"out={shown(out)}: holds a run at step {newest.step}; --resume {shown(resume)} needs another out="
        )
    return None if resume == "never" else read_checkpoint(Path(resume))


@dataclass(frozen=True)
class Entered(Generic[InputsT]):
    """A trained run that has its processes, its inputs and its place, and knows where it goes on from."""

    inputs: InputsT
    facts: Mapping[str, Any]  # of the inputs
    checkpoint: Checkpoint | None
    writer: Writer | None  # of the first process
    processes: Processes
    console: Console


@contextmanager
def entered(
    config: RunConfig,
    resume: str,
    fs: FileSystem | None,
    *,
    harmless: Collection[str],
    opened: Callable[[Processes], InputsT],
    facts: Callable[[InputsT], dict[str, Any]],
    paths: Collection[str] = (),
) -> Iterator[Entered[InputsT]]:
    """Everything that comes before a trained run is laid out, and after it has ended.

    Args:
        opened: opens what the run is made of; every process calls it.
        facts: what identifies that, which all processes must have found the same.
        paths: see `agree_on_run`. harmless: see `claimed`. resume, fs: as the stages take them.
    """
    with joined(config.engine.timeout_s) as processes, console_logging(processes.is_main) as console:
        agree_on_run(processes, config, resume, paths)
        inputs = opened(processes)
        found = facts(inputs)
        processes.agree(found)
        with claimed(config, harmless, processes, fs) as writer:
            checkpoint = starting_point(writer, resume, config.out, processes)
            yield Entered(inputs, found, checkpoint, writer, processes, console)


def open_log(writer: Writer | None, config: RunConfig, checkpoint: Checkpoint | None, checkpoint_bytes: int) -> None:
    """Open the metric files, say what ended earlier attempts, and refuse a disk without room for two checkpoints."""
    assert writer is not None, "only the first process logs"
    for fault in earlier_faults():
        logger.warning("started again: %s", fault)
    path = writer.directory.path
    require_space(path, int(2.4 * checkpoint_bytes), "room for two checkpoints", None)
    writer.log.open(checkpoint.step if checkpoint else -1, path.name, config.model_dump(mode="json"))


def require_same_data(data: str, checkpoint: Checkpoint | None, now: dict[str, Any]) -> None:
    """Raise DataError if a run would go on with other images than it was started with."""
    if checkpoint is None:
        return
    before = checkpoint.manifest["info"]["data"]
    if before != now:
        raise DataError(
            f"{shown(data)}: {now['images']} images (list {now['fingerprint']}), but the run was "
            f"started with {before['images']} (list {before['fingerprint']}); bring those back, or give another out="
        )


def require_same_backbone(path: Path, checkpoint: Checkpoint | None, digest: str) -> None:
    """Raise DataError if a run would go on from other weights than it was started from."""
    if checkpoint is not None and checkpoint.manifest["info"]["backbone"] != digest:
        raise DataError(
            f"{shown(path)}: weights {digest}, but the run was started from "
            f"{checkpoint.manifest['info']['backbone']}; bring that backbone back, or give another out="
        )


def data_facts(source: ImageSource) -> dict[str, Any]:
    """What identifies the images of a run, wherever they lie."""
    return {"images": len(source), "fingerprint": source.fingerprint()}


def run_info(config: RunConfig, device: torch.device, data: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run."""
    facts = environment()
    keys = ("torch", "torchvision", "numpy", "threads", "instruction_set", "gpu", "git_commit")
    return {
        **{key: facts[key] for key in keys},
        "device": device.type,
        "config": config_hash(config),
        "data": data,
    }


def concluded(config: RunConfig) -> dict[str, Any]:
    """What summary.json begins with, of a run that came to its end."""
    return {"status": "done", "config": config_hash(config), "seed": config.seed, "git_commit": git_commit()}


@dataclass(frozen=True)
class Begun:
    """A run that has its place, its data and its batches, and only lacks what is trained."""

    config: RunConfig
    plan: Plan
    device: torch.device
    processes: Processes
    writer: Writer | None
    console: Console
    info: dict[str, Any]  # of `run_info`, and what else a stage puts into its manifests

    def fit_of(
        self,
        task: Task,
        optimizer: Callable[[], torch.optim.Optimizer],
        lr_at: Callable[[int], float],
        clip_grad: float | None,
    ) -> Fit:
        """All that `fit` needs: blocks compiled where that is wanted, then the task shared out, then its optimizer."""
        config, info = self.config, dict(self.info)
        if compiles(config.engine.compile, self.device) and compile_blocks(task):
            info["compiled"] = True
        parallel = Parallel(task, config.engine.parallel, self.processes)  # before the optimizer: FSDP2 has new tensors
        return Fit(
            plan=self.plan,
            config=config.engine,
            log_config=config.log,
            checkpoint_config=config.checkpoint,
            optimizer=optimizer(),
            lr_at=lr_at,
            clip_grad=clip_grad,
            device=self.device,
            processes=self.processes,
            parallel=parallel,
            store=self.writer.store if self.writer else None,
            log=self.writer.log if self.writer else None,
            console=self.console,
            info=info,
        )


def begin(config: RunConfig, header: Sequence[str]) -> None:
    """Seed the global generators, which nothing should draw from, and say what was decided."""
    seed_everything(config.seed)
    keep_freed_memory()
    for line in header:
        logger.info("%s", line)


def choose_workers(config: LoaderConfig, device: torch.device, processes: Processes) -> int:
    """Loader workers of each process: as told, half the cores on a CPU, up to 16 beside a GPU."""
    if config.num_workers is not None:
        return config.num_workers
    share = (os.cpu_count() or 1) // processes.local_size
    return max(1, share // 2) if device.type == "cpu" else max(1, min(16, share))


def accumulation_of(
    config: RunConfig,
    checkpoint: Checkpoint | None,
    device: torch.device,
    processes: Processes,
    bytes_per_image: int,
    fixed_bytes: int,
) -> int:
    """Micro-batches per process: as told, as the run had them, or as few as the memory allows.

    Raises: ConfigError where the global batch cannot be shared out.
    """
    if config.batch_size % processes.size:
        raise ConfigError(
            f"batch_size={config.batch_size}: cannot be shared by {processes.size} processes; give a multiple of that"
        )
    share = config.batch_size // processes.size
    given = config.engine.accumulation

    def choose() -> int:
        if given is not None:
            if share % given:
                raise ConfigError(
                    f"engine.accumulation={given}: does not divide the {share} images per step of each of "
                    f"{processes.size} processes"
                )
            return given
        if checkpoint is not None:  # other micro-batches would change the order of sums
            before = config.batch_size // checkpoint.state["micro_batches"]
            return next(n for n in range(1, share + 1) if share % n == 0 and share // n <= before)
        sharing = processes.local_size if device.type == "cpu" else 1
        return choose_accumulation(share, bytes_per_image, fixed_bytes, available_bytes(device) // sharing)

    # Free memory changes from moment to moment: one process decides.
    return processes.on_main(choose)


def require_alone(framework: str, processes: Processes) -> None:
    """Raise ConfigError if a framework that this suite runs on one process is asked to run on several."""
    if framework != "native" and processes.size > 1:
        raise ConfigError(f"framework={framework}: runs on one process here; leave --nproc out")


def require_batch(config: RunConfig, num_images: int) -> None:
    """Raise ConfigError if there are fewer images than one step takes."""
    if num_images < config.batch_size:
        raise ConfigError(f"batch_size={config.batch_size}: more than the {num_images} images of data; lower it")


def image_feed(
    source: ImageSource,
    config: RunConfig,
    plan: Plan,
    prepare: Prepare,
    collate: Collate,
    channels: int,
    num_workers: int,
    checkpoint: Checkpoint | None,
    processes: Processes,
) -> Feed:
    """Batches of files in the order of the run, from the step that it goes on from."""
    order = EpochOrder(
        len(source), plan.batch_size, plan.micro_batch, config.seed, checkpoint.step if checkpoint else 0,
        plan.total_steps, processes.rank, processes.size,
    )  # fmt: skip
    images = TrainingImages(source, config.seed, prepare, channels, config.loader.max_pixels)
    loader = image_loader(images, order, collate, num_workers, config.loader.timeout_s)
    broken = dict(checkpoint.state["feed"]["broken"]) if checkpoint else {}
    return Feed(loader, plan.accumulation, config.loader.max_broken_share * len(source), broken)


def batch_line(plan: Plan, config: RunConfig) -> str:
    """The line of a header that says how the global batch comes about."""
    return (
        f"batch      effective {plan.batch_size} = {plan.micro_batch} per process x {plan.num_processes} "
        f"{'process' if plan.num_processes == 1 else 'processes'} x {plan.accumulation} accumulated"
        + (f"; {config.engine.parallel}" if plan.num_processes > 1 else "")
    )
