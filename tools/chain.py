"""`rcmae chain`: one YAML that names data sets and stages; each stage is an ordinary command, finished ones stay done.

A stage is a process of its own, so that its memory ends with it and what it says is what the command would say alone.
What was finished is remembered with the command and with what the stages before it had left, so that a change anywhere
runs what follows from it again; whether that may go on is for the command itself to say.
"""

import hashlib
import json
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt
from rich.console import Console

from core.config import Config, as_overrides, dump_config, load_config
from core.errors import ConfigError, Preempted, shown
from core.files import RunLock, replace_file
from core.flags import stop_signal
from core.run_directory import LOCK_NAME
from pretrain.settings import PretrainConfig
from robustness.settings import RobustConfig
from tools.chain_display import Display
from tools.cli_options import split
from tools.commands import begin_command, failure, last_line
from tools.report.overview import headline
from tools.report.page import write_report
from tools.report.runs import read_run
from transfer.classification.settings import ClassifyConfig
from transfer.detection.settings import DetectConfig
from transfer.segmentation.settings import SegmentConfig

VERBS: dict[str, type[Config]] = {
    "pretrain": PretrainConfig, "classify": ClassifyConfig, "detect": DetectConfig, "segment": SegmentConfig,
    "robust": RobustConfig,
}  # fmt: skip
# What two stages of one verb are compared by: title, figure of the run, and what makes percent of it.
FIGURES = {
    "classify": ("top-1", "top1_pct", 1.0), "detect": ("box AP", "box_ap", 100.0), "segment": ("mIoU", "miou_pct", 1.0)
}  # fmt: skip
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")  # a folder, and a part of a dotted key
REFERENCE = re.compile(r"\$([A-Za-z_]\w*)(.*)", re.DOTALL)
RECORD = "chain.json"
REPORT = "report.html"


class ChainStage(Config):
    """One stage: a verb of this command, its recipe, and what is set beside it."""

    verb: Literal["pretrain", "classify", "detect", "segment", "robust"]
    recipe: Path | None = None  # beside the chain's own file, as `extends` is
    set: dict[str, Any] = Field(default_factory=dict)  # keys of the verb
    nproc: PositiveInt | None = None
    versus: str | None = None  # an earlier stage of the same verb that this one is compared with


class ChainConfig(Config):
    """Everything that `rcmae chain` reads.

    A text below `set` that begins with `$NAME` is a path: of a data set, of an earlier stage's folder, or `$out`.
    """

    out: Path  # holds a run directory per stage, named as the stage is, and report.html
    data: dict[str, str] = Field(default_factory=dict)  # data sets by name
    set: dict[str, Any] = Field(default_factory=dict)  # keys that every stage is given: cache, device, seed
    nproc: PositiveInt = 1  # processes of each stage
    stages: dict[str, ChainStage]  # in the order in which they run

    def contradictions(self) -> Iterator[str]:
        """Names that cannot be used, or that mean two things, and comparisons of what cannot be compared."""
        yield from super().contradictions()
        if not self.stages:
            yield "stages: give one or more of them"
        for name in [*self.data, *self.stages]:
            if not NAME.fullmatch(name):
                yield f"{shown(name)}: expected a name of at most 64 letters, digits and underscores"
        for name in sorted({"out"} & {*self.data, *self.stages} | self.data.keys() & self.stages.keys()):
            yield f"{name}: names two things; call the data set or the stage something else"
        earlier: dict[str, ChainStage] = {}
        for name, stage in self.stages.items():
            other = None if stage.versus is None else earlier.get(stage.versus)
            if stage.versus is not None and (other is None or other.verb != stage.verb or stage.verb not in FIGURES):
                yield (
                    f"stages.{name}.versus: {shown(stage.versus)}: expected an earlier stage of the same verb, one of "
                    f"{', '.join(FIGURES)}"
                )
            earlier[name] = stage


