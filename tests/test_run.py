"""`rcmae pretrain` as its user meets it: what trains, what is refused with which line and code, and what is left."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from tests.harness import ROOT, ForkServer, kill
from tests.tiny import draw_images, tiny_overrides


def refused(server: ForkServer, overrides: list[str], log: Path, code: int) -> str:
    """The single error line of a run that must end with `code`."""
    log.unlink(missing_ok=True)
    assert server.run(overrides, log) == code, log.read_text()
    errors = [line for line in log.read_text().splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in log.read_text(), log.read_text()
    return errors[0]


def test_missing_and_empty_folders(server: ForkServer, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    assert "no such file or folder" in refused(server, tiny_overrides(tmp_path / "nowhere", out), log, 3)
    (tmp_path / "empty").mkdir()
    assert "no images found" in refused(server, tiny_overrides(tmp_path / "empty", out), log, 3)
    (tmp_path / "text.txt").write_text("x")
    assert "expected a folder" in refused(server, tiny_overrides(tmp_path / "text.txt", out), log, 3)
    assert not out.exists()


def test_out_that_cannot_be_written(server: ForkServer, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/rcmae")):
        assert "give a folder that can be written" in refused(server, tiny_overrides(data, out), tmp_path / "log", 6)
    assert (tmp_path / "file").read_text() == "x"


def test_out_that_holds_something_else_is_left_alone(server: ForkServer, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    assert "holds other files" in refused(server, tiny_overrides(data, out), tmp_path / "log", 2)
    assert (out / "thesis.tex").read_text() == "x"
    assert not (out / "config.yaml").exists()


def test_what_a_killed_process_left_half_written_is_removed(server: ForkServer, data: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    (out / ".del-backbone-1").mkdir(parents=True)
    (out / ".tmp-config.yaml-1").write_text("half")  # killed before it was a run
    (out / ".del-backbone-1" / "config.json").write_text("{}")
    assert server.run(tiny_overrides(data, out), log) == 0, log.read_text()
    (out / "pictures" / ".tmp-reconstructions_0000000.png-1").write_text("half")
    assert server.run(tiny_overrides(data, out), log) == 0
    assert [p.name for p in out.rglob(".*")] == [".lock"]


def test_another_configuration_is_refused_key_by_key(server: ForkServer, data: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    assert server.run(tiny_overrides(data, out), log) == 0
    before = (out / "summary.json").read_bytes()
    line = refused(server, tiny_overrides(data, out, gamma=0.5), log, 2)
    assert "gamma: 1.0 -> 0.5" in line and "another out=" in line
    assert (out / "summary.json").read_bytes() == before
    harmless = tiny_overrides(data, out, log__every_steps=2, checkpoint__keep=3, loader__num_workers=1)
    assert server.run(harmless, log) == 0, log.read_text()


def test_other_data_is_refused(server: ForkServer, data: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    assert server.run(tiny_overrides(data, out), log) == 0
    assert "started with 48" in refused(server, tiny_overrides(draw_images(tmp_path / "d", 50), out), log, 3)


def test_a_batch_larger_than_the_data(server: ForkServer, data: Path, tmp_path: Path) -> None:
    line = refused(server, tiny_overrides(data, tmp_path / "out", batch_size=64), tmp_path / "log", 2)
    assert "batch_size=64: more than the 48 images" in line


def test_a_second_run_into_the_same_out_names_the_first(server: ForkServer, data: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    first = server.start(tiny_overrides(data, out, epochs=4000), tmp_path / "first")
    (pid,) = first.pids
    try:
        deadline = time.monotonic() + 20
        while not (out / "checkpoints").is_dir() or not list((out / "checkpoints").glob("step_*")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert f"in use by pid {pid} on " in refused(server, tiny_overrides(data, out, epochs=4000), log, 6)
        os.kill(pid, signal.SIGTERM)
        assert server.wait(first) == 75
        assert "the same command goes on" in (tmp_path / "first").read_text()
    finally:
        kill(pid)


def command(arguments: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "tools.cli", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        **options,
    )


def test_a_full_disk_ends_with_its_code_and_the_run_goes_on_later(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    overrides = tiny_overrides(data, out)

    def limit() -> None:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (20_000, 20_000)
        )  # no file may grow beyond: what a full disk looks like

    ended = command(["pretrain", *overrides], preexec_fn=limit)
    assert ended.returncode == 6, ended.stderr
    assert ended.stderr.count("error:") == 1 and "disk full" in ended.stderr and "Traceback" not in ended.stderr
    assert list((out / "checkpoints").iterdir()) == []
    assert not (out / "summary.json").exists() and not (out / "backbone").exists()
    again = command(["pretrain", *overrides])
    assert again.returncode == 0, again.stderr


def broken_folder(folder: Path) -> Path:
    """Ten odd files of the kind that folders of photographs hold."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    photo.save(folder / "whole.jpg")
    data = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    (folder / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not a picture at all\n")
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray((np.arange(1600).reshape(40, 40) * 40).astype(np.uint16)).save(folder / "sixteen.png")
    photo.save(folder / "flipped.png")
    png = bytearray((folder / "flipped.png").read_bytes())
    png[len(png) // 2] ^= 0x40
    (folder / "flipped.png").write_bytes(bytes(png))
    write_bomb(folder / "bomb.png", 20_000)
    photo.save(folder / "animated.gif", save_all=True, append_images=[photo.rotate(90)] * 2)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(folder / "turned.jpg", exif=exif)
    Image.new("RGB", (1, 1), "red").save(folder / "dot.png")
    return folder


def write_bomb(path: Path, side: int) -> None:
    """A black PNG of side x side pixels in a few hundred kilobytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(bytes(1 + 3 * side)) for _ in range(side)) + packer.flush()
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b""))


def test_a_folder_of_broken_images_trains_and_says_what_was_replaced(server: ForkServer, tmp_path: Path) -> None:
    folder, out, log = broken_folder(tmp_path / "odd"), tmp_path / "out", tmp_path / "log"
    overrides = tiny_overrides(folder, out, batch_size=5, loader__max_broken_share=0.6)
    assert server.run(overrides, log) == 0, log.read_text()
    broken = json.loads((out / "summary.json").read_text())["broken_images"]
    assert set(broken) == {"truncated.jpg", "empty.jpg", "text.jpg", "flipped.png", "bomb.png"}
    assert broken["empty.jpg"] == "empty file"
    assert "not an image" in broken["text.jpg"]
    assert "over the limit of 64 megapixels" in broken["bomb.png"]
    assert "broken image" in broken["truncated.jpg"] and "broken image" in broken["flipped.png"]
    for name in broken:
        assert sum(f"replaced {name}:" in line for line in log.read_text().splitlines()) == 1
    assert "5 broken images were replaced" in log.read_text()


def test_too_many_broken_images_stop_the_run(server: ForkServer, tmp_path: Path) -> None:
    folder, out = broken_folder(tmp_path / "odd"), tmp_path / "out"
    line = refused(server, tiny_overrides(folder, out, batch_size=5), tmp_path / "log", 3)
    assert "loader.max_broken_share" in line


def test_workers_change_nothing(server: ForkServer, data: Path, tmp_path: Path) -> None:
    digests = []
    for workers in (0, 1, 2):
        out = tmp_path / str(workers)
        assert server.run(tiny_overrides(data, out, loader__num_workers=workers), tmp_path / "log") == 0
        digests.append(json.loads((out / "summary.json").read_text())["digest"])
    assert len(set(digests)) == 1


def test_accumulation_changes_nothing_beyond_rounding(server: ForkServer, data: Path, tmp_path: Path) -> None:
    from core.checkpoint import read_checkpoint

    students = []
    for accumulation in (1, 2, 4):
        out = tmp_path / str(accumulation)
        assert server.run(tiny_overrides(data, out, engine__accumulation=accumulation), tmp_path / "log") == 0
        students.append(read_checkpoint(out / "checkpoints" / "step_0000006").tensors)
    for other in students[1:]:
        for branch in ("student", "teacher"):
            for name, tensor in students[0][branch].items():
                # The key part of a qkv bias has no gradient but rounding, which AdamW turns into steps of full size.
                keep = (
                    slice(None)
                    if not name.endswith("qkv.bias")
                    else [*range(len(tensor) // 3), *range(-len(tensor) // 3, 0)]
                )
                difference = (other[branch][name][keep] - tensor[keep]).abs().max()
                assert difference < 1e-5, (branch, name, difference)


def test_mae_and_the_options_of_the_teacher_run(server: ForkServer, data: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    variants = {
        "mae": tiny_overrides(data, tmp_path / "mae", method="mae", momentum=0.996),
        "own": tiny_overrides(data, tmp_path / "own", teacher__mask="own", teacher__schedule="cosine"),
        "micro": tiny_overrides(data, tmp_path / "micro", teacher__update="micro_batch", engine__accumulation=2),
        "grey": [
            *tiny_overrides(data, tmp_path / "grey"),
            "vit.in_chans=1",
            "mean=[0.5]",
            "std=[0.25]",
            "img_size=[16,24]",
        ],
    }
    for name, overrides in variants.items():
        assert server.run(overrides, log) == 0, log.read_text()
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert ("train/consistency" in summary["figures"]) == (name != "mae")


def test_what_a_run_leaves_behind(server: ForkServer, data: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    overrides = [*tiny_overrides(data, out, log__curves=True, log__tensorboard=True), f"probe.data={data}"]
    assert server.run(overrides, log) == 0, log.read_text()
    for name in ("config.yaml", "env.json", "train.log", "metrics.jsonl", "summary.json", "curves.png"):
        assert (out / name).stat().st_size > 100, name
    assert sorted(p.name for p in (out / "backbone").iterdir()) == ["config.json", "model.safetensors"]
    assert len(list((out / "pictures").glob("reconstructions_*.png"))) == 2
    assert list(out.glob("events.out.tfevents.*"))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"probe/knn_top1_pct", "probe/knn_top5_pct"} <= set(rows[0]) and rows[0]["step"] == 0
    assert {"epoch", "train/loss", "train/lr", "speed/images_per_s", "speed/data_wait_pct"} <= set(rows[1])
    summary = json.loads((out / "summary.json").read_text())
    assert {"digest", "config", "seed", "git_commit", "images", "flags"} <= set(summary)
    header = log.read_text()
    assert "effective 16 = 16 per process x 1 process x 1 accumulated" in header
    assert "2 epochs x 3 steps = 6 steps, 0 images left out" in header


def test_dry_run_writes_nothing_and_shows_the_arithmetic(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = command(["pretrain", *tiny_overrides(data, out), "--dry-run"])
    assert ended.returncode == 0, ended.stderr
    for text in ("batch_size: 16", "effective 16 =", "GFLOP per image", "GiB memory", "MiB disk"):
        assert text in ended.stdout, text
    assert not out.exists()


def test_usage_errors_have_one_line_each_and_code_2(tmp_path: Path) -> None:
    ended = command(["pretrain", "gama=1", "epochs=x", "data=d", f"out={tmp_path / 'out'}"])
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == [
        'error: command line: epochs: expected a valid integer, got "x"',
        "error: command line: gama: unknown key; did you mean 'gamma'?",
    ]
    ended = command(["pretrian"])
    assert ended.returncode == 2 and "No such command" in ended.stderr and "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()


def test_help_is_quick_and_does_not_import_torch() -> None:
    code = (
        "import sys; sys.argv = ['rcmae', '--help']; from tools.cli import main\n"
        "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "pretrain" in ended.stdout
