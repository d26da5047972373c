"""Whether this installation works, tried rather than believed: one line per check, and how to mend what is at fault.

Libraries are compared with what pyproject.toml asks for, images are decoded and loader workers started as training does
it, and files are written as checkpoints are.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import os
import platform
import shutil
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from PIL import Image
from rich.console import Console
from rich.text import Text

from core.checkpoint import CheckpointConfig
from core.datasets import open_images
from core.distributed import Processes
from core.errors import MachineError, RcmaeError, machine_error, shown
from core.files import FileSystem, RunLock, replace_dir
from core.images import BadImage, decode
from core.loader import EpochOrder, TrainingImages, image_loader, worker_faults
from core.machine import choose_device, git_commit
from core.start import choose_workers
from core.transforms import AugmentConfig
from pretrain.cost import checkpoint_bytes
from pretrain.data import PrepareSample, collate
from pretrain.presets import preset
from robustness.corruptions.textures import INSTALL, load_textures
from tools.doctor_machine import clock, cores, descriptors, gpu, memory, shared_memory
from tools.doctor_report import DoctorConfig, Found, print_found

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
COMPILED = ("cv2", "pycocotools.mask", "faster_coco_eval", "shapely", "safetensors.torch", "timm", "torchvision.ops")
EXTRAS = {  # what may be there, and for what
    "wandb": "log.wandb_project",
    "detectron2": "framework=detectron2",
    "mmsegmentation": "framework=mmseg",
}
MEND = "make venv sets it up"
SIZE = (375, 500)  # height and width of the photograph that is decoded, about ImageNet's mean
MAX_OFF = 6.0  # levels of 255 that JPEG costs on average; under 3 where all is well
DECODE_S = 0.3  # for which it is decoded again and again
LOADED, BATCH = 32, 8  # images that the loader is tried with
SKEW_S = 5.0  # between this clock and a disk's

Check = Callable[[DoctorConfig], Iterable[Found]]


def examine_installation(config: DoctorConfig, console: Console) -> int:
    """Make every check, print a line for each, and say whether all works.

    Returns: 0 if it does, else the exit code of the first fault.
    """
    codes = []
    for name, check in CHECKS.items():
        for found in _findings(check, config):
            print_found(console, name, found)
            codes += [found.code] if found.state == "fault" else []
    faults = f"{len(codes)} {'fault' if len(codes) == 1 else 'faults'}; each line says how to mend it"
    console.print(Text(faults, style="bold red") if codes else Text("this installation works", style="bold green"))
    return codes[0] if codes else 0


def _findings(check: Check, config: DoctorConfig) -> Iterator[Found]:
    """What a check says, line by line; what it raises is a fault."""
    try:
        yield from check(config)
    except RcmaeError as error:
        yield Found("fault", " ".join(str(error).splitlines()), error.exit_code)
    except OSError as error:
        yield Found("fault", str(machine_error(error)))
    except Exception as error:  # a broken library raises anything
        yield Found("fault", f"{type(error).__name__}: {shown(str(error))[:300]}; {MEND} anew")


def _code(config: DoctorConfig) -> Iterator[Found]:
    """What figures of this installation are traced to."""
    commit = git_commit()
    if commit is None:
        yield Found("note", "no git clone, or no git: runs do not record their commit")
    elif commit.endswith("+"):
        yield Found("note", f"commit {commit[:-1]} with changes; runs record it with a +")
    else:
        yield Found("ok", f"commit {commit}")


def _python(config: DoctorConfig) -> Iterator[Found]:
    """Python and its system, against pyproject.toml."""
    asked = SpecifierSet(_project()["requires-python"])
    told = f"{platform.python_version()} on {platform.system()} {platform.machine()}; asked for is {asked}"
    if platform.python_version() not in asked or platform.system() != "Linux":
        raise MachineError(f"{told}, on Linux; make venv PYTHON=python3.11")
    yield Found("ok", told)


def _packages(config: DoctorConfig) -> Iterator[Found]:
    """Every dependency of pyproject.toml at least as new as it asks; each that is not is a fault."""
    fine = []
    for text in _project()["dependencies"]:
        asked = Requirement(text)
        version = _installed(asked.name)
        if version is None or not asked.specifier.contains(version, prereleases=True):
            has = f"is {version}" if version else "is not installed"
            yield Found("fault", f"{asked.name} {has}; asked for is {asked.specifier}; {MEND} in .venv")
        else:
            fine.append(f"{asked.name} {version}")
    yield Found("ok", ", ".join(fine))


def _libraries(config: DoctorConfig) -> Iterator[Found]:
    """Compiled libraries fit to each other: imported, and torchvision's operators called."""
    for name in COMPILED:
        importlib.import_module(name)
    from torchvision.ops import batched_nms, roi_align

    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.9]])
    kept = batched_nms(boxes, torch.tensor([0.5, 0.9]), torch.zeros(2), 0.5)
    pooled = roi_align(torch.ones(1, 1, 8, 8), [boxes], 2)
    if kept.tolist() != [1] or not torch.equal(pooled, torch.ones(2, 1, 2, 2)):
        raise MachineError(f"torchvision's operators compute something else than they should; {MEND} anew")
    yield Found("ok", f"{', '.join(name.partition('.')[0] for name in COMPILED)} load and fit to each other")


