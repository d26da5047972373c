"""What a robustness sweep found, from its results.json, or from the cells that an unfinished one has so far."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from robustness.corruptions.apply import BENCHMARK, NAMES, SEVERITIES
from robustness.grid import CLEAN
from robustness.report import UNITS, Unit
from tools.report.comparison import by_name
from tools.report.formats import number, several, text
from tools.report.reading import Json
from tools.report.runs import Run, inside

_CELL = re.compile(r"([^/]+)/([^/]+)/([1-5])/([^/]+)")
_CLEAN_SETS = {"imagenet_c": "imagenet_val", "imagenet_c_otf": "imagenet_val"}  # where their clean figures are
_PROTOCOL = ("model", "data", "images", "seed")  # of a cell: figures of others are not of one sweep
_HOW = ("definition", "corrupt", "jpeg_step", "draws")  # among its flags

MAX_SETS, MAX_CORRUPTIONS, MAX_UNITS = 10, 30, 3  # of one sweep; what is beyond is no benchmark of this suite

MAX_NAMED = 5  # of those that are left out

Grid = Mapping[str, Mapping[int, float]]


def unit_of(name: str) -> Unit:
    """The unit of a figure's name; one that is not known is printed as it is."""
    return UNITS.get(name, Unit(name, 2, 1, True, name))


@dataclass(frozen=True)
class SweptSet:
    """One set of a sweep in one unit, in printed units (per cent where the title says so).

    Attributes:
        grid: by corruption and severity, in the order of the 19; empty for a set without corruptions.
        clean: the figure without corruption, None where it is not known.
        figures: of the whole set, by name, as stored. refused: by name of a figure, why it is not given.
        each: further figures of every corruption, such as its CE: by name of the figure, then of the corruption.
    """

    name: str
    unit: str
    grid: Grid
    clean: float | None
    figures: Mapping[str, float | None]
    flags: Mapping[str, Any]
    refused: Mapping[str, str] = field(default_factory=dict)
    each: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def cells(self) -> int:
        """Corruptions times severities that were evaluated."""
        return sum(len(row) for row in self.grid.values())

    @property
    def whole_benchmark(self) -> bool:
        """Whether all 15 corruptions of the benchmark are there at all five severities."""
        return all(len(self.grid.get(name, ())) == len(SEVERITIES) for name in BENCHMARK)

    @property
    def mean(self) -> float | None:
        """Over the 15 corruptions and five severities; over all cells that there are where those are not whole."""
        names = BENCHMARK if self.whole_benchmark else tuple(self.grid)
        values = [value for name in names for value in self.grid[name].values()]
        return float(np.mean(values)) if values else None

    @property
    def kept(self) -> float | None:
        """Performance under corruption as a share of the clean one, per cent (rPC); of errors, of their complements."""
        if self.mean is None or self.clean is None or self.unit == "cosine":
            return None
        errors = self.unit == "error_pct"
        mean, clean = (100 - self.mean, 100 - self.clean) if errors else (self.mean, self.clean)
        return 100 * mean / clean if clean > 0 else None


@dataclass(frozen=True)
class Sweep:
    """All sets of a sweep, by name and unit, and what was odd about its cells."""

    run: Run
    sets: Sequence[SweptSet]
    notes: Sequence[str] = ()

    def by_name(self) -> dict[str, SweptSet]:
        """The sets by name, of several units the first."""
        return {one.name: one for one in reversed(self.sets)}


def read_sweep(run: Run) -> Sweep:
    """What a sweep found, as far as it came."""
    if run.results:
        sets, left_out = _from_results(run.results)
        return Sweep(run, sets, [*left_out, *_notes(run.results)])
    cells, notes = _of_one_protocol(run.cells)
    sets, left_out = _from_results(_as_results(cells))
    return Sweep(run, sets, [*left_out, *notes])


def _notes(results: Json) -> Iterator[str]:
    """What concerns all figures of a finished sweep."""
    reference = inside(results, "reference", "path")
    if reference is not None:
        digest = text(inside(results, "reference", "digest"), 24)
        yield f"degradation (CD, rCD) is relative to {text(reference, 160)}, model {digest}"
    commits = results.get("commits_of_cells")
    if isinstance(commits, list) and len(commits) > 1:
        yield f"its cells are of {len(commits)} commits: {', '.join(text(commit, 60)[:12] for commit in commits[:6])}"


