"""What a report is made of, before it is HTML: sections of tables, charts, maps, pictures and notes.

All text in here is foreign or may hold foreign parts; the template escapes every bit of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

DASH = "–"


@dataclass(frozen=True)
class Cell:
    """A field of a table.

    Attributes:
        delta: the signed difference to the first column, "" for none. better: whether it is one for the better.
        tone: of a heat map, 0 to 20; None leaves the field plain.
        words: text rather than a figure.
        href: one of the documented sources, "" for none.
    """

    text: str = DASH
    delta: str = ""
    better: bool | None = None
    tone: int | None = None
    words: bool = False
    href: str = ""


@dataclass(frozen=True)
class Row:
    """A line of a table: what it is about, and its fields."""

    head: str
    cells: Sequence[Cell]
    strong: bool = False
    group: str = ""  # rows of one group stand together, under its name


@dataclass(frozen=True)
class Table:
    """Figures with their caption, and below them what they must be read with.

    Attributes:
        corner: heads the first column.
        cards: rows that are read one by one: on a narrow screen each becomes a card.
    """

    shape: ClassVar[str] = "table"
    caption: str
    columns: Sequence[str]
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    corner: str = ""
    cards: bool = False

    def left(self, column: int) -> bool:
        """Whether a column holds nothing but words."""
        return all(row.cells[column].words for row in self.rows)


@dataclass(frozen=True)
class Maps:
    """Tables whose fields are coloured by their value, side by side."""

    shape: ClassVar[str] = "maps"
    tables: Sequence[Table]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where, in units of the drawing, and what it says."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """A curve: its path in units of the drawing, dots where the points are few, and its style."""

    path: str
    dots: Sequence[tuple[float, float]]
    style: int


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    style: int
    text: str


@dataclass(frozen=True)
class Chart:
    """A drawn plot; `alt` says in words what it shows, `legend` is for curves that only this one has."""

    title: str
    alt: str
    x_label: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    lines: Sequence[Line]
    zero: float | None = None  # where a line at zero is drawn
    legend: Sequence[Key] = ()


@dataclass(frozen=True)
class Charts:
    """Plots that share a legend."""

    shape: ClassVar[str] = "charts"
    caption: str
    charts: Sequence[Chart]
    legend: Sequence[Key]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Picture:
    """An embedded picture."""

    uri: str
    width: int
    height: int
    alt: str
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Pictures, and what was left out of them."""

    shape: ClassVar[str] = "gallery"
    caption: str
    pictures: Sequence[Picture]
    notes: Sequence[str] = ()

    @property
    def tall(self) -> bool:
        """Whether more of them fit beside each other."""
        return all(picture.height > 1.3 * picture.width for picture in self.pictures)


@dataclass(frozen=True)
class Notes:
    """Sentences on their own: what is missing, and why."""

    shape: ClassVar[str] = "notes"
    caption: str
    notes: Sequence[str]


@dataclass(frozen=True)
class Unfolded:
    """Long text that is folded away."""

    shape: ClassVar[str] = "unfolded"
    caption: str
    text: str


Block = Table | Maps | Charts | Gallery | Notes | Unfolded


@dataclass(frozen=True)
class Section:
    """A chapter of the page; `anchor` is one of our own words."""

    anchor: str
    title: str
    blocks: Sequence[Block]
    lead: str = ""
