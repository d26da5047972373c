"""What the verbs of the command share: options, `CONFIG.yaml key=value ...` taken apart, how a run is started."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from core.errors import ConfigError, shown
from core.worker import is_worker
from tools.launch import Launch, launch

if TYPE_CHECKING:  # pydantic takes a while, and help does not need it
    from core.config import Config

DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done and what it costs, and stop.")]
Evaluate = Annotated[
    bool, typer.Option("--eval", help="Evaluate the model directory given as backbone=, and train nothing.")
]
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


def as_command(verb: str, settings: list[str] | None, evaluate: bool, resume: str) -> list[str]:
    """A verb that trains or evaluates, as the processes of `--nproc` are given it."""
    return [verb, *(settings or []), f"--resume={resume}", *(["--eval"] if evaluate else [])]


class Prepared(NamedTuple):
    """A verb that has read its configuration."""

    config: "Config"
    run: Callable[[], Any]
    planned: Callable[[], list[str]]  # what a dry run says


def carry_out(command: list[str], plan: Launch, dry_run: bool, prepare: Callable[[], Prepared]) -> int:
    """Do what a verb is for: here, on the many processes of a plan, or in words only.

    Args:
        command: the verb with its arguments, for the other processes.
        prepare: imports what it needs and reads the configuration.
    Returns: the exit code.
    """
    if plan.size > 1 and not is_worker() and not dry_run:
        return launch(plan, command)
    prepared = prepare()
    if dry_run:
        from core.config import dump_config

        print(dump_config(prepared.config))
        print("\n".join(prepared.planned()))
    else:
        prepared.run()
    return 0
