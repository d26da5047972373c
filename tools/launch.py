"""`--nproc N`: the same command on many processes, through torchrun, with the exit codes of this suite.

Three kinds of process: this launcher, which only waits, passes the first signal on and says how it ended; torchrun's
agent below it, in a session of its own; and the workers, which run the same command line. Each dies with its parent.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from core.errors import ConfigError
from core.files import replace_file
from core.worker import AGENT, REPORTS, STOP_SIGNALS, Report, end_with_parent, read_reports

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = "RCMAE_LAUNCHER"  # process id of this launcher, for the agent
HANDLED = (*STOP_SIGNALS, signal.SIGQUIT)
SHUTDOWN_TIMEOUT_S = 120  # for a last checkpoint; that of a ViT-H takes 20 s on a slow disk
FAILURES = "failures.json"


@dataclass(frozen=True)
class Launch:
    """How many processes, and where they meet."""

    nproc: int = 1  # on this machine
    nnodes: int = 1
    rdzv_endpoint: str | None = None  # HOST:PORT of one of several machines
    max_restarts: int = 3

    def __post_init__(self) -> None:
        """Raises: ConfigError for what cannot be."""
        for name, value in (("--nproc", self.nproc), ("--nnodes", self.nnodes)):
            if value < 1:
                raise ConfigError(f"{name} {value}: expected 1 or more")
        if self.max_restarts < 0:
            raise ConfigError(f"--max-restarts {self.max_restarts}: expected 0 or more")
        if self.nnodes > 1 and not self.rdzv_endpoint:
            raise ConfigError("--nnodes: needs --rdzv-endpoint HOST:PORT, the same on all of them")
        if self.rdzv_endpoint and self.nnodes == 1:
            raise ConfigError("--rdzv-endpoint: needs --nnodes, the number of machines that meet there")

    @property
    def size(self) -> int:
        """Processes in all."""
        return self.nproc * self.nnodes


def launch(plan: Launch, arguments: Sequence[str]) -> int:
    """Run the command `arguments` on many processes and wait; returns the exit code of the suite."""
    with tempfile.TemporaryDirectory(prefix="rcmae-") as folder:
        os.environ[REPORTS] = folder
        stopped: list[str] = []
        try:
            status = _run_agent(_torchrun_arguments(plan, arguments), stopped)
            code, lines = _outcome(status, stopped, read_reports(), Path(folder))
            _record(Path(folder), code, lines, stopped)
        finally:
            del os.environ[REPORTS]
    for line in lines:
        print(line, file=sys.stderr)
    return code


def _torchrun_arguments(plan: Launch, arguments: Sequence[str]) -> list[str]:
    meeting = ["--standalone"]
    if plan.nnodes > 1:
        assert plan.rdzv_endpoint is not None, "checked when the plan was made"
        # Machines of one job find each other by this id; two jobs must not meet.
        job = os.environ.get("SLURM_JOB_ID", "rcmae")
        meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={plan.rdzv_endpoint}", f"--rdzv-id={job}"]
    return [
        f"--nnodes={plan.nnodes}",
        f"--nproc-per-node={plan.nproc}",
        f"--max-restarts={plan.max_restarts}",
        "--signals-to-handle=" + ",".join(number.name for number in HANDLED),
        *meeting,
        "-m",
        "tools.cli",
        *arguments,
    ]


def _run_agent(arguments: Sequence[str], stopped: list[str]) -> int:
    environment = {
        **os.environ,
        LAUNCHER: str(os.getpid()),
        # Without it restarted processes read addresses of the attempt before, and hang.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_TIMEOUT_S),  # not its option, which older versions lack
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _nproc(arguments)))),
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        # A folder called tools where the user stands must not be taken for ours.
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    waiting: list[int] = []  # signals that came before there was anybody to pass them to

    def pass_on(number: int, _: FrameType | None) -> None:
        if stopped:
            return  # saving already; torchrun would give up its workers on a second one
        stopped.append(signal.Signals(number).name)
        waiting.append(number)
        if agent is not None:
            agent.send_signal(waiting.pop())

    agent: subprocess.Popen | None = None
    for number in HANDLED:
        if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN):  # nohup
            signal.signal(number, pass_on)
    # A session of its own: Ctrl-C in a terminal reaches the launcher alone.
    agent = subprocess.Popen(  # noqa: S603  no shell
        [sys.executable, "-m", "tools.launch", *arguments], env=environment, start_new_session=True
    )
    if waiting:
        agent.send_signal(waiting.pop())
    return agent.wait()


def _nproc(arguments: Sequence[str]) -> int:
    return int(next(text.partition("=")[2] for text in arguments if text.startswith("--nproc-per-node=")))


def _outcome(status: int, stopped: list[str], reports: list[Report], folder: Path) -> tuple[int, list[str]]:
    """The exit code, and what is to be said, from how agent and workers of this machine ended."""
    faults = [report for report in reports if report.code not in (0, 75)]
    final = [report for report in faults if report.final]
    if final:
        return final[0].code, _said(final)
    last = max((report.attempt for report in reports), default=0)
    saved = [report for report in reports if report.code == 75 and report.attempt == last]
    if saved:
        return 75, _said(saved)
    if stopped:
        return 75, [
            f"stopped by {stopped[0]}, nothing new was saved; the same command goes on from the last checkpoint"
        ]
    if status == 0:
        return 0, []
    killed = [f"error: {text}" for text in _killed(folder)]
    latest = [report for report in faults if report.attempt == last]
    if latest:
        return latest[0].code, killed + _said(latest)
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return 7, killed or [f"error: torchrun {how}; the same command goes on"]


def _said(reports: list[Report]) -> list[str]:
    speaker = next((report for report in reports if report.speaks), reports[0])
    return list(speaker.lines)


def _killed(folder: Path) -> list[str]:
    path = folder / FAILURES
    if not path.exists():
        return []
    return [
        f"rank {rank} (pid {pid}) was killed by {signal.Signals(-code).name}"
        for rank, pid, code in json.loads(path.read_text())
        if code < 0 and -code != signal.SIGTERM  # torchrun's own way to end the others
    ]


def _record(folder: Path, code: int, lines: list[str], stopped: list[str]) -> None:
    note = folder / "run"
    if not note.exists():
        return  # another machine has the first process, or no run was begun
    kinds = {0: "done", 2: "config", 3: "data", 4: "checkpoint", 5: "numbers", 6: "machine", 7: "distributed"}
    outcome = {
        "outcome": {**kinds, 75: "preempted"}.get(code, "fault"),
        "code": code,
        "lines": lines,
        "signal": stopped[0] if stopped else None,
        "restarts": max((report.attempt for report in read_reports()), default=0),
        "ended": time.strftime("%F %T %z"),
    }
    try:
        replace_file(Path(note.read_text()) / "outcome.json", json.dumps(outcome, indent=1).encode())
    except OSError as error:
        lines.append(f"outcome.json could not be written: {error.strerror}")


def _agent(arguments: Sequence[str]) -> int:
    """torchrun, without its tracebacks: what its workers have to say they say themselves."""
    end_with_parent()
    if os.getppid() != int(os.environ[LAUNCHER]):
        return 1
    os.environ[AGENT] = str(os.getpid())
    logging.disable()  # torchrun tells of every signal that it passes on
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.run(run.parse_args(list(arguments)))
    except ChildFailedError as error:
        failures = [[rank, failure.pid, failure.exitcode] for rank, failure in error.failures.items()]
        (Path(os.environ[REPORTS]) / FAILURES).write_text(json.dumps(failures))
        return 1
    except SignalException:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_agent(sys.argv[1:]))