def _from_results(results: Json) -> tuple[list[SweptSet], list[str]]:
    """The sets of a sweep, and what of them is too much for a page."""
    figures = by_name(results.get("figures"))
    flags = results.get("flags")
    flags = flags if isinstance(flags, dict) else {}
    refused = results.get("refused")
    refused = {str(k): str(v) for k, v in refused.items()} if isinstance(refused, dict) else {}
    grids: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    whole: dict[str, dict[str, float | None]] = {}
    each: dict[str, dict[str, dict[str, float]]] = {}
    for name, value in figures.items():
        match = _CELL.fullmatch(name)
        if match and value is not None:
            grid = grids.setdefault((match[1], match[4]), {})
            grid.setdefault(match[2], {})[int(match[3])] = value * unit_of(match[4]).factor
        elif name.count("/") == 2 and value is not None:
            set_name, corruption, key = name.split("/")
            each.setdefault(set_name, {}).setdefault(key, {})[corruption] = value
        elif name.count("/") == 1:
            whole.setdefault(name.partition("/")[0], {})[name.partition("/")[2]] = value
    sets: list[SweptSet] = []
    names = list(dict.fromkeys([*flags, *whole, *(name for name, _ in grids)]))
    left_out = _left_out(names, MAX_SETS, "set")
    for name in names[:MAX_SETS]:
        own = {key.partition("/")[2]: why for key, why in refused.items() if key.partition("/")[0] == name}
        own_flags = flags.get(name) if isinstance(flags.get(name), dict) else {}
        units = [unit for set_name, unit in grids if set_name == name]
        left_out += _left_out(units, MAX_UNITS, "unit", f"{text(name, 80)}: ")
        for unit in units[:MAX_UNITS] or [""]:
            rows = sorted(grids.get((name, unit), {}).items(), key=_order)
            left_out += _left_out([one for one, _ in rows], MAX_CORRUPTIONS, "corruption", f"{text(name, 80)}: ")
            grid = {corruption: dict(sorted(row.items())) for corruption, row in rows[:MAX_CORRUPTIONS]}
            clean = _clean(figures, name, unit)
            sets.append(
                SweptSet(name, unit, grid, clean, whole.get(name, {}), own_flags or {}, own, each.get(name, {}))
            )
    return sets, list(dict.fromkeys(left_out))


def _left_out(names: Sequence[str], most: int, what: str, where: str = "") -> list[str]:
    """A line on those beyond the most; none where there are no more."""
    if len(names) <= most:
        return []
    some = ", ".join(text(name, 40) for name in names[most : most + MAX_NAMED])
    more = ", ..." if len(names) > most + MAX_NAMED else ""
    return [f"{where}{several(len(names) - most, what)} LEFT OUT, a page holds {most}: {some}{more}"]


def _order(entry: tuple[str, Any]) -> tuple[int, str]:
    name = entry[0]
    return (NAMES.index(name) if name in NAMES else len(NAMES), name)


def _clean(figures: Mapping[str, float | None], name: str, unit: str) -> float | None:
    places = (f"{name}/{unit}", f"{name}/{CLEAN}/{unit}", f"{name}/{CLEAN}/0/{unit}", f"{_CLEAN_SETS.get(name)}/{unit}")
    found = next((figures[place] for place in places if figures.get(place) is not None), None)
    return None if found is None else found * unit_of(unit).factor


# ---- cells of a sweep that is not finished --------------------------------------------------------------------------


def _of_one_protocol(cells: Sequence[Json]) -> tuple[list[Json], list[str]]:
    """The cells of the protocol that most of them share: figures of two would be mixed otherwise."""
    corrupted = Counter(_protocol(cell) for cell in cells if cell.get("corruption") != CLEAN)
    chosen = corrupted.most_common(1)[0][0] if corrupted else next(map(_protocol, cells), ("", ""))
    kept = [cell for cell in cells if _protocol(cell) == chosen or _protocol(cell) == (chosen[0], "")]
    if len(kept) == len(cells):
        return kept, []
    return kept, [f"cells of several protocols lie in one folder: the {len(kept)} of the largest are shown"]


def _protocol(cell: Json) -> tuple[str, str]:
    """What a cell's figures depend on but for the corruption; how it was corrupted, "" for a clean one."""
    flags = cell.get("flags")
    how = [flags.get(key) for key in _HOW] if isinstance(flags, dict) else []
    return repr([cell.get(key) for key in _PROTOCOL]), "" if cell.get("corruption") == CLEAN else repr(how)


def _as_results(cells: Sequence[Json]) -> Json:
    """Cells in the form of a results.json without aggregates."""
    figures: dict[str, float | None] = {}
    flags: dict[str, Any] = {}
    for cell in cells:
        name, severity = str(cell.get("set")), number(cell.get("severity"))
        found = by_name(cell.get("figures"))
        if cell.get("corruption") == CLEAN:
            figures |= {f"{name}/{key}": value for key, value in found.items()}
            flags.setdefault(name, cell.get("flags"))
        elif severity is not None:
            known = {key: value for key, value in found.items() if key in UNITS}
            figures |= {f"{name}/{cell.get('corruption')}/{severity:.0f}/{key}": value for key, value in known.items()}
            flags[name] = cell.get("flags")
    return {"figures": figures, "flags": flags}
