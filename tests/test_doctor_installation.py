"""`rcmae doctor` without a data set: each fault that an installation may have is seen as its line, with its code."""

import builtins
import importlib.metadata
import io
import os
import shutil
import signal
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console
from torch.utils.data import get_worker_info
from typer.testing import CliRunner

from core import images
from core.errors import ConfigError, MachineError
from core.files import FileSystem
from robustness.corruptions import textures
from tools import doctor_installation, doctor_machine
from tools.cli import app, guarded
from tools.doctor import DoctorConfig, doctor
from tools.doctor_installation import CHECKS, examine_installation
from tools.doctor_report import Found

LAST = "this installation works"


def line(name: str, **settings: Any) -> Found:
    """What the one line of a check says."""
    (found,) = doctor_installation._findings(CHECKS[name], DoctorConfig(**settings))
    return found


def fault(name: str, **settings: Any) -> str:
    found = line(name, **settings)
    assert (found.state, found.code) == ("fault", 6) and "\n" not in found.told, found
    return found.told


# --- all of it ------------------------------------------------------------------------------------------------------


def test_this_installation_works_and_nothing_is_left_behind(tmp_path: Path) -> None:
    out, cache = tmp_path / "runs" / "deep", tmp_path / "cache"
    told = CliRunner().invoke(
        app, ["doctor", f"out={out}", f"cache={cache}", "loader.num_workers=1"], standalone_mode=False
    )
    assert told.exception is None and told.return_value == 0, told.output
    lines = told.output.splitlines()
    assert lines[-1] == LAST
    for name in CHECKS:
        assert sum(text[7:17].strip() == name for text in lines) == 1, name
    assert all(text[:5].strip() in {"ok", "note", ""} for text in lines[:-1])
    assert list(tmp_path.iterdir()) == []


def test_the_code_is_that_of_the_first_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(code: int) -> Callable[[DoctorConfig], list[Found]]:
        return lambda config: [Found("note", "n"), Found("fault", "[red]f", code)]

    monkeypatch.setattr(doctor_installation, "CHECKS", {"one": of(3), "two": of(6)})
    text = io.StringIO()
    assert examine_installation(DoctorConfig(), Console(file=text, width=100)) == 3
    assert text.getvalue().splitlines()[1].split() == ["fault", "one", "[red]f"]
    assert text.getvalue().splitlines()[-1] == "2 faults; each line says how to mend it"


def test_a_key_of_the_installation_is_none_of_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cache: has no effect on the examination of a data set"):
        doctor(DoctorConfig(data=tmp_path, cache=tmp_path))


def test_a_library_that_cannot_be_imported_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = builtins.__import__

    def without_torch(name: str, *rest: Any) -> types.ModuleType:
        if name == "tools.doctor":
            raise ImportError("libcudart.so.13: cannot open shared object file")
        return whole(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    assert guarded(lambda: app(["doctor"], standalone_mode=False)) == 6
    assert capsys.readouterr().err == (
        "error: a library cannot be imported: libcudart.so.13: cannot open shared object file; make venv sets all up in "
        ".venv\n"
    )


# --- software -------------------------------------------------------------------------------------------------------


def test_versions_too_old_or_absent_are_lines_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = importlib.metadata.version

    def version(name: str) -> str:
        if name == "timm":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"torch": "2.10.1+cu126", "numpy": "2.5.0rc1"}.get(name) or whole(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    *faults, fine = doctor_installation._findings(CHECKS["packages"], DoctorConfig())
    assert [found.told for found in faults] == [
        "torch is 2.10.1+cu126; asked for is >=2.11; make venv sets it up in .venv",
        "timm is not installed; asked for is >=1.0.20; make venv sets it up in .venv",
    ]
    assert {found.state for found in faults} == {"fault"} and {found.code for found in faults} == {6}
    assert fine.state == "ok" and "numpy 2.5.0rc1" in fine.told and "torch " not in fine.told.replace("torchvision", "")


def test_a_python_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_installation.platform, "python_version", lambda: "3.10.4")
    assert fault("python").startswith("3.10.4 on Linux") and fault("python").endswith("make venv PYTHON=python3.11")


