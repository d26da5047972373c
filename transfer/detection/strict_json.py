"""A JSON file read strictly: what Python's parser passes over is a fault here, each one line with a place.

Duplicate keys are refused, so are a byte order mark, what is not UTF-8, and nesting that no data needs. NaN and
infinities are passed on as floats: whoever reads a number decides what one that is not finite means there.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.errors import DataError, shown

MAX_DEPTH = 100
BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_LONG_NUMBER = re.compile(r"\d{4000,}")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]')


class _Repeated(dict[str, Any]):
    """An object in which a key stands twice."""

    key = ""


def read_json(path: Path, expected: str) -> Any:
    """The value that a JSON file holds.

    Args:
        expected: what the file should be, for messages.
    Raises: DataError with the byte or the JSON path of the fault.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{shown(path)}: {error.strerror}; expected {expected}") from None
    if data.startswith(BYTE_ORDER_MARKS):
        raise DataError(f"{shown(path)}: byte 0: starts with a byte order mark; save it as UTF-8 without one")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{shown(path)}: byte {error.start}: not UTF-8 text; expected {expected}") from None
    del data  # the largest files have half a gigabyte
    return _parsed(path, text, expected)


def whole_number(value: Any) -> int | None:
    """A whole number, be it written 7 or 7.0; None for anything else, true and false among it."""
    if type(value) is int:
        return value
    return int(value) if type(value) is float and value.is_integer() else None


def _parsed(path: Path, text: str, expected: str) -> Any:
    repeated: list[_Repeated] = []

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) == len(pairs):
            return made
        keys = [key for key, _ in pairs]
        marked = _Repeated(made)
        marked.key = next(key for key in keys if keys.count(key) > 1)
        repeated.append(marked)
        return marked

    try:
        tree = json.loads(text, object_pairs_hook=checked)
    except json.JSONDecodeError as error:
        raise DataError(f"{shown(path)}: {_syntax_fault(text, error)}; expected {expected}") from None
    except RecursionError:
        raise DataError(f"{shown(path)}: byte {_too_deep(text)}: nested too deeply; expected {expected}") from None
    except ValueError:  # the parser's only other one
        number = _LONG_NUMBER.search(text)
        byte = len(text[: number.start()].encode()) if number else 0
        raise DataError(f"{shown(path)}: byte {byte}: a number of thousands of digits; expected {expected}") from None
    if repeated:
        place = next(place for place, value in _walk(tree) if value is repeated[0])
        raise DataError(f"{shown(path)}: {place}: the key {shown(repeated[0].key)!r} stands twice; keep one")
    return tree


def _syntax_fault(text: str, error: json.JSONDecodeError) -> str:
    place = f"byte {len(text[: error.pos].encode())}"
    if not text.strip():
        return "an empty file"
    if error.msg.startswith("Unterminated") or not text[error.pos :].strip():
        return f"{place}: the file ends in the middle; fetch it again"
    return f"{place}: {error.msg}"


def _too_deep(text: str) -> int:
    """The byte at which the nesting passes MAX_DEPTH."""
    depth = 0
    for token in _TOKEN.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if depth > MAX_DEPTH:
            return len(text[: token.start()].encode())
    return 0


def _walk(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every object of a tree with its JSON path."""
    waiting = [("the top level", tree)]
    while waiting:
        place, value = waiting.pop()
        yield place, value
        prefix = "" if place == "the top level" else place
        if isinstance(value, dict):
            waiting += [(f"{prefix}.{shown(key)}".lstrip("."), item) for key, item in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{prefix}[{i}]", item) for i, item in enumerate(value)]
