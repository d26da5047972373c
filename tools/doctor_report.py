"""What `rcmae doctor` is given, and what it reports: of sets facts, findings and tables, of an installation lines."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from core.errors import MachineError
from core.images import FORMATS
from core.loader import LoaderConfig
from transfer.segmentation.labels import LabelKeys

NUM_SHOWN = 5  # places named of each finding
ORIENTATION, TURNED = 0x0112, range(5, 9)  # EXIF tag, and its values that swap width and height
BAR = 30  # characters of the longest bar
NO_START = "training does not start"
REPLACED = "each is replaced by another image; more than loader.max_broken_share of them end the run"

Weight = Literal["note", "dropped", "refused"]
State = Literal["ok", "note", "fault"]
STYLES: dict[Weight | State, str] = {
    "note": "",
    "dropped": "yellow",
    "refused": "bold red",
    "ok": "green",
    "fault": "bold red",
}
T = TypeVar("T")


class DoctorConfig(LabelKeys):
    """What `rcmae doctor` is given. The keys of labels belong to segmentation sets, `cache` to the installation."""

    data: Path | None = None
    train_json: Path | None = None
    train_images: Path | None = None
    train_labels: Path | None = None
    val_json: Path | None = None
    val_images: Path | None = None
    val_labels: Path | None = None
    out: Path | None = None  # folder for a picture of the labels; without a data set, where runs would go
    cache: Path = Path("~/.cache/rcmae")
    loader: LoaderConfig = LoaderConfig()

    def contradictions(self) -> Iterator[str]:
        """Keys of two kinds of sets."""
        yield from super().contradictions()
        if (self.train_json or self.val_json) and (self.train_labels or self.val_labels):
            yield "train_labels: a set has a JSON of COCO's format or labels of pixels; give one or the other"


class Found(NamedTuple):
    """What a check of the installation has to say: one line.

    Attributes:
        told: what is so; of a fault, what to do about it too.
        code: exit code of a fault.
    """

    state: State
    told: str
    code: int = MachineError.exit_code


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        what: the rule, and what breaks it.
        consequence: what training or evaluation does.
    """

    weight: Weight
    count: int
    what: str
    consequence: str
    first: tuple[str, ...] = ()


@dataclass
class Report:
    """What was found in one split."""

    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)

    @property
    def refused(self) -> bool:
        """Whether training would end with an error."""
        return any(finding.weight == "refused" for finding in self.findings)

    def add(self, weight: Weight, what: str, consequence: str, places: Sequence[str]) -> None:
        """Add a finding where there are places for it."""
        if places:
            self.findings.append(Finding(weight, len(places), what, consequence, tuple(places[:NUM_SHOWN])))


def watched(items: Iterable[T], total: int, what: str) -> Iterable[T]:
    """The items, with a bar of progress beside what is printed."""
    return track(items, what, total, transient=True, console=Console(stderr=True))


def stored_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image, upright."""
    with Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        turned = image.getexif().get(ORIENTATION) in TURNED
    return (width, height) if turned else (height, width)


def histogram(title: str, rows: Sequence[tuple[str, int]]) -> Table:
    """Counts of objects by name, with bars."""
    table = Table(title, "objects", "", box=None)
    most = max(1, *(count for _, count in rows))
    for name, count in rows:
        table.add_row(Text(name), Text(str(count), justify="right"), Text("█" * round(BAR * count / most)))
    return table


def print_found(console: Console, name: str, found: Found) -> None:
    """Print the line of a check, indented where it is too long for one."""
    row = Table.grid(padding=(0, 2))
    for width in (5, 10):
        row.add_column(width=width, no_wrap=True)
    row.add_column(overflow="fold")
    row.add_row(Text(found.state, style=STYLES[found.state]), Text(name), Text(found.told))
    console.print(row)


def print_report(console: Console, report: Report) -> None:
    """Print all that was found in one split."""
    console.print(Text(report.title, style="bold"))
    for name, value in report.facts:
        console.print(Text(f"  {name}: {value}"))
    if report.findings:
        table = Table("found", "", "what happens", "first of them")
        for finding in report.findings:
            style = STYLES[finding.weight]
            more = ", ..." if finding.count > len(finding.first) > 0 else ""
            cells = (str(finding.count), finding.what, finding.consequence, ", ".join(finding.first) + more)
            table.add_row(*(Text(cell, style=style) for cell in cells))
        console.print(table)
    elif report.facts:
        console.print(Text("  nothing to complain about"))
    for each in report.tables:
        console.print(each)