@dataclass(frozen=True)
class Planned:
    """A stage as a command, and what it is made from."""

    name: str
    verb: str
    folder: Path
    arguments: tuple[str, ...]  # after `rcmae`
    nproc: int
    needs: tuple[str, ...]  # earlier stages whose folders it names

    @property
    def command(self) -> list[str]:
        """All that follows `rcmae` on the command line."""
        return [*self.arguments, *(["--nproc", str(self.nproc)] if self.nproc > 1 else [])]

    @property
    def typed(self) -> str:
        """The command as one gives it by hand, in a line that can be shown."""
        return shlex.join(["rcmae", *map(shown, self.command)])


def load_chain(path: Path, overrides: Sequence[str]) -> tuple[ChainConfig, list[Planned]]:
    """Read a chain, and the configuration of each of its stages, so that a fault is met before the first begins.

    Raises: ConfigError with one line per fault.
    """
    config = load_config(ChainConfig, path, overrides)
    planned: list[Planned] = []
    faults: list[str] = []
    for at, name in enumerate(config.stages):
        try:
            stage = _plan(config, name, path.parent, list(config.stages)[:at])
            load_config(VERBS[stage.verb], *split(list(stage.arguments[1:])))
            planned.append(stage)
        except ConfigError as error:
            faults += [f"{shown(path)}: stage {name}: {line}" for line in str(error).splitlines()]
    if faults:
        raise ConfigError("\n".join(faults))
    return config, planned


def dry_run(path: Path, overrides: Sequence[str]) -> str:
    """The chain as it was read, and its commands."""
    config, planned = load_chain(path, overrides)
    folders = [shown(stage.folder) for stage in planned]
    report = ["rcmae", "report", *folders, "--out", shown(config.out / REPORT)]
    return "\n".join([dump_config(config), *(stage.typed for stage in planned), shlex.join(report)])


def run_chain(path: Path, overrides: Sequence[str], console: Console | None = None) -> None:
    """Carry out every stage that is not finished, then write the report and say which of two compared stages won.

    Raises: ConfigError; the error of a stage that failed, with its code; Preempted after a signal, when the stage has
        saved what it had.
    """
    config, planned = load_chain(path, overrides)
    config.out.mkdir(parents=True, exist_ok=True)
    lock = RunLock(config.out / LOCK_NAME)
    try:
        record = Record(config.out / RECORD)
        with stop_signal() as stopped, Display(console or Console(emoji=False), [s.name for s in planned]) as display:
            for stage in planned:
                if record.finished(stage):
                    display.finished(stage.name, headline(read_run(stage.folder)), record.seconds(stage.name), True)
                    continue
                display.begun(stage.name, stage.typed)
                _carry_out(stage, config.out / f"{stage.name}.log", record, display, stopped)
                display.finished(stage.name, headline(read_run(stage.folder)), record.seconds(stage.name), False)
            for line in _compared(config, planned):
                display.say(line)
            display.say(str(write_report([stage.folder for stage in planned], config.out / REPORT)))
    finally:
        lock.release()


