"""Kill real runs and start them again: a fork server that has torch imported, and a file layer that dies at any point.

`ForkServer` is a process that forks a child per run, so that a kill and a restart cost a fraction of a second.
`CrashingFileSystem` sends SIGKILL to its own process at the n-th of the points that it passes.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from core.files import FileSystem
from core.worker import end_with_parent

ROOT = Path(__file__).resolve().parent.parent


class CrashingFileSystem(FileSystem):
    """Dies at point number `crash_at` (1-based); else only counts. Points lie before, inside and after each call."""

    def __init__(self, crash_at: int | None = None) -> None:
        self.crash_at = crash_at
        self.points = 0

    def _point(self) -> None:
        self.points += 1
        if self.points == self.crash_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def make_dir(self, path: Path) -> None:
        self._point()
        super().make_dir(path)
        self._point()

    def write(self, path: Path, data: bytes) -> None:
        self._point()
        if self.points + 1 == self.crash_at:
            path.write_bytes(data[: len(data) // 2])  # what a crash in the middle leaves
        self._point()
        super().write(path, data)
        self._point()

    def sync_dir(self, path: Path) -> None:
        self._point()
        super().sync_dir(path)

    def rename(self, source: Path, target: Path) -> None:
        self._point()
        super().rename(source, target)
        self._point()

    def remove_tree(self, path: Path) -> None:
        self._point()
        if self.points + 1 == self.crash_at:
            next(path.iterdir()).unlink()
        self._point()
        super().remove_tree(path)
        self._point()


class FullFileSystem(FileSystem):
    """A disk with so many bytes left for what is written; `honest` tells whether it admits that beforehand."""

    def __init__(self, room_bytes: int, honest: bool) -> None:
        self.room_bytes, self.honest = room_bytes, honest

    def write(self, path: Path, data: bytes) -> None:
        if len(data) > self.room_bytes:
            path.write_bytes(data[: self.room_bytes])
            raise OSError(28, "No space left on device", str(path))
        self.room_bytes -= len(data)
        super().write(path, data)

    def free_bytes(self, path: Path) -> int:
        return self.room_bytes if self.honest else super().free_bytes(path)


class Run(NamedTuple):
    """A started run."""

    pids: list[int]  # of its processes, by rank
    group: int  # process group of all of them and their loader workers


class ForkServer:
    """Starts pretraining runs of one or several processes quickly. Use as a context manager."""

    def __enter__(self) -> "ForkServer":
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.harness"], cwd=ROOT, env=environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._receive() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=20)

    def start(
        self, overrides: list[str], log: Path, crash_at: int | None = None, size: int = 1, fault: str | None = None,
        faulty_rank: int = 0, stage: str = "pretrain",
    ) -> Run:  # fmt: skip
        """Fork a run of `size` processes.

        Args:
            crash_at: point of the checkpoint writer at which the first process kills itself.
            fault: name of a fault in `tests/faults.py` that is planted into the program.
            faulty_rank: the process that it is planted into; -1 for all.
        """
        message = {
            "overrides": overrides, "log": str(log), "crash_at": crash_at, "size": size, "port": free_port(),
            "fault": fault, "faulty_rank": faulty_rank, "stage": stage,
        }  # fmt: skip
        self._send({"start": message})
        return Run(*json.loads(self._receive()))

    def wait(self, run: Run) -> int:
        """Exit code of a run, negative for the signal that ended it: the first that is not 0, by rank."""
        return next((code for code in self.wait_all(run) if code), 0)

    def wait_all(self, run: Run) -> list[int]:
        """Exit codes by rank. Fails if a process of the run is left five seconds later."""
        self._send({"wait": run.pids})
        codes = json.loads(self._receive())
        assert_nobody_left(run.group)
        return codes

    def run(
        self, overrides: list[str], log: Path, crash_at: int | None = None, size: int = 1, stage: str = "pretrain"
    ) -> int:
        """Start a run and wait for its end."""
        return self.wait(self.start(overrides, log, crash_at, size, stage=stage))

    def _send(self, message: dict[str, Any]) -> None:
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _receive(self) -> str:
        return self._process.stdout.readline().strip()


class Started:
    """A command that was started, and all the processes that came of it."""

    def __init__(self, arguments: list[str], module: str = "tools.cli") -> None:
        self.mark = uuid.uuid4().hex
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RCMAE_TEST": self.mark}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def family(self) -> list[int]:
        """Process ids of all that are alive."""
        mark = f"RCMAE_TEST={self.mark}".encode()
        return living(lambda pid: mark in Path(f"/proc/{pid}/environ").read_bytes())

    def workers(self) -> dict[int, int]:
        """Process id by rank."""
        found: dict[int, dict[int, int]] = {}  # parent -> rank -> process id
        for pid in self.family():
            with contextlib.suppress(OSError):
                variables = dict(
                    item.split(b"=", 1) for item in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if item
                )
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                if b"RANK" in variables:
                    found.setdefault(parent, {})[int(variables[b"RANK"])] = pid
        # Loader workers are children of workers, and have their environment.
        workers = {pid for ranks in found.values() for pid in ranks.values()}
        return {rank: pid for parent, ranks in found.items() if parent not in workers for rank, pid in ranks.items()}

    def agent(self) -> int:
        """Process id of torchrun's agent."""
        others = set(self.family()) - {self.process.pid} - set(self.workers().values())
        return next(pid for pid in others if b"tools.launch" in Path(f"/proc/{pid}/cmdline").read_bytes())

    def end(self, patience_s: float = 120) -> tuple[int, str, str]:
        """Exit code, stdout and stderr; fails if anything of it lives on."""
        out, err = self.process.communicate(timeout=patience_s)
        self.assert_nobody_left()
        return self.process.returncode, out, err

    def assert_nobody_left(self) -> None:
        """Fail if a process is alive after five seconds."""
        deadline = time.monotonic() + 5
        while (left := self.family()) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left:
            kill(pid)
        assert not left, f"orphans: {left}"


