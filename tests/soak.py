"""`make soak`: real runs, killed and restarted at random for as long as asked, must end in the bits of an undisturbed run.

One campaign is one run: some attempts that end badly, then one that is left alone. Runs are forked, or started by the
real launcher where torchrun's agent is to be killed or a worker to be restarted in place.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.harness import ForkServer, Run, fresh, kill, started
from tests.test_resume import digest, spoil, steps_logged
from tests.tiny import (
    draw_ade,
    draw_coco,
    draw_images,
    tiny_backbone,
    tiny_classification,
    tiny_detection,
    tiny_overrides,
    tiny_segmentation,
)

# Every trainable stage adds itself here with one line: its verb, and what makes it small.
STAGES = {
    "RC-MAE": ("pretrain", {}),
    "MAE": ("pretrain", {"method": "mae", "momentum": 0.996}),
    "RC-MAE, own masks, cosine": ("pretrain", {"teacher__mask": "own", "teacher__schedule": "cosine"}),
    "fine-tuning": ("classify", {"protocol": "finetune"}),
    "linear probe": ("classify", {"protocol": "linprobe"}),
    "Mask R-CNN": ("detect", {}),
    "Cascade Mask R-CNN": ("detect", {"detector__cascade": True}),
    "UperNet": ("segment", {}),
    "linear head": ("segment", {"head": "linear"}),
}
COUNTED = (
    "campaigns", "attempts", "kills", "kills at a crash point", "agent kills", "workers killed under the launcher",
    "restarts in place", "signals", "bit flips", "differences", "torn checkpoints loaded", "orphans", "other faults",
)  # fmt: skip
MUST_BE_ZERO = ("differences", "torn checkpoints loaded", "orphans", "other faults")


@dataclass
class Campaign:
    """One run and what is done to it."""

    server: ForkServer
    data: Path
    folder: Path
    rng: random.Random
    counts: Counter

    def __post_init__(self) -> None:
        self.name = self.rng.choice(list(STAGES))
        self.size = self.rng.choice([1, 2, 3, 4])
        self.mode = self.rng.choice(["ddp", "ddp", "fsdp2"])
        self.verb, changes = STAGES[self.name]
        if self.name in {"linear probe", "linear head"}:
            self.mode = "ddp"  # they have one layer, and refuse to shard it
        sharded = self.size > 1 and self.mode == "fsdp2"  # slow on a CPU
        self.changes = {
            "batch_size": 12, "epochs": 5 if sharded else 25, "checkpoint__every_steps": 3 if sharded else 8,
            "engine__parallel": self.mode, "loader__num_workers": self.rng.choice([0, 0, 1]),
            "engine__accumulation": self.rng.choice([1, 12 // self.size // 2 or 1]), **changes,
        }  # fmt: skip
        self.out, self.log = self.folder / "out", self.folder / "log"
        self.flipped: set[str] = set()

    def __str__(self) -> str:
        mode = f" {self.mode}" if self.size > 1 else ""
        return f"{self.name}, {self.size} process{'es' if self.size > 1 else ''}{mode}"

    def overrides(self, out: Path) -> list[str]:
        if self.verb == "pretrain":
            return tiny_overrides(self.data, out, **self.changes)
        changes = dict(self.changes)
        if self.verb == "detect":
            changes["steps"] = changes.pop("epochs")
            return tiny_detection(self.data.parent / "world" / "coco", out, self.data.parent / "backbone", **changes)
        if self.verb == "segment":
            changes["steps"] = changes.pop("epochs")
            return tiny_segmentation(self.data.parent / "ade", out, self.data.parent / "backbone", **changes)
        changes[f"{changes['protocol']}__epochs"] = changes.pop("epochs")
        return tiny_classification(self.data, out, self.data.parent / "backbone", **changes)

    def carry_out(self, attempts: int) -> None:
        """Attempt after attempt, then one that is left alone; counts what was found."""
        reference = self.folder / "reference"
        begun = time.perf_counter()
        run = self.start(self.overrides(reference))
        assert self.wait(run) == [0] * self.size, self.log.read_text()
        whole_s = time.perf_counter() - begun
        for _ in range(attempts):
            if (self.out / "summary.json").exists():
                break
            self.counts["attempts"] += 1
            kinds = [self.random_kill, self.random_kill, self.crash_point, self.signal_one]
            if self.size > 1:
                kinds += [self.under_the_launcher] * 2
            self.rng.choice(kinds)(whole_s)
            if self.rng.random() < 0.3:
                self.flip_a_bit()
        run = self.start(self.overrides(self.out))
        codes = self.wait(run)
        if codes != [0] * self.size:
            self.fault("other faults", f"left alone, it ended with {codes}")
            return
        if digest(self.out) != digest(reference) or steps_logged(self.out) != steps_logged(reference):
            self.fault("differences", "the end differs from that of the undisturbed run")
        found = len(list((self.out / "checkpoints").glob(".bad-*")))
        if found != len(self.flipped):
            self.fault("torn checkpoints loaded", f"{len(self.flipped)} were spoilt, {found} were noticed")
        if "not bit-exact" in self.log.read_text():
            self.fault("other faults", "a resume called itself inexact")

    def start(self, overrides: list[str], crash_at: int | None = None) -> Run:
        return self.server.start(overrides, self.log, crash_at, self.size, stage=self.verb)

    def wait(self, run: Run) -> list[int]:
        try:
            return self.server.wait_all(run)
        except AssertionError as error:
            self.fault("orphans", str(error))
            return [-1] * self.size

    def random_kill(self, whole_s: float) -> None:
        """SIGKILL of a random process at a random time."""
        run = self.start(self.overrides(self.out))
        time.sleep(self.rng.uniform(0, 0.7) * whole_s)
        kill(self.rng.choice(run.pids))
        self.counts["kills"] += -9 in self.wait(run)

    def crash_point(self, _: float) -> None:
        """SIGKILL of the first process at a random point of the checkpoint writer."""
        run = self.start(self.overrides(self.out), crash_at=self.rng.randint(1, 60))
        self.counts["kills at a crash point"] += -9 in self.wait(run)

    def signal_one(self, whole_s: float) -> None:
        """SIGUSR1 to one process, as a cluster sends it."""
        run = self.start(self.overrides(self.out))
        time.sleep(self.rng.uniform(0.3, 0.7) * whole_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.rng.choice(run.pids), signal.SIGUSR1)
        codes = self.wait(run)
        self.counts["signals"] += 75 in codes

    def under_the_launcher(self, whole_s: float) -> None:
        """The real command: torchrun's agent is killed, or a worker, which it then starts again."""
        outcome = self.out / "outcome.json"
        outcome.unlink(missing_ok=True)
        with started([self.verb, *self.overrides(self.out), "--nproc", str(self.size)]) as run:
            deadline = time.monotonic() + 60
            while len(run.workers()) < self.size and time.monotonic() < deadline:
                time.sleep(0.1)
            time.sleep(self.rng.uniform(0, 6 + whole_s))
            if self.rng.random() < 0.5:
                with contextlib.suppress(StopIteration):
                    kill(run.agent())
                    self.counts["agent kills"] += 1
            elif run.workers():
                kill(self.rng.choice(list(run.workers().values())))
                self.counts["workers killed under the launcher"] += 1
            try:
                code, _, complained = run.end()
            except AssertionError as error:
                self.fault("orphans", str(error))
                return
            if outcome.exists():
                self.counts["restarts in place"] += json.loads(outcome.read_text())["restarts"]
            if code not in (0, 7, -9):
                self.fault("other faults", f"the launcher ended with {code}: {complained[-1000:]}")

    def flip_a_bit(self) -> None:
        """Spoil the newest checkpoint, where there is another to fall back to."""
        steps = sorted((self.out / "checkpoints").glob("step_*"))
        if len(steps) > 1 and not {path.name for path in steps} & self.live_flips():
            spoil(steps[-1], self.rng.choice(["flipped", "truncated", "manifest"]))
            self.flipped.add(f"{steps[-1].name} {len(self.flipped)}")
            self.counts["bit flips"] += 1

    def live_flips(self) -> set[str]:
        """Spoilt checkpoints that no attempt has come across yet."""
        noticed = len(list((self.out / "checkpoints").glob(".bad-*")))
        return {name.split()[0] for name in sorted(self.flipped, key=lambda n: int(n.split()[1]))[noticed:]}

    def fault(self, kind: str, text: str) -> None:
        self.counts[kind] += 1
        print(f"FAULT {kind}: {self}: {text}; kept in {self.folder}", flush=True)


