"""What the verbs of the command share: their options, and how `CONFIG.yaml key=value ...` is taken apart."""

from pathlib import Path
from typing import Annotated

import typer

from core.errors import ConfigError, shown

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done and what it costs, and stop.")]
Resume = Annotated[str, typer.Option(help="auto, never, or the folder of a checkpoint to start from.")]
Nproc = Annotated[int, typer.Option(help="Processes on this machine; one per GPU. torchrun starts them.")]
Nnodes = Annotated[int, typer.Option(help="Machines; the same command is given on each.")]
Endpoint = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where the machines meet: one of them.")]
Restarts = Annotated[int, typer.Option(help="Times that the processes are started again after one died.")]
Cache = Annotated[Path, typer.Option(help="Where compressed archives are unpacked.")]
DEFAULT_CACHE = Path("~/.cache/rcmae")
Settings = Annotated[list[str] | None, typer.Argument(metavar="[CONFIG.yaml] [key=value ...]", show_default=False)]


def split(settings: list[str]) -> tuple[Path | None, list[str]]:
    """The configuration file, if one is given, and the key=value texts. Raises: ConfigError for two files."""
    paths = [text for text in settings if "=" not in text]
    if len(paths) > 1:
        raise ConfigError(f"command line: {shown(paths[1])}: expected one CONFIG.yaml, then key=value")
    return (Path(paths[0]) if paths else None), [text for text in settings if "=" in text]


def numbers(option: str, text: str, least: int) -> list[int]:
    """The whole numbers of an option like 1,2. Raises: ConfigError for others, or some below `least`."""
    found = [int(part) if part.strip().isdecimal() else -1 for part in text.split(",")]
    if min(found) < least:
        raise ConfigError(f"{option} {shown(text)}: expected whole numbers from {least}, as in 1,2")
    return found