@contextlib.contextmanager
def started(arguments: list[str], module: str = "tools.cli") -> Iterator[Started]:
    run = Started(arguments, module)
    try:
        yield run
    finally:
        for pid in run.family():
            kill(pid)
        run.process.wait()


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def kill_after(
    server: ForkServer, overrides: list[str], log: Path, seconds: float, size: int = 1, rank: int = 0,
    stage: str = "pretrain",
) -> int:  # fmt: skip
    """Start a run, SIGKILL one process of it after so many seconds, and return that one's exit code."""
    run = server.start(overrides, log, size=size, stage=stage)
    time.sleep(seconds)
    kill(run.pids[rank])
    return server.wait_all(run)[rank]


def kill(pid: int) -> None:
    """SIGKILL, unless it is over already."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def assert_nobody_left(group: int, patience_s: float = 5.0) -> None:
    """Fail if a process of a group is alive after so many seconds; and end it."""
    deadline = time.monotonic() + patience_s
    while (left := living(lambda pid: os.getpgid(pid) == group)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        kill(pid)
    assert not left, f"orphans: {left}"


def living(belongs: Callable[[int], bool]) -> list[int]:
    """Processes of this machine that are no zombies and of which `belongs` holds."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z" and belongs(int(folder.name)):
                found.append(int(folder.name))
    return found


def fresh(path: Path) -> Path:
    """An absent path, whatever was there."""
    shutil.rmtree(path, ignore_errors=True)
    return path


def _pretrain(overrides: list[str], fs: FileSystem) -> None:
    from core.config import load_config
    from pretrain.run import pretrain
    from pretrain.settings import PretrainConfig

    pretrain(load_config(PretrainConfig, None, overrides), fs=fs)


def _classify(overrides: list[str], fs: FileSystem) -> None:
    from core.config import load_config
    from transfer.classification.run import classify
    from transfer.classification.settings import ClassifyConfig

    classify(load_config(ClassifyConfig, None, overrides), fs=fs)