def test_what_is_no_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor_installation, "PROJECT", tmp_path / "pyproject.toml")
    assert "versions cannot be compared" in fault("packages")
    monkeypatch.setattr(doctor_installation, "git_commit", lambda: None)
    assert line("code").state == "note"


def test_a_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert fault("libraries").startswith("ModuleNotFoundError: import of cv2 halted") and "make venv" in fault(
        "libraries"
    )


def test_operators_that_compute_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.ops

    monkeypatch.setattr(torchvision.ops, "batched_nms", lambda boxes, *rest: torch.arange(len(boxes)))
    assert "operators compute something else" in fault("libraries")


def test_frost_may_be_absent_but_not_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "imagecorruptions" / "frost").mkdir(parents=True)
    monkeypatch.setattr(textures, "_packaged", lambda: tmp_path / "imagecorruptions" / "frost")
    textures.load_textures.cache_clear()
    found = line("frost")
    assert (found.state, found.code) == ("fault", 3) and "frost1.png: missing" in found.told
    monkeypatch.setattr(doctor_installation.importlib.util, "find_spec", lambda name: None)
    found = line("frost")
    assert found.state == "note" and "pip install --no-deps imagecorruptions" in found.told


# --- reading --------------------------------------------------------------------------------------------------------


def test_a_decoder_that_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("decode_jpeg: torchvision not compiled with libjpeg support")

    monkeypatch.setattr(images, "decode_jpeg", broken)
    assert fault("decoding").startswith(
        "a whole JPEG is not decoded: broken image: decode_jpeg: torchvision not compiled"
    )


def test_a_decoder_of_other_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = images.decode_jpeg
    monkeypatch.setattr(images, "decode_jpeg", lambda *args, **kwargs: whole(*args, **kwargs).flip(0))
    assert "decoders give other pixels, PNG by 0.0 and JPEG by" in fault("decoding")


def test_a_decoder_that_takes_half_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, data = (
        images.decode_jpeg,
        torch.frombuffer(bytearray(doctor_installation._photograph()[1]["JPEG"]), dtype=torch.uint8),
    )
    monkeypatch.setattr(images, "decode_jpeg", lambda _, **kwargs: whole(data, **kwargs))
    assert fault("decoding").startswith("half a JPEG is taken for a whole one")


def test_a_loader_worker_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = doctor_installation.PrepareSample.__call__

    def deadly(self: Any, *args: Any) -> Any:
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(self, *args)

    monkeypatch.setattr(doctor_installation.PrepareSample, "__call__", deadly)
    assert fault("workers", loader={"num_workers": 1}).startswith("a loader worker died or was silent")


def test_loader_workers_that_give_other_images(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = doctor_installation.PrepareSample.__call__

    def other(self: Any, *args: Any) -> Any:
        sample = whole(self, *args)
        return sample if get_worker_info() is None else sample._replace(image=255 - sample.image)

    monkeypatch.setattr(doctor_installation.PrepareSample, "__call__", other)
    assert "gave other batches than none" in fault("workers", loader={"num_workers": 1})
    assert line("workers", loader={"num_workers": 0}).state == "ok"


# --- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["out", "cache"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, key: str) -> None:
    (tmp_path / "file").write_text("")
    told = fault(key, **{key: tmp_path / "file" / "runs"})
    assert told.endswith(f"file/runs: cannot be written: Not a directory; give a folder that can be written as {key}=")


def test_a_full_disk_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(self: FileSystem, path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(FileSystem, "write", full)
    assert "cannot be written: No space left on device" in fault("out", out=tmp_path / "new" / "runs")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_locks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_locks(path: Path) -> None:
        raise MachineError("in use by another process")

    monkeypatch.setattr(doctor_installation, "RunLock", no_locks)
    assert "files cannot be locked on this disk" in fault("out", out=tmp_path)


def test_little_room_and_another_clock_are_notes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "GiB free" in line("out", out=tmp_path).told
    monkeypatch.setattr(FileSystem, "free_bytes", lambda self, path: 2**30)
    found = line("out", out=tmp_path)
    assert found.state == "note" and "1.0 GiB free; checkpoints of a RC-MAE ViT-B take up to" in found.told
    now = time.time
    monkeypatch.setattr(doctor_installation.time, "time", lambda: now() - 3600)
    found = line("out", out=tmp_path)
    assert found.state == "note" and "its clock is +3600 s from this machine's" in found.told
    monkeypatch.setattr(doctor_machine.time, "time", lambda: 0.0)
    assert line("clock").state == "note"


# --- the machine ----------------------------------------------------------------------------------------------------


def test_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: types.SimpleNamespace(free=64 * 2**20 if path == Path("/dev/shm") else 0)
    )
    assert line("shm", loader={"num_workers": 1}).state == "ok"
    told = fault("shm", loader={"num_workers": 8})
    assert told.startswith("64 MiB free in /dev/shm; loader.num_workers=8 fills up to 294 MiB")
    assert "docker run --shm-size=8g" in told


def test_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine.resource, "getrlimit", lambda _: (256, 4096))
    assert line("files").state == "note" and line("files").told.endswith("ulimit -n 1024")


