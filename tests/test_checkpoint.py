"""Checkpoints on disk: what verifies, what is kept, what is refused."""

import json
from pathlib import Path

import pytest
import torch

from core.checkpoint import CheckpointConfig, CheckpointStore, read_checkpoint
from core.errors import CheckpointError, MachineError, NumericError
from tests.harness import FullFileSystem

INFO = {"torch": "x"}


def tensors(value: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    return {"student": {"w": torch.full((64, 64), value)}, "optimizer": {"w.step": torch.tensor(3.0)}}


def store(folder: Path, **changes: object) -> CheckpointStore:
    folder.mkdir(exist_ok=True)
    return CheckpointStore(folder, CheckpointConfig(**changes))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_keeps_every_bit_and_dtype(tmp_path: Path) -> None:
    content = tensors() | {"more": {"i": torch.arange(3), "h": torch.rand(4).bfloat16(), "d": torch.rand(2).double()}}
    digest = store(tmp_path).save(7, content, {"x": [1, {"y": 2.5}]}, INFO)
    loaded = store(tmp_path).newest()
    assert (
        loaded is not None and loaded.step == 7 and loaded.digest == digest and loaded.state == {"x": [1, {"y": 2.5}]}
    )
    for stem, group in content.items():
        for name, tensor in group.items():
            assert loaded.tensors[stem][name].dtype == tensor.dtype
            assert torch.equal(loaded.tensors[stem][name], tensor)


def test_digest_tells_weights_and_state_but_not_the_machine(tmp_path: Path) -> None:
    digests = [
        store(tmp_path / str(i)).save(1, tensors(value), state, info)
        for i, (value, state, info) in enumerate(
            [(1.0, {"a": 1}, INFO), (1.0, {"a": 1}, {"torch": "y"}), (1.0, {"a": 2}, INFO), (1.5, {"a": 1}, INFO)]
        )
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_retention_keeps_two_and_every_nth(tmp_path: Path) -> None:
    kept = store(tmp_path, keep=2, keep_every_steps=4)
    for step in range(1, 11):
        kept.save(step, tensors(), {}, INFO)
        assert len(names(tmp_path)) >= min(step, 2)
    assert names(tmp_path) == [f"step_{step:07d}" for step in (4, 8, 9, 10)]


def test_retention_counts_only_what_verifies(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        store(tmp_path, keep=3).save(step, tensors(), {}, INFO)
    spoiled = tmp_path / "step_0000003" / "student.safetensors"
    spoiled.write_bytes(spoiled.read_bytes()[:-1] + b"\x01")
    store(tmp_path, keep=2).save(4, tensors(), {}, INFO)
    assert names(tmp_path) == [".bad-step_0000003-0", "step_0000002", "step_0000004"]


def test_fewer_than_two_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        CheckpointConfig(keep=1)


def test_every_single_byte_of_small_files_matters(tmp_path: Path) -> None:
    content = {"student": {"w": torch.arange(4.0)}}
    store(tmp_path).save(1, content, {"a": 1}, {})
    folder = tmp_path / "step_0000001"
    weights = (folder / "student.safetensors").read_bytes()
    for i in range(len(weights)):
        (folder / "student.safetensors").write_bytes(weights[:i] + bytes([weights[i] ^ 0x10]) + weights[i + 1 :])
        with pytest.raises(CheckpointError):
            read_checkpoint(folder)
    (folder / "student.safetensors").write_bytes(weights)
    assert torch.equal(read_checkpoint(folder).tensors["student"]["w"], torch.arange(4.0))


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.update(step=2),
        lambda m: m["state"].update(a=2),
        lambda m: m["files"].pop("student.safetensors"),
        lambda m: m.pop("digest"),
        lambda m: m.update(files=[]),
        lambda m: m["files"]["student.safetensors"].update(size="big"),
    ],
)
def test_an_edited_manifest_is_refused(tmp_path: Path, edit: object) -> None:
    store(tmp_path).save(1, tensors(), {"a": 1}, INFO)
    path = tmp_path / "step_0000001" / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="step_0000001"):
        read_checkpoint(tmp_path / "step_0000001")


def test_a_newer_format_asks_for_an_upgrade(tmp_path: Path) -> None:
    store(tmp_path).save(1, tensors(), {}, INFO)
    path = tmp_path / "step_0000001" / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match="upgrade"):
        read_checkpoint(path.parent)


def test_non_finite_values_are_never_saved(tmp_path: Path) -> None:
    bad = tensors()
    bad["student"]["w"][5, 5] = float("nan")
    with pytest.raises(NumericError, match="student: w"):
        store(tmp_path).save(1, bad, {}, INFO)
    assert names(tmp_path) == []


def test_large_finite_values_whose_sum_overflows_are_saved(tmp_path: Path) -> None:
    store(tmp_path).save(1, {"student": {"w": torch.full((4,), 3e38)}}, {}, INFO)
    assert names(tmp_path) == ["step_0000001"]


@pytest.mark.parametrize("honest", [True, False])
def test_a_full_disk_keeps_the_old_checkpoint_and_leaves_nothing_half_written(tmp_path: Path, honest: bool) -> None:
    fs = FullFileSystem(60_000, honest)
    kept = CheckpointStore(tmp_path, CheckpointConfig(), fs)
    kept.save(1, tensors(), {}, INFO)
    kept.save(2, tensors(), {}, INFO)
    with pytest.raises(OSError, match=r"disk full|No space") as caught:
        for step in range(3, 9):
            kept.save(step, tensors(), {}, INFO)
    assert isinstance(caught.value, MachineError) == honest
    assert all(name.startswith("step_") for name in names(tmp_path))
    newest = store(tmp_path).newest()
    assert newest is not None and newest.step == 3


def test_leftovers_of_a_dead_writer_are_removed_and_bad_ones_stay(tmp_path: Path) -> None:
    for name in (".tmp-step_0000001-9", ".del-step_0000001-9", ".bad-step_0000001-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("x")
    store(tmp_path).clean()
    assert names(tmp_path) == [".bad-step_0000001-0"]


def test_saving_a_step_again_keeps_the_good_one(tmp_path: Path) -> None:
    kept = store(tmp_path)
    first = kept.save(1, tensors(), {"a": 1}, INFO)
    assert kept.save(1, tensors(), {"a": 1}, INFO) == first
    assert names(tmp_path) == ["step_0000001"]