def _detect(overrides: list[str], fs: FileSystem) -> None:
    from core.config import load_config
    from transfer.detection.run import detect
    from transfer.detection.settings import DetectConfig

    detect(load_config(DetectConfig, None, overrides), fs=fs)


def _evaluate_detector(overrides: list[str], fs: FileSystem) -> None:
    from core.config import load_config
    from transfer.detection.run import evaluate_detector
    from transfer.detection.settings import DetectConfig

    evaluate_detector(load_config(DetectConfig, None, overrides))


def _segment(overrides: list[str], fs: FileSystem) -> None:
    from core.config import load_config
    from transfer.segmentation.run import segment
    from transfer.segmentation.settings import SegmentConfig

    segment(load_config(SegmentConfig, None, overrides), fs=fs)


def _evaluate_segmentor(overrides: list[str], fs: FileSystem) -> None:
    from core.config import load_config
    from transfer.segmentation.run import evaluate_segmentor
    from transfer.segmentation.settings import SegmentConfig

    evaluate_segmentor(load_config(SegmentConfig, None, overrides))


def _robust(overrides: list[str], fs: FileSystem) -> None:
    from core.config import load_config
    from robustness.run import robust
    from robustness.settings import RobustConfig

    robust(load_config(RobustConfig, None, overrides), fs=fs)


def _cli(arguments: list[str], fs: FileSystem) -> int:
    from tools.cli import app

    return app(arguments, standalone_mode=False) or 0


STAGES = {  # what can be killed, by its verb
    "pretrain": _pretrain,
    "classify": _classify,
    "detect": _detect,
    "detect --eval": _evaluate_detector,
    "segment": _segment,
    "segment --eval": _evaluate_segmentor,
    "robust": _robust,
    "cli": _cli,  # any command as it is typed, its verb first
}


def _run(message: dict[str, Any], rank: int) -> int:
    from tests.faults import plant

    if message["size"] > 1:
        place = {"RANK": rank, "WORLD_SIZE": message["size"], "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": message["size"]}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": message["port"]}
        os.environ |= {key: str(value) for key, value in (place | where).items()}
    if message["fault"] and message["faulty_rank"] in (rank, -1):
        plant(message["fault"])
    from tools.cli import guarded

    fs = CrashingFileSystem(message["crash_at"])
    code = guarded(lambda: STAGES[message["stage"]](message["overrides"], fs))
    if rank == 0:
        Path(message["log"] + ".points").write_text(str(fs.points))
    return code


def _serve() -> None:
    import pretrain.run  # noqa: F401  imported once here, not in every child
    import robustness.run  # noqa: F401
    import tests.faults  # noqa: F401
    import transfer.classification.run
    import transfer.detection.run
    import transfer.segmentation.run  # noqa: F401

    say = os.fdopen(os.dup(1), "w")
    print("ready", file=say, flush=True)
    for line in sys.stdin:
        message = json.loads(line)
        if "wait" in message:
            print(json.dumps(_wait_as_torchrun(message["wait"])), file=say, flush=True)
            continue
        pids: list[int] = []
        for rank in range(message["start"]["size"]):
            pids.append(_fork(message["start"], rank, pids[0] if pids else None))
        print(json.dumps([pids, pids[0]]), file=say, flush=True)


def _wait_as_torchrun(pids: list[int], patience_s: float = 30) -> list[int]:
    """Exit codes; when one has failed the others have so long, as torchrun's workers have, and are killed then."""
    codes: dict[int, int] = {}
    deadline = float("inf")
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                deadline = min(deadline, time.monotonic() + patience_s if codes[pid] else deadline)
        if time.monotonic() > deadline:
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[pid] for pid in pids]


def _fork(message: dict[str, Any], rank: int, group: int | None) -> int:
    ready, done = os.pipe()
    pid = os.fork()
    if pid:
        os.close(done)
        os.read(ready, 1)  # the process group exists
        os.close(ready)
        return pid
    os.close(ready)
    end_with_parent()
    os.setpgid(0, group or 0)
    os.close(done)
    log = os.open(message["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(0)
    os._exit(_run(message, rank))


if __name__ == "__main__":
    _serve()
