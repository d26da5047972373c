"""What the machine offers to a run: GPU, cores, memory, shared memory, file descriptors, a clock."""

import os
import re
import resource
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from core.distributed import Processes
from core.errors import MachineError, shown
from core.files import FileSystem
from core.loader import PREFETCHED
from core.machine import available_bytes, choose_device
from core.start import PROGRAM_BYTES, choose_workers
from tools.doctor_report import DoctorConfig, Found

DRIVER = Path("/proc/driver/nvidia/version")  # there with the kernel's driver, in containers too
DEVICES = Path("/dev")  # nvidia0, nvidia1, ... are there where this process may use a GPU
SHARED = Path("/dev/shm")  # noqa: S108  where torch's loader workers put their batches
CGROUP = Path("/sys/fs/cgroup")
PLAIN_BATCH_BYTES = 64 * 3 * 224**2  # a micro-batch of 64 images, as loader workers hand them over
DESCRIPTORS = 1024  # open files: workers hand over each tensor as one
CPU = torch.device("cpu")


def gpu(config: DoctorConfig) -> Iterator[Found]:
    """Each GPU with what it can do, computed on; or why there is none. A GPU that torch cannot use is a fault."""
    driver = re.search(r"Module.*?\s([0-9]+(?:\.[0-9]+)+)", DRIVER.read_text()) if DRIVER.exists() else None
    beside = f"NVIDIA driver {driver[1]}" if driver else "no NVIDIA driver"
    there = any(DEVICES.glob("nvidia[0-9]*"))
    if torch.version.cuda is None:
        how = "; make venv installs a torch that computes on both" if there else ""
        yield Found("fault" if there else "note", f"torch {torch.__version__} computes on the CPU alone; {beside}{how}")
        return
    with warnings.catch_warnings(record=True) as warned:  # an old driver is no error of torch's, but a warning
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        for index in range(torch.cuda.device_count()):
            yield Found("ok", f"{_computed_on(index)}; {beside}, torch for CUDA {torch.version.cuda}")
        return
    why = _why_none() or (str(warned[0].message) if warned else "torch finds no device")
    told = f"none: {shown(why)}; {beside}, torch for CUDA {torch.version.cuda}"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        yield Found("note", f"{told}; CUDA_VISIBLE_DEVICES={shown(hidden)} chooses among those that there are")
    elif there:
        raise MachineError(f"{told}; install the driver that this CUDA needs, or the torch of an older CUDA")
    else:
        yield Found("note", f"{told}; everything runs on the CPU")


def _why_none() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).partition(". Please")[0].splitlines()[0]
    return ""


def _computed_on(index: int) -> str:
    """One GPU in words, after a bf16 product on it. Raises: MachineError where that fails or is wrong."""
    of = torch.cuda.get_device_properties(index)
    name = f"{index}: {shown(of.name)}, capability {of.major}.{of.minor}"
    free, total = torch.cuda.mem_get_info(index)
    ones = torch.ones(64, 64, dtype=torch.bfloat16, device=f"cuda:{index}")
    try:
        entry = (ones @ ones)[0, 0].item()
    except RuntimeError as error:
        raise MachineError(
            f"{name}: computes nothing ({shown(str(error).splitlines()[0])}); install a torch that is built for it "
            f"(this one: {' '.join(torch.cuda.get_arch_list())}), or give device=cpu"
        ) from None
    if entry != 64:
        raise MachineError(f"{name}: a product of ones gave {entry}, not 64; the GPU is broken, leave it out")
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = "bf16" if native else "bf16 emulated and slow, give engine.precision=fp32"
    return f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, {bf16}"


def cores(config: DoctorConfig) -> Iterator[Found]:
    """Cores that there are and that this process may use, and torch's threads on them."""
    there, usable, threads = os.cpu_count() or 1, _usable_cores(), torch.get_num_threads()
    told = f"{usable:g} of {there} usable, {threads} threads, {torch.backends.cpu.get_cpu_capability()}"
    if usable < there:
        most = max(1, int(usable))
        told += f"; loader workers are counted by all of them, so give loader.num_workers={max(1, most // 2)}"
        told += f" and OMP_NUM_THREADS={most}" if threads > usable else ""
        yield Found("note", told)
    elif threads < usable / 2:
        yield Found("note", f"{told}; OMP_NUM_THREADS or MKL_NUM_THREADS keeps the others idle")
    else:
        yield Found("ok", told)


def _usable_cores() -> float:
    """Cores by affinity and by a container's quota."""
    usable = float(len(os.sched_getaffinity(0)))
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        return min(usable, int(quota) / int(period))
    except (OSError, ValueError):  # no file, or "max"
        return usable


def memory(config: DoctorConfig) -> Iterator[Found]:
    """Memory that may be taken; a container's limit is not what the suite reckons with."""
    free = available_bytes(CPU)
    limit = _memory_limit()
    told = f"{free / 2**30:.1f} GiB available"
    if limit is not None and limit < free:
        yield Found(
            "note",
            f"{told}, but this container may have {limit / 2**30:.1f} GiB in all; batches are planned by the former: "
            "give engine.accumulation",
        )
    elif free < 2 * PROGRAM_BYTES:
        raise MachineError(f"{told}: imported libraries alone take {PROGRAM_BYTES / 2**30:.1f}; end other programs")
    else:
        yield Found("ok", told)


def _memory_limit() -> int | None:
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroups' version 2 and 1
        try:
            return int((CGROUP / name).read_text())
        except (OSError, ValueError):  # no file, or "max"
            continue
    return None


def shared_memory(config: DoctorConfig) -> Iterator[Found]:
    """Whether the batches of all loader workers fit into shared memory: short of it they die by a bus error."""
    workers = choose_workers(config.loader, choose_device("auto"), Processes())
    needed = workers * PREFETCHED * PLAIN_BATCH_BYTES
    free = FileSystem().free_bytes(SHARED)
    told = f"{free / 2**20:.0f} MiB free in {SHARED}; loader.num_workers={workers} fills up to {needed / 2**20:.0f} MiB"
    if free < needed:
        raise MachineError(
            f"{told} (64 images of 224 px a batch) and would die by a bus error; docker run --shm-size=8g or "
            f"--ipc=host, mount -o remount,size=8g {SHARED}, or loader.num_workers=0"
        )
    yield Found("ok", told)


def descriptors(config: DoctorConfig) -> Iterator[Found]:
    """How many files may be open at once."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= DESCRIPTORS:
        yield Found("ok", f"{'any number of' if limit == resource.RLIM_INFINITY else limit} files may be open at once")
        return
    how = (
        f"ulimit -n {DESCRIPTORS}" if most == resource.RLIM_INFINITY or most >= DESCRIPTORS else "raise the hard limit"
    )
    yield Found("note", f"{limit} files may be open at once; many loader workers need more: {how}")


def clock(config: DoctorConfig) -> Iterator[Found]:
    """The time of day, which logs, summaries and reports are dated by."""
    told = time.strftime("%F %T %z")
    newest = max(path.stat().st_mtime for path in Path(__file__).parent.glob("*.py"))
    if newest > time.time() + 60:
        yield Found("note", f"{told}, before this program was written; set the clock, it dates every run")
    else:
        yield Found("ok", told)
