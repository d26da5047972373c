"""Several processes: the same run as one, whatever is killed, stuck, out of step or not a number on one of them."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from core.checkpoint import read_checkpoint
from core.datasets import open_images
from core.distributed import Processes
from core.loader import EvalImages, EvalOrder, eval_loader, in_order
from tests.harness import ForkServer, kill
from tests.test_resume import assert_whole, digest
from tests.test_run import broken_folder
from tests.tiny import tiny_overrides

THREE = {"batch_size": 12, "epochs": 3, "checkpoint__every_steps": 4}  # 12 steps, divisible by 1, 2 and 3 processes


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def errors(log: Path) -> list[str]:
    assert "Traceback" not in log.read_text(), log.read_text()
    return [line for line in log.read_text().splitlines() if line.startswith("error:")]


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_and_three_processes_train_as_one_that_accumulates(
    server: ForkServer, data: Path, tmp_path: Path, mode: str
) -> None:
    found = []
    for size in (1, 2, 3):
        out, log = tmp_path / str(size), tmp_path / f"log{size}"
        overrides = tiny_overrides(data, out, **THREE, engine__accumulation=6 // size, engine__parallel=mode)
        assert server.run(overrides, log, size=size) == 0, log.read_text()
        word = "process" if size == 1 else "processes"
        assert f"effective 12 = 2 per process x {size} {word} x {6 // size} accumulated" in log.read_text()
        found.append(losses(out))
    assert len(found[0]) == 12
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=1e-5)


def test_what_the_teacher_does_is_measured_over_all_processes(server: ForkServer, data: Path, tmp_path: Path) -> None:
    found = []
    for size in (1, 2):
        out, log = tmp_path / str(size), tmp_path / f"log{size}"
        overrides = tiny_overrides(data, out, **THREE, engine__accumulation=2 // size, dynamics__every_steps=4)
        assert server.run(overrides, log, size=size) == 0, log.read_text()
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found.append([row for row in rows if "dynamics/teacher_distance" in row])
    assert [row["step"] for row in found[0]] == [4, 8, 12]
    for one, two in zip(*found, strict=True):
        assert two == pytest.approx(one, rel=1e-3) and len(one) == 8


def test_model_noise_does_not_depend_on_the_process() -> None:
    from core.task import Place

    one = [Place(7, index, index) for index in range(6)]
    three = [Place(7, turn * 3 + rank, turn) for turn in range(2) for rank in range(3)]
    draws = [
        [torch.rand(3, generator=place.generator(5, torch.device("cpu"))).tolist() for place in places]
        for places in (one, three)
    ]
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws[0]}) == 6
    assert draws[0][0] != torch.rand(3, generator=Place(8, 0, 0).generator(5, torch.device("cpu"))).tolist()


class _Together(Processes):
    """Rank 0 of several processes whose parts are all at hand."""

    def __init__(self, parts: list[list[torch.Tensor]]) -> None:
        super().__init__(0, len(parts))
        self.parts = parts

    def stack(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.stack(part).to(rows.dtype) for part in self.parts])


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("num_images", [1, 7, 48])
def test_every_image_is_evaluated_exactly_once(data: Path, size: int, num_images: int) -> None:
    source = open_images(str(data), Path("unused")).subset(np.arange(num_images))
    batches = [
        list(eval_loader(EvalImages(source, _Corner()), 4, 0, 60, Processes(rank, size))) for rank in range(size)
    ]
    assert len({len(part) for part in batches}) == 1  # the same number of collectives on each
    labels, valid = [[batch.labels for batch in part] for part in batches], [[b.valid for b in p] for p in batches]
    together, keep = _Together(labels), _Together(valid)

    class Both(_Together):
        def stack(self, rows: torch.Tensor) -> torch.Tensor:
            return (keep if rows.dtype == torch.uint8 else together).stack(rows)

    assert in_order(labels[0], valid[0], Both(labels)).tolist() == source.labels.tolist()
    indices = [index for rank in range(size) for batch in EvalOrder(num_images, 4, rank, size) for index in batch]
    assert sorted(index for index in indices if index < num_images) == list(range(num_images))


class _Corner:
    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image[:, :4, :4]


def test_the_probe_of_three_processes_gives_the_figures_of_one(server: ForkServer, data: Path, tmp_path: Path) -> None:
    found = []
    for size in (1, 3):
        out, log = tmp_path / str(size), tmp_path / "log"
        overrides = tiny_overrides(data, out, batch_size=12, epochs=1, probe__data=data, probe__test_images=7)
        assert server.run(overrides, log, size=size) == 0, log.read_text()
        first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
        found.append({key: value for key, value in first.items() if key.startswith("probe/")})
    assert found[0] == found[1] and len(found[0]) == 3


@pytest.mark.parametrize(("mode", "rank"), [("ddp", 0), ("ddp", 2), ("fsdp2", 1)])
def test_three_processes_killed_and_resumed_end_in_the_same_bits(
    server: ForkServer, data: Path, tmp_path: Path, mode: str, rank: int
) -> None:
    epochs = 20 if mode == "ddp" else 6
    longer = {"batch_size": 12, "epochs": epochs, "checkpoint__every_steps": 5, "engine__parallel": mode}
    reference, out, log = tmp_path / "reference", tmp_path / "out", tmp_path / "log"
    assert server.run(tiny_overrides(data, reference, **longer), log, size=3) == 0, log.read_text()
    overrides = tiny_overrides(data, out, **longer)
    run = server.start(overrides, log, size=3)
    wait_for_step(out, 10)
    kill(run.pids[rank])
    codes = server.wait_all(run)
    assert codes[rank] == -9 and all(code == 7 for other, code in enumerate(codes) if other != rank), codes
    assert f"rank {rank} (pid {run.pids[rank]}) is gone; it was last seen in" in errors(log)[0]
    assert server.run(overrides, log, size=3) == 0, log.read_text()
    assert "resumed from step" in log.read_text() and "not bit-exact" not in log.read_text()
    assert_whole(out, reference)


def test_the_others_of_one_killed_while_they_meet_are_ended_by_torchrun(
    server: ForkServer, data: Path, tmp_path: Path
) -> None:
    """They wait for it at a point where nobody can tell them; the harness ends them as torchrun does."""
    run = server.start(tiny_overrides(data, tmp_path / "out", **THREE), tmp_path / "log", size=3)
    kill(run.pids[1])
    codes = server.wait_all(run)
    assert codes[1] == -9 and set(codes) <= {-9, 7}, codes


def wait_for_step(out: Path, step: int) -> None:
    """Return when a checkpoint of at least this step is there."""
    deadline = time.monotonic() + 240  # patience for a busy machine
    while not any(int(p.name[5:]) >= step for p in (out / "checkpoints").glob("step_*")):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_line(log: Path, text: str) -> None:
    """Return when the run has said it."""
    deadline = time.monotonic() + 240
    while not (log.exists() and text in log.read_text()):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def test_a_checkpoint_of_three_processes_goes_on_with_two_and_one(
    server: ForkServer, data: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    overrides = tiny_overrides(data, out, **{**THREE, "epochs": 200})
    for size, before in ((3, None), (2, 3), (1, 2)):
        log.unlink(missing_ok=True)
        start = max((int(p.name[5:]) for p in (out / "checkpoints").glob("step_*")), default=0)
        run = server.start(overrides, log, size=size)
        wait_for_step(out, start + 8)
        os.kill(run.pids[-1], signal.SIGTERM)
        assert server.wait_all(run) == [75] * size, log.read_text()
        lines = [line for line in log.read_text().splitlines() if line.startswith("not bit-exact from here")]
        if before:
            assert f"processes was {before}, is {size}: gradients are summed in another order" in lines[0]
            assert f"resumed from step {start} of" in log.read_text()
        else:
            assert not lines
    newest = max((out / "checkpoints").iterdir())
    # Six images each of two processes: micro-batches of 4 cannot be kept, so they became smaller.
    assert read_checkpoint(newest).manifest["info"]["micro_batch"] == 3


@pytest.mark.parametrize("fault", ["nan_loss_once", "nan_gradient_once"])
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_a_step_that_is_not_finite_on_one_process_changes_nothing_on_any(
    server: ForkServer, data: Path, tmp_path: Path, fault: str, mode: str
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    often = {**THREE, "checkpoint__every_steps": 1, "checkpoint__keep": 12, "engine__parallel": mode}
    run = server.start(tiny_overrides(data, out, **often), log, size=3, fault=fault, faulty_rank=1)
    assert server.wait_all(run) == [0, 0, 0], log.read_text()
    files = [read_checkpoint(out / "checkpoints" / f"step_000000{n}").manifest["files"] for n in (2, 3, 4)]
    assert files[0] == files[1] and files[1] != files[2]  # step 2 was suppressed, step 3 was not
    assert json.loads((out / "summary.json").read_text())["non_finite_steps"] == 1
    assert log.read_text().count("update suppressed, 1 in all") == 1


def test_the_third_such_step_in_a_row_stops_all_with_the_last_good_checkpoint(
    server: ForkServer, data: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    overrides = tiny_overrides(data, out, **{**THREE, "checkpoint__every_steps": 3})
    run = server.start(overrides, log, size=3, fault="nan_loss_from_step_3", faulty_rank=1)
    assert server.wait_all(run) == [5, 5, 5]
    (line,) = errors(log)
    assert "3 steps in a row" in line and "the last good checkpoint is step 3" in line
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step_0000003"]


DISAGREEMENTS = {
    "other_configuration": "the processes differ in configuration: gamma: rank 0 has 1.0, rank 1 has 0.5; start all",
    "other_code": 'rank 1 has "0123456789abcdef"; start all of them with the same',
    "other_data": '"images": 47',
}


@pytest.mark.parametrize("fault", DISAGREEMENTS)
def test_processes_that_differ_are_told_before_anything_is_written(
    server: ForkServer, data: Path, tmp_path: Path, fault: str
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    run = server.start(tiny_overrides(data, out, **THREE), log, size=3, fault=fault, faulty_rank=1)
    assert server.wait_all(run) == [7, 7, 7]
    (line,) = errors(log)
    assert DISAGREEMENTS[fault] in line
    assert not out.exists()


def test_an_error_of_one_process_is_said_once_and_ends_all(server: ForkServer, data: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    run = server.start(tiny_overrides(data, out, **THREE), log, size=3, fault="no_data", faulty_rank=1)
    assert server.wait_all(run) == [3, 3, 3]
    assert errors(log) == ["error: rank 1: /data: no such file or folder"]  # the others do see it
    log.unlink()
    assert server.run(tiny_overrides(data / "nowhere", out, **THREE), log, size=3) == 3
    assert len(errors(log)) == 1 and "rank" not in errors(log)[0]  # all found the same
    log.unlink()
    assert server.run(tiny_overrides(data, out, **{**THREE, "batch_size": 16}), log, size=3) == 2
    assert errors(log) == ["error: batch_size=16: cannot be shared by 3 processes; give a multiple of that"]


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("killed_in_forward", "is gone; it was last seen in"),
        ("stuck_in_forward", "rank 1 stuck for"),
        ("stopped_in_forward", "rank 1 silent: stopped, or its machine is; last in"),
    ],
)
def test_one_process_dead_or_stuck_ends_the_run_within_the_timeout_and_is_named(
    server: ForkServer, data: Path, tmp_path: Path, fault: str, text: str
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    overrides = tiny_overrides(data, out, **THREE, engine__timeout_s=5)
    run = server.start(overrides, log, size=3, fault=fault, faulty_rank=1)
    wait_for_line(log, "error:")
    if fault == "stopped_in_forward":
        os.kill(run.pids[1], signal.SIGKILL)  # what torchrun does with it
    codes = server.wait_all(run)
    assert codes[0] == codes[2] == 7, codes
    assert codes[1] == (7 if fault == "stuck_in_forward" else -9)
    (line,) = errors(log)
    assert text in line and "rank 1" in line
    if fault == "stuck_in_forward":
        assert "in forward of step 2 (faults.py:" in line and " in sleep)" in line


def test_a_fault_of_ours_on_one_process_ends_all(server: ForkServer, data: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    run = server.start(
        tiny_overrides(data, tmp_path / "out", **THREE), log, size=3, fault="raises_in_forward", faulty_rank=2
    )
    assert server.wait_all(run) == [1, 1, 1], log.read_text()
    assert log.read_text().count("Traceback") == 1
    assert log.read_text().count("a fault of ours: KeyError") == 1


def test_a_replica_that_differs_is_not_saved(server: ForkServer, data: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    run = server.start(tiny_overrides(data, out, **THREE), log, size=3, fault="flipped_bit", faulty_rank=1)
    assert server.wait_all(run) == [7, 7, 7]
    (line,) = errors(log)
    assert "student" in line and "of rank 1 is not what rank 0 has" in line
    assert list((out / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("how", ["one rank", "twice", "during a save"])
def test_a_signal_saves_the_same_step_on_all_and_the_run_goes_on(
    server: ForkServer, data: Path, tmp_path: Path, how: str
) -> None:
    longer = {"batch_size": 12, "epochs": 20, "checkpoint__every_steps": 25}
    reference, out, log = tmp_path / "reference", tmp_path / "out", tmp_path / "log"
    assert server.run(tiny_overrides(data, reference, **longer), tmp_path / "first", size=3) == 0
    overrides, number = tiny_overrides(data, out, **longer), {"twice": signal.SIGTERM}.get(how, signal.SIGUSR1)
    run = server.start(overrides, log, size=3, fault="slow_saves" if how == "during a save" else None)
    wait_for_line(log, "step 25/" if how == "during a save" else "step 20/")
    time.sleep(0.5 if how == "during a save" else 0)  # that save takes three seconds
    for pid in run.pids if how == "twice" else run.pids[1:2]:
        for _ in range(2 if how == "twice" else 1):
            os.kill(pid, number)
            time.sleep(0.01)
    begun = time.monotonic()
    assert server.wait_all(run) == [75, 75, 75], log.read_text()
    assert time.monotonic() - begun < 30
    assert log.read_text().count("the same command goes on") == 1
    assert server.run(overrides, log, size=3) == 0, log.read_text()
    assert_whole(out, reference)


def test_broken_images_are_counted_over_all_processes(server: ForkServer, tmp_path: Path) -> None:
    names, folder = [], broken_folder(tmp_path / "images")
    for size in (1, 3):
        out, log = tmp_path / str(size), tmp_path / f"log{size}"
        overrides = tiny_overrides(folder, out, batch_size=3, loader__max_broken_share=0.9)
        assert server.run(overrides, log, size=size) == 0, log.read_text()
        broken = json.loads((out / "summary.json").read_text())["broken_images"]
        assert "Warning" not in log.read_text()
        assert all(log.read_text().count(f"replaced {name}: ") == 1 for name in broken)
        names.append(sorted(broken))
    assert names[0] == names[1] and len(names[0]) == 5


def test_digest_is_that_of_the_run(server: ForkServer, data: Path, tmp_path: Path) -> None:
    """Three processes end in the same bits twice."""
    found = set()
    for turn in range(2):
        out, log = tmp_path / str(turn), tmp_path / "log"
        assert server.run(tiny_overrides(data, out, **THREE), log, size=3) == 0, log.read_text()
        found.add(digest(out))
    assert len(found) == 1