def restarts(number: int) -> int:
    """Kill a worker of `--nproc 3` so many times; each time torchrun must bring all back with its first restart."""
    work = Path(tempfile.mkdtemp(prefix="rcmae-soak-"))
    data, out, log = draw_images(work / "data"), work / "out", work / "log"
    rng, seconds = random.Random(0), []
    changes = {
        "batch_size": 12, "epochs": 25 * (number + 1), "checkpoint__every_steps": 50, "log__every_steps": 50,
    }  # fmt: skip
    with ForkServer() as server:
        assert server.run(tiny_overrides(data, work / "reference", **changes), log, size=3) == 0, log.read_text()
    arguments = ["pretrain", *tiny_overrides(data, out, **changes), "--nproc", "3", "--max-restarts", str(number)]
    with started(arguments) as run:
        for _ in range(number):
            newest = newest_step(out)
            while newest_step(out) == newest and run.process.poll() is None:  # it trains
                time.sleep(0.05)
            workers = run.workers()
            kill(workers[rng.randrange(3)])
            begun = time.monotonic()
            while not (len(now := run.workers()) == 3 and not set(now.values()) & set(workers.values())):
                time.sleep(0.05)
            seconds.append(time.monotonic() - begun)
        code, _, complained = run.end(300)
    attempts = json.loads((out / "outcome.json").read_text())["restarts"]
    same = digest(out) == digest(work / "reference")
    print(
        f"{number} worker kills, {attempts} restarts, exit code {code}, digest {'equal' if same else 'DIFFERENT'}; "
        f"new processes after {statistics.median(seconds):.1f} s (median), {max(seconds):.1f} s (longest)\n{complained}"
    )
    return 0 if (attempts, code, same) == (number, 0, True) else 1


