"""What watching, flags and late reading cost in a step without fault: step by step in turn, with and without.

    torchrun --standalone --nproc-per-node 2 -m tests.fault_cost

One process alone has nothing of it but the flags on its own device, and is measured by leaving torchrun out.
"""

import io
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console

from core.checkpoint import CheckpointConfig
from core.distributed import Processes, joined
from core.engine import EngineConfig, Fit, Plan, train_step
from core.flags import FlagReader
from core.log import LogConfig
from core.optim import OptimConfig, adamw, decay_groups
from core.parallel import Parallel
from pretrain.data import PretrainBatch
from pretrain.mae import MaskedAutoencoder
from pretrain.rc_mae import RCMAETask
from pretrain.run import _method
from pretrain.settings import PretrainConfig

STEPS, IMAGES = 120, 8


class Unguarded(FlagReader):
    """Counts nothing."""

    def record(self, step: int, bad: torch.Tensor, stop: torch.Tensor) -> None:
        """Nothing."""


class Unwatched(Processes):
    """Says nothing and asks nobody."""

    def enter(self, phase: str, step: int = -1) -> None:
        """Nothing."""

    def any_(self, flags: torch.Tensor) -> torch.Tensor:
        """This process's own flags."""
        return flags


def main() -> None:
    torch.set_num_threads(1)
    config = PretrainConfig(data="none", out=Path("none"), model="tiny", batch_size=IMAGES)
    with joined(300) as processes:
        generator = torch.Generator().manual_seed(0)
        student, teacher = (MaskedAutoencoder(config.vit_config(), config.decoder_config()) for _ in range(2))
        student.init_weights(generator)
        task = RCMAETask(student, teacher, _method(config, STEPS))
        parallel = Parallel(task, "ddp", processes)
        bare = Unwatched(processes.rank, processes.size)
        optimizer = adamw(decay_groups(task.named_parameters(), 0.05), OptimConfig())
        runs = [
            Fit(
                plan=Plan(IMAGES, IMAGES, 1, STEPS, processes.size), config=EngineConfig(), log_config=LogConfig(),
                checkpoint_config=CheckpointConfig(), optimizer=optimizer, lr_at=lambda step: 1e-4, clip_grad=None,
                device=torch.device("cpu"), processes=who, parallel=parallel, store=None, log=None,
                console=Console(file=io.StringIO()),
            )
            for who in (processes, bare)
        ]  # fmt: skip
        flags = [FlagReader(torch.device("cpu")), Unguarded(torch.device("cpu"))]
        vit = config.vit_config()
        batch = PretrainBatch(
            images=torch.randint(0, 256, (IMAGES, 3, *vit.img_size), dtype=torch.uint8, generator=generator),
            sizes=torch.tensor([vit.img_size] * IMAGES), valid=torch.ones(IMAGES, dtype=torch.bool),
            noise=torch.rand(IMAGES, vit.num_patches, generator=generator),
        )  # fmt: skip
        seconds: list[list[float]] = [[], []]
        for step in range(2 * STEPS):
            kind = step % 2
            begun = time.perf_counter()
            train_step(task, [batch], runs[kind], step, flags[kind])
            flags[kind].read(step - 3)
            seconds[kind].append(time.perf_counter() - begun)
        pairs = [a / b - 1 for a, b in zip(*(found[10:] for found in seconds), strict=True)]
        if processes.is_main:
            with_, without = (statistics.median(found[10:]) for found in seconds)
            print(
                f"{processes.size} process(es), ViT-Ti/16 224 px, {IMAGES} images each, {STEPS - 10} pairs of steps: "
                f"{1000 * with_:.1f} ms with, {1000 * without:.1f} ms without; "
                f"median of the pairs {100 * statistics.median(pairs):+.2f} %"
            )


if __name__ == "__main__":
    main()
