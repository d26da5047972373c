"""What watching, flags and late reading cost in a step without fault: step by step in turn, with and without.

    torchrun --standalone --nproc-per-node 2 -m tests.fault_cost

One process alone has nothing of it but the flags on its own device, and is measured by leaving torchrun out.
"""

import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from core.distributed import Processes, joined
from core.engine import train_step
from core.flags import FlagReader
from pretrain.settings import PretrainConfig
from tools.bench import random_batch, suite_run

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
        bare = Unwatched(processes.rank, processes.size)
        task, run = suite_run(config, torch.device("cpu"), IMAGES, compiled=False, processes=processes)
        runs = [run, replace(run, processes=bare)]
        flags = [FlagReader(torch.device("cpu")), Unguarded(torch.device("cpu"))]
        batch = random_batch(config, torch.device("cpu"), IMAGES)
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