def newest_step(out: Path) -> str:
    """Name of the newest checkpoint."""
    return max((path.name for path in (out / "checkpoints").glob("step_*")), default="")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--restarts", type=int, help="instead: so many worker kills under --nproc 3")
    options = parser.parse_args()
    if options.restarts:
        return restarts(options.restarts)
    work = Path(tempfile.mkdtemp(prefix="rcmae-soak-"))
    data, rng, counts = draw_images(work / "data"), random.Random(options.seed), Counter()
    tiny_backbone(work / "backbone")
    draw_coco(work / "world")
    draw_ade(work / "ade")
    sizes: Counter = Counter()
    print(f"soak for {options.minutes:g} minutes, seed {options.seed}", flush=True)
    begun = time.monotonic()
    with ForkServer() as server:
        while time.monotonic() - begun < 60 * options.minutes:
            folder = fresh(work / f"campaign_{counts['campaigns']}")
            folder.mkdir()
            campaign = Campaign(server, data, folder, rng, counts)
            before = sum(counts[kind] for kind in MUST_BE_ZERO)
            campaign.carry_out(rng.randint(2, 6))
            counts["campaigns"] += 1
            sizes[str(campaign)] += 1
            if sum(counts[kind] for kind in MUST_BE_ZERO) == before:
                shutil.rmtree(folder)
            if counts["campaigns"] % 10 == 0:
                print(f"{(time.monotonic() - begun) / 60:5.1f} min  {summary(counts)}", flush=True)
    print(f"\n{(time.monotonic() - begun) / 60:.1f} minutes, seed {options.seed}")
    print("\n".join(f"{counts[kind]:6} {kind}" for kind in COUNTED))
    print("\n".join(f"{number:6} campaigns of {name}" for name, number in sorted(sizes.items())))
    bad = sum(counts[kind] for kind in MUST_BE_ZERO)
    if not bad:
        shutil.rmtree(work)
    return 1 if bad else 0


def summary(counts: Counter) -> str:
    return ", ".join(f"{counts[kind]} {kind}" for kind in COUNTED if counts[kind])


if __name__ == "__main__":
    sys.exit(main())