class Record:
    """What is known of earlier attempts: per stage its command, what it was made from, what it left, and its time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            stored = None  # none yet, or damaged: commands are given again, and find themselves done
        self._stages: dict[str, Any] = stored if isinstance(stored, dict) else {}

    def finished(self, stage: Planned) -> bool:
        """Whether a stage ended well, as it is planned now and from what is there now."""
        stored = self._stages.get(stage.name)
        return isinstance(stored, dict) and stored.get("left") is not None and _facts(stage) == {
            key: stored.get(key) for key in ("command", "made_from", "left")
        }  # fmt: skip

    def seconds(self, name: str) -> float:
        """How long a stage took, in all its attempts."""
        stored = self._stages.get(name)
        seconds = stored.get("seconds") if isinstance(stored, dict) else None
        return seconds if isinstance(seconds, (int, float)) else 0.0

    def add(self, stage: Planned, seconds: float, done: bool) -> None:
        """Note an attempt, and what it left if it came to its end."""
        facts = _facts(stage) if done else {"command": None, "made_from": {}, "left": None}
        self._stages[stage.name] = {**facts, "seconds": round(self.seconds(stage.name) + seconds, 1)}
        replace_file(self._path, json.dumps(self._stages, indent=1).encode())


def _facts(stage: Planned) -> dict[str, Any]:
    return {
        "command": list(stage.arguments),
        "made_from": {name: _left_by(stage.folder.parent / name) for name in stage.needs},
        "left": _left_by(stage.folder),
    }


def _left_by(folder: Path) -> str | None:
    """Identifies the final figures of a run; None where it has none."""
    try:
        return hashlib.sha256((folder / "summary.json").read_bytes()).hexdigest()[:16]
    except OSError:
        return None


def _carry_out(stage: Planned, log: Path, record: Record, display: Display, stopped: list[str]) -> None:
    """Run one stage to its end. Raises: its error; Preempted."""
    if stopped:
        raise Preempted(f"stopped by {stopped[0]} before {stage.name}; the same command goes on")
    begun = time.monotonic()
    process = begin_command(stage.command, log)
    told = False
    while (code := process.poll()) is None:
        if stopped and not told:
            process.terminate()
            told = True
        display.doing(last_line(log))
        time.sleep(0.1)
    record.add(stage, time.monotonic() - begun, code == 0)
    if code == Preempted.exit_code or (stopped and code):
        raise Preempted(f"{stage.name}: {shown(last_line(log))}")
    if code:
        raise failure(code, log, of=f"stage {stage.name}: ")


def _compared(config: ChainConfig, planned: Sequence[Planned]) -> Iterator[str]:
    folders = {stage.name: stage.folder for stage in planned}
    for name, stage in config.stages.items():
        if stage.versus is None:
            continue
        title, key, factor = FIGURES[stage.verb]
        values = [read_run(folders[one]).figures.get(key) for one in (stage.versus, name)]
        if None in values:
            yield f"{stage.versus} and {name}: no {title} to compare"
            continue
        first, second = (factor * (value or 0.0) for value in values)
        ahead = f"{stage.versus if first > second else name} is ahead by {abs(first - second):.2f} points"
        won = "level" if round(first, 2) == round(second, 2) else ahead
        yield f"{title}: {stage.versus} {first:.2f} %, {name} {second:.2f} %: {won} (one run each)"


# --- from names to commands -----------------------------------------------------------------------------------------


def _plan(config: ChainConfig, name: str, beside: Path, earlier: Sequence[str]) -> Planned:
    stage = config.stages[name]
    if "out" in {*stage.set, *config.set}:
        raise ConfigError(f"set.out: is {shown(config.out / name)} by the stage's name; leave it out")
    needs: list[str] = []
    paths = {"out": str(config.out)}
    for one, text in config.data.items():
        paths[one] = _resolved(text, {"out": str(config.out)}, needs)
    paths |= {one: str(config.out / one) for one in earlier}
    values = _resolved({**config.set, **stage.set}, paths, needs)
    recipe = [] if stage.recipe is None else [os.path.normpath(beside / stage.recipe)]
    arguments = (stage.verb, *recipe, *as_overrides(values), f"out={config.out / name}")
    used = tuple(one for one in earlier if one in needs)
    return Planned(name, stage.verb, config.out / name, arguments, stage.nproc or config.nproc, used)


def _resolved(value: Any, paths: Mapping[str, str], used: list[str]) -> Any:
    """A value with paths for names; `used` collects the names. `$$` is a plain dollar sign."""
    if isinstance(value, dict):
        return {key: _resolved(one, paths, used) for key, one in value.items()}
    if isinstance(value, list):
        return [_resolved(one, paths, used) for one in value]
    if not isinstance(value, str) or not value.startswith("$"):
        return value
    if value.startswith("$$"):
        return value[1:]
    match = REFERENCE.fullmatch(value)
    if match is None or match[1] not in paths:
        raise ConfigError(f"{shown(value)}: no such data set or earlier stage; there are {', '.join(paths)}")
    used.append(match[1])
    return paths[match[1]] + match[2]
