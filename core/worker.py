"""A process that torchrun started: it ends with its parent, and leaves word of its end to the launcher.

Imported first of all by the command, so nothing slow may be imported here: an orphan must not live through `import
torch`.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

REPORTS = "RCMAE_REPORTS"  # folder in which the launcher of this machine collects reports; set by it alone
AGENT = "RCMAE_AGENT"  # process id of the torchrun that started us
PR_SET_PDEATHSIG = 1
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)  # save, and end with 75


def is_worker() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def begin() -> None:
    """Tie this worker to its parent; end at once where the parent is gone already, or where a restart is of no use."""
    if not is_worker():
        return
    end_with_parent()
    agent = os.environ.get(AGENT)
    if (agent and os.getppid() != int(agent)) or _adopted():
        os._exit(1)
    if any(report.final for report in read_reports()):
        sys.exit(0)  # an error that the next attempt would meet again; 0, or torchrun would try once more


def end_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends, however it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _adopted() -> bool:
    # In a container torchrun itself may be process 1.
    return os.getppid() == 1 and b"torch" not in Path("/proc/1/cmdline").read_bytes()


@dataclass(frozen=True)
class Report:
    """How one process ended."""

    rank: int
    attempt: int  # 0, and one more after each restart
    code: int
    lines: tuple[str, ...]
    speaks: bool  # one process says what all know
    final: bool  # starting again would not help


def leave(code: int, lines: Sequence[str], speaks: bool = True, final: bool = True) -> int:
    """Say how this process ends, to the launcher where there is one, else on stderr. Returns the exit status."""
    folder = _reports()
    if is_worker() and folder is not None:
        rank, attempt = (int(os.environ[key]) for key in ("RANK", "TORCHELASTIC_RESTART_COUNT"))
        report = Report(rank, attempt, code, tuple(lines), speaks, final)
        _write(folder / f"rank_{rank}_{attempt}.json", json.dumps(asdict(report)))
    elif speaks:
        for line in lines:
            sys.stderr.write(f"{line}\n")
    return 0 if is_worker() and code == 75 else code  # torchrun takes everything else for a failure, and restarts


def note_run(folder: Path) -> None:
    """Tell the launcher which run directory this is, for its outcome.json."""
    reports = _reports()
    if reports is not None:
        _write(reports / "run", str(folder.resolve()))


def read_reports() -> list[Report]:
    """The reports of this machine's processes, oldest attempt first."""
    folder = _reports()
    if folder is None:
        return []
    found = [json.loads(path.read_text()) for path in folder.glob("rank_*.json")]
    reports = [Report(**{**fields, "lines": tuple(fields["lines"])}) for fields in found]
    return sorted(reports, key=lambda report: (report.attempt, report.rank))


def earlier_faults() -> list[str]:
    """What ended the attempts before this one, a line each."""
    spoken = [report for report in read_reports() if report.code not in (0, 75) and report.speaks]
    return [line.removeprefix("error: ") for report in spoken for line in report.lines]


def _reports() -> Path | None:
    return Path(os.environ[REPORTS]) if REPORTS in os.environ else None


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    temporary.write_text(text)
    temporary.rename(path)
