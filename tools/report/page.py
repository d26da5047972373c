"""`rcmae report`: run directories in, one self-contained HTML page out."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from core.errors import ConfigError, MachineError, shown
from core.files import replace_file
from core.machine import git_commit
from tools.report.blocks import Row, Section
from tools.report.classification import classification
from tools.report.dense import detection, segmentation
from tools.report.formats import several
from tools.report.overview import story, throughput
from tools.report.pictures import LADDER, Album
from tools.report.pretraining import pretraining
from tools.report.provenance import configurations, provenance
from tools.report.runs import Inputs, Run, find_runs, in_order
from tools.report.sweeps import TONES, robustness

MAX_BYTES = 5_000_000
MAX_RUNS = 24


@dataclass(frozen=True)
class Written:
    """What was written: bytes, runs, and how many of these are not finished."""

    path: Path
    size: int
    runs: int
    unfinished: int

    def __str__(self) -> str:
        some = f", {self.unfinished} of them not finished" if self.unfinished else ""
        return (
            f"{shown(self.path)}: {several(self.runs, 'run')}{some}, {self.size / 1e6:.2f} MB; open it in any browser"
        )


def write_report(paths: Sequence[Path], out: Path) -> Written:
    """Write the report of the runs below `paths` to `out`, an .html file that is replaced whole.

    Raises: ConfigError where a path holds no run or `out` is no name of an HTML file; MachineError for a disk that
        refuses. What is missing or damaged inside a run is told on the page.
    """
    if out.suffix.lower() not in {".html", ".htm"}:
        raise ConfigError(f"--out {shown(out)}: expected a name that ends in .html")
    if out.is_dir():
        raise ConfigError(f"--out {shown(out)}: is a folder; give the name of a file")
    inputs = find_runs(paths, MAX_RUNS)
    page = build(inputs)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, page)
    return Written(out, len(page), len(inputs.runs), sum(not run.done for run in inputs.runs))


def build(inputs: Inputs, max_bytes: int = MAX_BYTES) -> bytes:
    """The page, with pictures as large as fit into `max_bytes`."""
    bare = LADDER[-1]
    for quality in LADDER:
        album = Album(quality)
        page = render(inputs, album, whole=quality is not bare)
        if len(page) <= max_bytes:
            return page
        if not album.embedded and quality is not bare:  # smaller pictures cannot help
            page = render(inputs, Album(bare), whole=False)
            break
    if len(page) <= max_bytes:
        return page
    raise MachineError(f"the report is {len(page):,} bytes without any picture; give fewer runs at once")


def render(inputs: Inputs, album: Album, whole: bool = True) -> bytes:
    """The page with the pictures that an album takes. Args: whole: with every configuration in full."""
    sections = _sections(inputs, album, whole)
    left = (
        f"{several(len(album.left_out), 'picture')} left out, so that the page stays below 5 MB."
        if album.left_out
        else ""
    )
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["groupby_order"] = _in_groups
    html = environment.get_template("page.html.j2").render(
        sections=sections,
        title=_title(inputs.runs),
        made=time.strftime("%Y-%m-%d %H:%M %z"),
        commit=(git_commit() or "unknown")[:12],
        left_out=left,
        tones=tones(),
    )
    return html.encode("utf-8", "backslashreplace")


def _in_groups(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Neighbouring rows of one group together, in their order."""
    return [{"name": name, "rows": list(members)} for name, members in groupby(rows, key=lambda row: row.group)]


def _sections(inputs: Inputs, album: Album, whole: bool) -> list[Section]:
    runs = inputs.runs

    def of(kind: str) -> list[Run]:
        return [run for run in runs if run.kind == kind]

    found = [
        story(inputs),
        provenance(runs),
        pretraining(of("pretrain"), inputs.comparisons, album),
        classification(of("classify"), album),
        detection(of("detect"), album),
        segmentation(of("segment"), album),
        robustness(of("robust"), in_order(runs)),
        throughput(runs),
        configurations(runs, whole),
    ]
    return [section for section in found if section is not None]


def _title(runs: Sequence[Run]) -> str:
    names = [run.name for run in in_order(runs)]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def tones() -> list[tuple[str, str]]:
    """Background and text colour of the heat maps' steps, from good (light) to bad (dark)."""
    found = []
    for step in range(TONES + 1):
        rgb = matplotlib.colormaps["cividis_r"](step / TONES)[:3]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in rgb]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        white, black = 1.05 / (luminance + 0.05), (luminance + 0.05) / 0.05  # contrast of text, as WCAG has it
        found.append((matplotlib.colors.to_hex(rgb), "#ffffff" if white > black else "#000000"))
    return found
