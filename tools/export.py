"""`rcmae export`: the backbone of a run, from its newest good checkpoint."""

from pathlib import Path

from core.checkpoint import Checkpoint, read_checkpoint
from core.config import load_config
from core.errors import CheckpointError, ConfigError, shown
from pretrain.mae import MaskedAutoencoder
from pretrain.run import export_branch
from pretrain.settings import PretrainConfig


def export_run(source: Path, branch: str, out: Path | None = None) -> Path:
    """Write the backbone of a run directory (or of one of its checkpoints) and return where.

    Raises: CheckpointError if there is no good checkpoint or no such branch; ConfigError for an unknown branch name.
    """
    if branch not in {"teacher", "student"}:
        raise ConfigError(f"--branch {shown(branch)}: expected teacher or student")
    run, checkpoint = _find(source)
    config = load_config(PretrainConfig, run / "config.yaml")
    if branch not in checkpoint.tensors:
        raise CheckpointError(f"{shown(run)}: method {config.method} has no {branch}; give --branch student")
    model = MaskedAutoencoder(config.vit_config(), config.decoder_config())
    model.load_state_dict(checkpoint.tensors[branch])
    target = out or run / f"backbone_{branch}"
    export_branch(target, model, config, branch, checkpoint.step)
    return target


def _find(source: Path) -> tuple[Path, Checkpoint]:
    if (source / "manifest.json").is_file():
        return source.resolve().parent.parent, read_checkpoint(source)
    folders = sorted((source / "checkpoints").glob("step_*"), reverse=True)
    problems = []
    for folder in folders:  # read only: a run that is being written must not be disturbed
        try:
            return source, read_checkpoint(folder)
        except CheckpointError as error:
            problems.append(str(error))
    reason = problems[0] if problems else "no checkpoints in it; expected the out= of a pretraining run"
    raise CheckpointError(f"{shown(source)}: {reason}")