def test_limits_of_a_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor_machine, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(doctor_machine, "available_bytes", lambda device: 100 * 2**30)
    assert line("cores").state == line("memory").state == "ok"
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert line("cores").state == line("memory").state == "ok"
    (tmp_path / "cpu.max").write_text("400000 100000\n")
    (tmp_path / "memory.max").write_text(f"{8 * 2**30}\n")
    found = line("cores")
    assert found.state == "note" and found.told.startswith("4 of 64 usable, 64 threads")
    assert found.told.endswith("give loader.num_workers=2 and OMP_NUM_THREADS=4")
    assert line("memory").state == "note" and "8.0 GiB in all" in line("memory").told
    monkeypatch.setattr(doctor_machine, "available_bytes", lambda device: 2**30)
    assert "imported libraries alone take" in fault("memory")
    (tmp_path / "cpu.max").unlink()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert line("cores").state == "note" and "OMP_NUM_THREADS" in line("cores").told


class Gpu(NamedTuple):
    name: str = "NVIDIA H100"
    major: int = 9
    minor: int = 0


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for /dev and the driver's file of a machine where torch finds no GPU."""

    def no_driver() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(doctor_machine, "DEVICES", tmp_path)
    monkeypatch.setattr(doctor_machine, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", no_driver)
    return tmp_path


def test_why_there_is_no_gpu(no_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    why = "none: The NVIDIA driver on your system is too old (found version 11040); "
    found = line("gpu")
    assert found == ("note", f"{why}no NVIDIA driver, torch for CUDA 13.0; everything runs on the CPU", 6)
    (no_gpu / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27\nGCC 9.3.0\n"
    )
    (no_gpu / "nvidia0").write_text("")
    told = fault("gpu")
    assert told.startswith(
        f"{why}NVIDIA driver 470.82.01, torch for CUDA 13.0; install the driver that this CUDA needs"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert line("gpu").state == "note" and "CUDA_VISIBLE_DEVICES= chooses" in line("gpu").told
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "computes on the CPU alone" in fault("gpu") and "make venv" in fault("gpu")
    (no_gpu / "nvidia0").unlink()
    assert line("gpu").state == "note"


def test_a_gpu_is_computed_on(no_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "is_available": True, "device_count": 1, "get_device_properties": Gpu(), "mem_get_info": (70 * 2**30, 80 * 2**30),
        "get_arch_list": ["sm_80"], "is_bf16_supported": True,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device, **rest: ones(*size, **rest))
    found = line("gpu")
    assert found.state == "ok" and found.told.startswith("0: NVIDIA H100, capability 9.0, 70.0 of 80.0 GiB free, bf16;")
    monkeypatch.setattr(torch, "ones", lambda *size, device, **rest: 2 * ones(*size, **rest))
    assert "gave 256.0, not 64; the GPU is broken" in fault("gpu")

    class NoKernel:
        def __matmul__(self, other: object) -> None:
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel")

    monkeypatch.setattr(torch, "ones", lambda *_, **__: NoKernel())
    assert "computes nothing (CUDA error: no kernel image is available" in fault("gpu") and "sm_80" in fault("gpu")
