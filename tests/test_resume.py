"""Killed at any moment and started again with the same command, a run ends in the same bits as without."""

import json
import random
import time
from pathlib import Path

import pytest

from tests.faults import FAULTS
from tests.harness import ForkServer, fresh, kill_after
from tests.tiny import tiny_overrides


def digest(out: Path) -> str:
    summary = json.loads((out / "summary.json").read_text())
    return summary["digest"]


def steps_logged(out: Path) -> list[int]:
    return [row["step"] for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())]


def assert_whole(out: Path, reference: Path) -> None:
    """The run is done, equal to the reference in every bit, and nothing half-written is left."""
    assert digest(out) == digest(reference)
    assert steps_logged(out) == steps_logged(reference)
    leftovers = [p.name for p in out.rglob(".*") if p.name != ".lock"]
    assert leftovers == [], leftovers
    assert len(list((out / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("part", range(4))
def test_every_crash_point_of_the_checkpoint_writer(server: ForkServer, data: Path, tmp_path: Path, part: int) -> None:
    reference, log = tmp_path / "reference", tmp_path / "log"
    assert server.run(tiny_overrides(data, reference), log) == 0, log.read_text()
    points = int(Path(f"{log}.points").read_text())
    assert points > 50  # three checkpoints, one of them deleted
    out = tmp_path / "out"
    for point in range(1 + part, points + 1, 4):
        overrides = tiny_overrides(data, fresh(out))
        assert server.run(overrides, log, crash_at=point) == -9, point
        assert server.run(overrides, log) == 0, (point, log.read_text())
        assert_whole(out, reference)


@pytest.mark.parametrize("workers", [0, 1])
def test_ten_random_kills(server: ForkServer, data: Path, tmp_path: Path, workers: int) -> None:
    longer = {"epochs": 60, "checkpoint__every_steps": 5, "loader__num_workers": workers}
    reference, out, log = tmp_path / "reference", tmp_path / "out", tmp_path / "log"
    start = time.perf_counter()
    assert server.run(tiny_overrides(data, reference, **longer), log) == 0, log.read_text()
    whole = time.perf_counter() - start
    rng = random.Random(workers)
    codes = []
    for _ in range(10):
        codes.append(kill_after(server, tiny_overrides(data, out, **longer), log, rng.uniform(0.03, 0.15) * whole))
    assert codes == [-9] * 10
    assert server.run(tiny_overrides(data, out, **longer), log) == 0, log.read_text()
    assert_whole(out, reference)
    assert "resumed from step" in log.read_text() and "not bit-exact" not in log.read_text()


@pytest.mark.parametrize("fault", [name for name in FAULTS if name.startswith("forget_")])
def test_a_program_that_forgets_something_on_resume_is_found_out(
    server: ForkServer, data: Path, tmp_path: Path, fault: str
) -> None:
    reference, out, log = tmp_path / "reference", tmp_path / "out", tmp_path / "log"
    assert server.run(tiny_overrides(data, reference), log) == 0, log.read_text()
    half_way = int(Path(f"{log}.points").read_text()) // 2
    assert server.run(tiny_overrides(data, out), log, crash_at=half_way) == -9
    assert server.wait(server.start(tiny_overrides(data, out), log, fault=fault)) == 0, log.read_text()
    assert "resumed from step" in log.read_text()
    with pytest.raises(AssertionError):
        assert_whole(out, reference)


def test_ddp_whose_buckets_are_not_put_in_order_before_the_first_step_is_found_out(
    server: ForkServer, data: Path, tmp_path: Path
) -> None:
    """Three processes are needed to see it: a sum of two is the same in any order."""
    longer, log = {"batch_size": 12, "epochs": 6}, tmp_path / "log"
    digests = []
    for crash_at in (None, 60):
        out = tmp_path / str(crash_at)
        run = server.start(
            tiny_overrides(data, out, **longer), log, crash_at, size=3, fault="no_warm_up", faulty_rank=-1
        )
        assert server.wait_all(run)[0] == (-9 if crash_at else 0)
        if crash_at:
            again = server.start(tiny_overrides(data, out, **longer), log, size=3, fault="no_warm_up", faulty_rank=-1)
            assert server.wait_all(again) == [0, 0, 0]
        digests.append(digest(out))
    assert digests[0] != digests[1]


def test_finished_run_stays_finished(server: ForkServer, data: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    assert server.run(tiny_overrides(data, out), log) == 0
    before = digest(out)
    assert server.run(tiny_overrides(data, out), log) == 0
    assert digest(out) == before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "missing", "extra", "manifest"])
def test_damaged_newest_checkpoint_falls_back_with_one_line(
    server: ForkServer, data: Path, tmp_path: Path, damage: str
) -> None:
    reference, out, log = tmp_path / "reference", tmp_path / "out", tmp_path / "log"
    assert server.run(tiny_overrides(data, reference), tmp_path / "other") == 0
    assert server.run(tiny_overrides(data, out), log) == 0
    newest = out / "checkpoints" / "step_0000006"
    spoil(newest, damage)
    log.unlink()
    assert server.run(tiny_overrides(data, out), log) == 0, log.read_text()
    lines = [line for line in log.read_text().splitlines() if "checkpoint damaged" in line]
    assert len(lines) == 1 and "step_0000006" in lines[0] and "going on from step 4" in lines[0]
    assert "resumed from step 4 of 6" in log.read_text()
    assert digest(out) == digest(reference)
    assert [p.name for p in (out / "checkpoints").glob(".bad-*")] == [".bad-step_0000006-0"]


def test_all_checkpoints_damaged_is_never_a_fresh_start(server: ForkServer, data: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    assert server.run(tiny_overrides(data, out), log) == 0
    for step in ("step_0000004", "step_0000006"):
        spoil(out / "checkpoints" / step, "flipped")
    log.unlink()
    for _ in range(2):  # nor is it the second time
        assert server.run(tiny_overrides(data, out), log) == 4
        errors = [line for line in log.read_text().splitlines() if line.startswith("error:")]
        assert "no checkpoint verifies" in errors[-1]


def spoil(checkpoint: Path, damage: str) -> None:
    networks = sorted(path for path in checkpoint.glob("*.safetensors") if path.name != "optimizer.safetensors")
    weights, manifest = networks[0], checkpoint / "manifest.json"
    data = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        middle = len(data) - 100
        weights.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "missing":
        weights.unlink()
    elif damage == "extra":
        (checkpoint / "more.safetensors").write_bytes(b"x")
    else:
        manifest.write_text(manifest.read_text().replace('"skipped": 0', '"skipped": 1'))
