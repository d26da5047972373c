"""Files of a run directory, read whatever state they are in: each gives its content, or in words why it has none."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from core.config import read_yaml
from core.errors import RcmaeError, shown
from tools.report.formats import number, several

Json = dict[str, Any]

MAX_JSON_BYTES = 64 * 2**20
LOG_PART_BYTES = 16 * 1024  # of a log, from its beginning and from its end
NOT_THERE = "not there"

_STAMP = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ ", re.MULTILINE)
_STEP = re.compile(r"\b(step|cell) (\d{1,12})/(\d{1,12})\b")
_PICTURE = re.compile(r"(.+)_(\d{7,12})\.png", re.DOTALL)


def read_json(path: Path) -> tuple[Json, str]:
    """The object that a JSON file holds, and "" or why there is none."""
    content, fault = _parsed(path)
    if not fault and not isinstance(content, dict):
        fault = "holds something else than figures by name"
    return ({}, fault) if fault else (content, "" if content else "holds nothing")


def read_list(path: Path) -> tuple[list[Json], str]:
    """The objects that a JSON list holds, and "" or why there are none."""
    content, fault = _parsed(path)
    if not fault and not isinstance(content, list):
        fault = "holds no list"
    return ([], fault) if fault else ([entry for entry in content if isinstance(entry, dict)], "")


def _parsed(path: Path) -> tuple[Any, str]:
    """What a JSON file holds, and "" or why it cannot be read."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            return None, f"{size / 2**20:,.0f} MiB, more than a report reads"
        return json.loads(path.read_bytes()), ""
    except FileNotFoundError:
        return None, NOT_THERE
    except OSError as error:
        return None, shown(error.strerror or "cannot be read")
    except json.JSONDecodeError as error:
        return None, f"no JSON from line {error.lineno}, column {error.colno} on; cut off or damaged"
    except (ValueError, RecursionError):
        return None, "no JSON; damaged"


def read_config(path: Path) -> tuple[Json, str]:
    """The configuration of a run, and "" or why there is none."""
    if not path.exists():
        return {}, NOT_THERE
    try:
        tree = read_yaml(path)[0]
        return tree, "" if tree else "holds nothing"
    except (RcmaeError, OSError, RecursionError) as error:
        problem = shown(str(error)).removeprefix(f"{shown(path)}: ").removeprefix(f"{shown(path)}:")
        return {}, f"cannot be read: {problem}"


def read_rows(path: Path) -> tuple[list[Json], str]:
    """The rows of a metrics.jsonl by step, and "" or how many lines were no rows. A figure is a number or None."""
    rows: list[Json] = []
    bad: list[int] = []
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line_number, line in enumerate(file, start=1):
                row = _row_of(line)
                if row is not None:
                    rows.append(row)
                elif line.strip():
                    bad.append(line_number)
    except FileNotFoundError:
        return [], NOT_THERE
    except OSError as error:
        return [], shown(error.strerror or "cannot be read")
    rows.sort(key=lambda row: row["step"])  # stable
    if bad:
        places = ", ".join(map(str, bad[:5])) + (" ..." if len(bad) > 5 else "")
        what = "line is no row and was" if len(bad) == 1 else "lines are no rows and were"
        return rows, f"{len(bad):,} {what} left out (line {places})"
    return rows, "" if rows else "holds no row yet"


def _row_of(line: str) -> Json | None:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or number(content.get("step")) is None:
        return None
    return {str(key): number(value) for key, value in content.items()}


@dataclass(frozen=True)
class LogFacts:
    """What a log tells without being read whole: its first and last time, and the last step or cell of how many."""

    first: datetime | None = None
    last: datetime | None = None
    unit: str = ""
    done: int | None = None
    total: int | None = None

    @property
    def wall_s(self) -> float | None:
        """Seconds from the first line to the last, whatever happened between."""
        return (self.last - self.first).total_seconds() if self.first and self.last else None


def read_log(path: Path) -> LogFacts:
    """The facts of a train.log or robust.log; of one that is not there, none."""
    try:
        with path.open("rb") as file:
            head = file.read(LOG_PART_BYTES)
            end = file.seek(0, 2)
            file.seek(max(0, end - LOG_PART_BYTES))
            tail = file.read(LOG_PART_BYTES)
    except OSError:
        return LogFacts()
    first, last = head.decode("utf-8", "replace"), tail.decode("utf-8", "replace")
    steps = _STEP.findall(last)
    unit, done, total = steps[-1] if steps else ("", None, None)
    return LogFacts(
        _time(next(iter(_STAMP.findall(first)), None)),
        _time(next(iter(reversed(_STAMP.findall(last))), None)),
        unit,
        None if done is None else int(done),
        None if total is None else int(total),
    )


def _time(stamp: str | None) -> datetime | None:
    try:
        return datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S") if stamp else None
    except ValueError:
        return None


def read_pictures(folder: Path) -> dict[str, list[tuple[int, Path]]]:
    """Pictures of a run by name, each with its steps in order."""
    found: dict[str, list[tuple[int, Path]]] = {}
    for path in _entries(folder):
        match = _PICTURE.fullmatch(path.name)
        if match and path.is_file():
            found.setdefault(match[1], []).append((int(match[2]), path))
    return {name: sorted(pictures) for name, pictures in sorted(found.items())}


def read_cells(folder: Path) -> tuple[list[Json], str]:
    """The cells of a sweep, and "" or how many files were none."""
    cells, bad = [], 0
    for path in _entries(folder):
        if path.name.startswith(".") or path.suffix != ".json":
            continue
        content, fault = read_json(path)
        if fault or not {"set", "corruption", "severity", "figures"} <= content.keys():
            bad += 1
        else:
            cells.append(content)
    return cells, f"{several(bad, 'file')} of cells/ could not be read" if bad else ""


def newest_manifest(run: Path) -> Json:
    """The manifest of the last checkpoint that has a readable one; empty where there is none."""
    for folder in reversed(_entries(run / "checkpoints")):
        if folder.name.startswith("step_"):
            content, fault = read_json(folder / "manifest.json")
            if not fault:
                return content
    return {}


def exported_config(run: Path) -> Json:
    """config.json of the model that a run exported; empty where there is none."""
    for name in ("classifier", "detector", "segmentor", "backbone"):
        content, fault = read_json(run / name / "config.json")
        if not fault:
            return content
    return {}


def _entries(folder: Path) -> list[Path]:
    return sorted(_listed(folder))


def _listed(folder: Path) -> Iterator[Path]:
    try:
        yield from folder.iterdir()
    except OSError:
        return
