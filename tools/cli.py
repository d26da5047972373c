"""The one command, `rcmae`. Verbs import what they need when they run, so that help and refusals are quick."""

import errno
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from core.errors import ConfigError, MachineError, Preempted, RcmaeError, shown

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="RC-MAE pretraining of Vision Transformers, and what they are worth on dense prediction and robustness.",
)

Settings = Annotated[list[str] | None, typer.Argument(metavar="[CONFIG.yaml] [key=value ...]", show_default=False)]


@app.command()
def pretrain(
    settings: Settings = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done and what it costs, and stop.")
    ] = False,
    resume: Annotated[str, typer.Option(help="auto, never, or the folder of a checkpoint to start from.")] = "auto",
) -> None:
    """Pretrain a ViT with RC-MAE or MAE on a folder of images; the same command again goes on.

    Example: rcmae pretrain configs/pretrain/photos_tiny.yaml data=my_photos out=runs/photos
    """
    from core.config import dump_config, load_config
    from pretrain import run
    from pretrain.settings import PretrainConfig

    path, overrides = _split(settings or [])
    config = load_config(PretrainConfig, path, overrides)
    if dry_run:
        print(dump_config(config))
        print("\n".join(run.dry_run(config)))
        return
    run.pretrain(config, resume)


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or one checkpoint of it.")],
    out: Annotated[Path | None, typer.Option(help="Where to write; default RUN/backbone_BRANCH.")] = None,
    branch: Annotated[str, typer.Option(help="teacher (as published) or student.")] = "teacher",
) -> None:
    """Write a backbone directory from a pretraining run; timm loads it with local-dir:NAME and pretrained=True."""
    from tools.export import export_run

    target = export_run(source, branch, out)
    print(f"{shown(target)}: timm.create_model('local-dir:{shown(target)}', pretrained=True)")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint of MAE, RC-MAE, timm or Hugging Face ViT-MAE.")],
    out: Annotated[Path, typer.Argument(help="The backbone directory to write.")],
    branch: Annotated[str, typer.Option(help="teacher or student, for RC-MAE's files.")] = "teacher",
    num_heads: Annotated[int | None, typer.Option(help="For sizes that are not published ones.")] = None,
) -> None:
    """Turn a foreign checkpoint into a backbone directory and say what became of every tensor."""
    from tools.convert import convert_checkpoint

    print("\n".join(convert_checkpoint(source, out, branch, num_heads)))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where to draw the small world and train on it.")] = Path("runs/demo"),
) -> None:
    """Draw a small world of textured shapes and pretrain on it: no download, four CPU minutes at most."""
    from tools.demo import run_demo

    run_demo(out)


def _split(settings: list[str]) -> tuple[Path | None, list[str]]:
    paths = [text for text in settings if "=" not in text]
    if len(paths) > 1:
        raise ConfigError(f"command line: {shown(paths[1])}: expected one CONFIG.yaml, then key=value")
    return (Path(paths[0]) if paths else None), [text for text in settings if "=" in text]


def main() -> None:
    """Entry point of the command: one line per error and the exit code of its kind."""
    sys.exit(guarded(lambda: app(standalone_mode=False)))


def guarded(command: Callable[[], Any]) -> int:
    """Run a command; turn what a user can mend into lines on stderr and an exit code, and name faults of ours."""
    try:
        result = command()
        return result if isinstance(result, int) else 0
    except RcmaeError as error:
        return _fail(error)
    except typer.Abort:
        return 1
    except typer.Exit as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        print("stopped; nothing was lost that a checkpoint holds", file=sys.stderr)
        return 75
    except OSError as error:
        return _fail(_from_os_error(error))
    except MemoryError:
        return _fail(MachineError("out of memory: give a higher engine.accumulation, or a smaller model or img_size"))
    except Exception as error:
        return _from_unexpected(error)


def _fail(error: RcmaeError) -> int:
    prefix = "" if isinstance(error, Preempted) else "error: "
    for line in str(error).splitlines():
        print(f"{prefix}{line}", file=sys.stderr)
    return error.exit_code


def _from_os_error(error: OSError) -> MachineError:
    where = shown(str(error.filename)) if error.filename else "the disk of out= or cache="
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return MachineError(f"{where}: disk full; free some space and give the same command again")
    return MachineError(f"{where}: {error.strerror or error}")


def _from_unexpected(error: Exception) -> int:
    if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # click's own usage errors
        print(f"error: command line: {error.format_message()}", file=sys.stderr)
        return ConfigError.exit_code
    if type(error).__name__ == "OutOfMemoryError":
        text = "GPU out of memory: give a higher engine.accumulation, or a smaller model or img_size"
        return _fail(MachineError(text))
    traceback.print_exc()
    print(f"error: a fault of ours: {type(error).__name__}: {shown(str(error))}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    main()