def _project() -> dict[str, Any]:
    if not PROJECT.is_file():
        raise MachineError(f"{shown(PROJECT)}: missing, so that versions cannot be compared; install from a clone")
    return tomllib.loads(PROJECT.read_text())["project"]


def _installed(name: str) -> str | None:
    """The version of a distribution; None where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _decoding(config: DoctorConfig) -> Iterator[Found]:
    """A JPEG, a PNG and a truncated file as training reads them, and how fast that is."""
    pixels, files = _photograph()
    decoded = {}
    for kind, data in files.items():
        try:
            decoded[kind] = decode(data).permute(1, 2, 0).numpy().astype(np.int16)  # [H, W, 3]
        except BadImage as reason:
            raise MachineError(f"a whole {kind} is not decoded: {reason}; {MEND} anew") from None
    off = {kind: float(np.abs(image - pixels).mean()) for kind, image in decoded.items()}
    if off["PNG"] != 0 or off["JPEG"] > MAX_OFF:
        raise MachineError(
            f"decoders give other pixels, PNG by {off['PNG']:.1f} and JPEG by {off['JPEG']:.1f} of 255 on average; "
            f"{MEND} anew"
        )
    try:
        decode(files["JPEG"][: len(files["JPEG"]) // 2])
    except BadImage:
        pass
    else:
        raise MachineError(f"half a JPEG is taken for a whole one; {MEND} anew")
    start, count = time.perf_counter(), 0
    while time.perf_counter() < start + DECODE_S:
        decode(files["JPEG"])
        count += 1
    rate = count / (time.perf_counter() - start)
    yield Found(
        "ok", f"JPEG and PNG decoded, half a file refused; {rate:.0f} JPEGs of {SIZE[1]}x{SIZE[0]} px a second and core"
    )


def _photograph() -> tuple[np.ndarray, dict[str, bytes]]:
    """Colours as smooth and as rough as a photograph's, int16 [H, W, 3], and as the bytes of files by format."""
    y, x = np.mgrid[0 : SIZE[0], 0 : SIZE[1]]
    waves = np.stack([np.sin(x / 37 + k) + np.cos(y / 29 + 2 * k) for k in range(3)], axis=-1)  # [H, W, 3]
    rough = np.random.default_rng(0).normal(0, 5, (*SIZE, 1))  # [H, W, 1]
    pixels = (127.5 + 45 * waves + rough).clip(0, 255).astype(np.uint8)
    files = {}
    for kind in ("JPEG", "PNG"):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, kind, quality=90)
        files[kind] = buffer.getvalue()
    return pixels.astype(np.int16), files


