"""What a chain shows: a line per stage with its figure, and on a terminal one bar over all stages."""

import re
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from core.errors import shown
from core.log import duration

_PART = re.compile(r"\b(\d{1,9})/(\d{1,9})\b")  # step 150/225, cell 3/95: how all commands tell how far they are


class Display:
    """Lines for what has been done; below them, on a terminal, what is being done. A context manager."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self._console = console
        self._names = list(names)
        self._width = max(map(len, names), default=0)
        text = TextColumn("{task.fields[doing]}", markup=False, table_column=Column(no_wrap=True, ratio=1))
        self._bar = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=16),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            text,
            console=console,
            expand=True,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=len(self._names), doing="")
        self._done = 0

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def begun(self, name: str, command: str) -> None:
        """A stage begins: its command, as one could give it by hand."""
        self.say(f"{self._place(name)}  {command}", style="dim")
        self._bar.update(self._task, description=self._place(name).rstrip(), doing="")

    def doing(self, line: str) -> None:
        """What the stage said last."""
        counted = _PART.search(line)
        part = int(counted[1]) / max(1, int(counted[2])) if counted else 0.0
        self._bar.update(self._task, completed=self._done + min(part, 1.0), doing=shown(line), refresh=True)

    def finished(self, name: str, figures: str, seconds: float, earlier: bool) -> None:
        """A stage has ended well, now or in an earlier attempt."""
        told = figures or "no figure"
        self.say(f"{self._place(name)}  {told}  ({'before, ' if earlier else ''}{duration(seconds)})")
        self._done += 1
        self._bar.update(self._task, completed=self._done)

    def say(self, line: str, style: str = "") -> None:
        """One line, foreign text escaped."""
        self._console.print(Text(shown(line), style=style), soft_wrap=True)

    def _place(self, name: str) -> str:
        return f"{self._names.index(name) + 1}/{len(self._names)} {name:{self._width}}"
