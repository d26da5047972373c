"""`rcmae convert`: a foreign checkpoint to a backbone directory."""

from pathlib import Path

from core.backbone_io import export_backbone, load_backbone
from core.errors import ConfigError, MachineError, shown


def convert_checkpoint(source: Path, out: Path, branch: str, num_heads: int | None) -> list[str]:
    """Load `source`, write it to `out`, and return the report. Raises: CheckpointError for what cannot be explained."""
    if branch not in {"teacher", "student"}:
        raise ConfigError(f"--branch {shown(branch)}: expected teacher or student")
    if out.exists():
        raise MachineError(f"{shown(out)}: exists already; give a new folder")
    vit, report = load_backbone(source, branch=branch, num_heads=num_heads)
    export_backbone(out, vit, {"converted_from": shown(source.name), "layout": report.layout})
    return [*report.lines(), f"written  {shown(out)}"]
