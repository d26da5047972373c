"""What classes are called and in which colours they are drawn: built in, from a file, or made up."""

import re
from dataclasses import dataclass
from pathlib import Path

from core.errors import ConfigError, DataError, shown
from transfer.segmentation.labels import LabelKeys, ignore_faults

BUILT_IN = ("ade20k", "camvid")
MAX_FILE_BYTES = 1_000_000

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Classes:
    """Attributes: names and RGB colours, one of each per class. Foreign text: print a name only through `shown`."""

    names: tuple[str, ...]
    palette: tuple[Colour, ...]

    def __len__(self) -> int:
        return len(self.names)


def open_classes(keys: LabelKeys) -> Classes:
    """The classes that `classes` and `num_classes` speak of.

    Raises: ConfigError where they say nothing, disagree, or count `ignore_index` among the classes; DataError for a
        file that is no list of classes.
    """
    if keys.classes is None:
        if keys.num_classes is None:
            raise ConfigError(
                "classes: missing; give classes=FILE with a class per line, classes=ade20k or camvid, or num_classes=N"
            )
        return unnamed(keys.num_classes)
    if keys.classes in BUILT_IN:
        found = read_classes(Path(__file__).with_name("class_files") / f"{keys.classes}.txt")
    else:
        path = Path(keys.classes).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"classes: {shown(path)}: no such file; expected {', '.join(BUILT_IN)}, or a file with a class per line"
            )
        found = read_classes(path)
    if keys.num_classes not in {None, len(found)}:
        raise ConfigError(
            f"num_classes={keys.num_classes}: classes={shown(keys.classes)} has {len(found)}; leave num_classes out"
        )
    for fault in ignore_faults(keys, len(found)):
        raise ConfigError(fault)
    return found


def read_classes(path: Path) -> Classes:
    """Classes from a text file: `name` or `name #rrggbb` per line, in the order of their indices.

    Empty lines, and lines that begin with #, are left out. A class without a colour gets one by its index.

    Raises: DataError with file and line.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"{shown(path)}: larger than {MAX_FILE_BYTES} bytes; expected a class per line")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"{shown(path)}: {reason}; expected a text file with a class per line") from None
    names: list[str] = []
    palette: list[Colour] = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, colour = _name_and_colour(text, f"{shown(path)}:{number}", len(names))
        if name in names:
            raise DataError(f"{shown(path)}:{number}: {shown(name)[:80]} stands twice; classes need names of their own")
        names.append(name)
        palette.append(colour)
    if not names:
        raise DataError(f"{shown(path)}: no classes in it; expected one per line, `name` or `name #rrggbb`")
    return Classes(tuple(names), tuple(palette))


def _name_and_colour(text: str, where: str, index: int) -> tuple[str, Colour]:
    name, _, last = text.rpartition(" ")
    if not last.startswith("#"):
        return text, made_colour(index)
    if not re.fullmatch(r"#[0-9a-fA-F]{6}", last) or not name.strip():
        raise DataError(f"{where}: {shown(text)[:80]}: expected `name` or `name #rrggbb`, as in `road #804080`")
    red, green, blue = bytes.fromhex(last[1:])
    return name.strip(), (red, green, blue)


def unnamed(num_classes: int) -> Classes:
    """Classes known by their number alone."""
    numbers = range(num_classes)
    return Classes(tuple(f"class {number}" for number in numbers), tuple(map(made_colour, numbers)))


def made_colour(index: int) -> Colour:
    """A colour of its own for an index, bright ones first, never black.

    The bits of index + 1 are dealt to red, green and blue, as in PASCAL VOC's colour map.
    """
    channels, rest = [0, 0, 0], index + 1
    for place in range(7, -1, -1):
        for channel in range(3):
            channels[channel] |= (rest >> channel & 1) << place
        rest >>= 3
    return channels[0], channels[1], channels[2]