def _workers(config: DoctorConfig) -> Iterator[Found]:
    """Loader workers started once, on whole files and a broken one: the same batches as without them."""
    workers = choose_workers(config.loader, choose_device("auto"), Processes())
    _, files = _photograph()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(LOADED):
            half = len(files["JPEG"]) // 2 if number == 0 else None
            (Path(folder) / f"{number}.jpg").write_bytes(files["JPEG"][:half])
        prepare = PrepareSample((224, 224), 196, AugmentConfig(), own_teacher_mask=False)
        images = TrainingImages(open_images(folder, config.cache), 0, prepare)
        order = EpochOrder(LOADED, BATCH, BATCH, 0, 0, LOADED // BATCH)
        alone = list(image_loader(images, order, collate, 0, config.loader.timeout_s))
        start = time.perf_counter()
        with worker_faults():
            shared = list(image_loader(images, order, collate, workers, config.loader.timeout_s))
        took = time.perf_counter() - start
    same = all(torch.equal(a.batch.images, b.batch.images) for a, b in zip(alone, shared, strict=True))
    if not same or sum(len(loaded.broken) for loaded in shared) == 0:
        raise MachineError(f"loader.num_workers={workers} gave other batches than none; {MEND} anew")
    started = f"loader.num_workers={workers}: {LOADED} images, a broken one replaced"
    yield Found("ok", f"{started}, in {took:.2f} s with the start of the workers")


def _output(config: DoctorConfig) -> Iterator[Found]:
    """A durable write where runs go, and room for checkpoints there."""
    folder = config.out or Path("runs")
    took, skew = _written_durably(folder, "out")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = FileSystem().free_bytes(existing)
    vit, decoder = preset("base")
    needed = (CheckpointConfig().keep + 1) * checkpoint_bytes(vit, decoder, with_teacher=True)
    told = f"{shown(folder)}: written durably in {1000 * took:.0f} ms, {free / 2**30:.1f} GiB free"
    if abs(skew) > SKEW_S:
        yield Found("note", f"{told}; its clock is {skew:+.0f} s from this machine's, so dates of files mislead")
    elif free < needed:
        yield Found("note", f"{told}; checkpoints of a RC-MAE ViT-B take up to {needed / 2**30:.1f}")
    else:
        yield Found("ok", told)


def _cache(config: DoctorConfig) -> Iterator[Found]:
    """A durable write where compressed archives are unpacked and tars are indexed."""
    folder = config.cache.expanduser()
    took, _ = _written_durably(folder, "cache")
    yield Found("ok", f"{shown(folder)}: written durably in {1000 * took:.0f} ms")


def _written_durably(folder: Path, option: str) -> tuple[float, float]:
    """Write into a folder as a run does, lock a file there, and leave all as it was.

    Returns: seconds that the write took, seconds by which the disk's clock is ahead. Raises: MachineError.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    probe = folder / f".tmp-doctor-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        replace_dir(probe, {"probe": bytes(2**20)})
        took = time.perf_counter() - start
        skew = (probe / "probe").stat().st_mtime - time.time()
        RunLock(probe / ".lock").release()
        return took, skew
    except MachineError:
        raise MachineError(
            f"{shown(folder)}: files cannot be locked on this disk; mount it with locks, or give another {option}="
        ) from None
    except OSError as error:
        raise MachineError(
            f"{shown(folder)}: cannot be written: {error.strerror}; give a folder that can be written as {option}="
        ) from None
    finally:
        shutil.rmtree(probe, ignore_errors=True)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def _frost(config: DoctorConfig) -> Iterator[Found]:
    """The photographs of frost; without them that one corruption is refused."""
    if importlib.util.find_spec("imagecorruptions") is None:
        yield Found("note", f"no photographs for the corruption frost, which is refused without them; {INSTALL}")
    else:
        yield Found("ok", f"{len(load_textures().images)} photographs for the corruption frost")


def _extras(config: DoctorConfig) -> Iterator[Found]:
    """What may be there and need not."""
    yield Found("ok", ", ".join(f"{name} {_installed(name) or 'absent'} (for {use})" for name, use in EXTRAS.items()))


CHECKS: dict[str, Check] = {
    "code": _code,
    "python": _python,
    "packages": _packages,
    "libraries": _libraries,
    "gpu": gpu,
    "cores": cores,
    "memory": memory,
    "shm": shared_memory,
    "files": descriptors,
    "decoding": _decoding,
    "workers": _workers,
    "out": _output,
    "cache": _cache,
    "frost": _frost,
    "extras": _extras,
    "clock": clock,
}
