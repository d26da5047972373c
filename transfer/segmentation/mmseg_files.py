"""Files of mmsegmentation's UperNet on its MAE backbone as segmentor directories, and back. Names: `weights.py`."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from core.backbone_io import fill
from core.errors import CheckpointError, ConfigError, shown
from core.files import replace_file
from core.vit import ViT
from transfer.segmentation.classes import open_classes
from transfer.segmentation.directory import LoadedSegmentor, export_segmentor, load_segmentor
from transfer.segmentation.labels import LabelKeys
from transfer.segmentation.segmentor import Segmentor, build_segmentor
from transfer.segmentation.settings import InferenceKeys
from transfer.segmentation.weights import ConversionReport, from_mmseg, sizes_of, to_mmseg

ADE20K = "ade20k"
SCALE = 4  # long side that images are resized to fit into, in short sides: (2048, 512) and (2560, 640) as published
SUFFIXES = (".pth", ".safetensors")  # that a segmentor directory is written to


def is_mmseg(state: Mapping[str, Any]) -> bool:
    """Whether these are names of a segmentor of mmsegmentation."""
    return any(name.startswith(("decode_head.", "auxiliary_head.")) for name in state)


def segmentor_from_mmseg(
    state: Mapping[str, Tensor], classes: str | None, num_heads: int | None, out: Path, source: str
) -> ConversionReport:
    """Write weights under mmsegmentation's names as a segmentor directory.

    The tables of its backbone tell the number of heads and the side of its windows. What leaves no trace in weights is
    as published: the blocks that the neck takes, the stride of the windows, the size that images are brought to.

    Args:
        classes: as the key of that name; None: ADE20K's. ADE20K's labels are shifted by one, others not at all.
        num_heads: what the weights must say.
        source: the printable name of the file that they come from.
    Raises: CheckpointError for weights of another network, or of another number of classes; NumericError.
    """
    try:
        ours, report = from_mmseg(state)
        vit, sizes = sizes_of(ours)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    if num_heads not in {None, vit.num_heads}:
        raise CheckpointError(
            f"{source}: its tables are for {vit.num_heads} heads, not {num_heads}; leave num_heads out"
        )
    labels = LabelKeys(
        classes=classes or ADE20K,
        ignore_index=sizes.ignore_index,
        label_shift=1 if classes in {None, ADE20K} else 0,
    )
    known = open_classes(labels)
    if len(known) != sizes.num_classes:
        raise CheckpointError(
            f"{source}: {sizes.num_classes} classes, {shown(classes or ADE20K)} has {len(known)}; give the names of "
            "these, a class per line, as --classes"
        )
    model = build_segmentor(ViT(vit), sizes)
    fill(model, ours, source)
    side = vit.img_size[0]
    provenance = {"converted_from": source, "layout": "mmsegmentation UperNet, MAE backbone"}
    export_segmentor(out, model, known, labels, (SCALE * side, side), InferenceKeys().settled(side), provenance)
    return report


def segmentor_to_mmseg(folder: Path, out: Path) -> ConversionReport:
    """Write the weights of a segmentor directory under mmsegmentation's names.

    As .pth with `state_dict` and the names and colours of the classes, as mmsegmentation reads it, or as .safetensors.

    Raises: ConfigError for another kind of file; CheckpointError for a segmentor that mmsegmentation does not have.
    """
    if out.suffix not in SUFFIXES:
        raise ConfigError(
            f"{shown(out)}: a segmentor directory becomes a file of mmsegmentation's names; name it "
            f"{' or '.join(SUFFIXES)}"
        )
    loaded = load_segmentor(folder)
    if not isinstance(loaded.model, Segmentor):
        raise CheckpointError(f"{shown(folder)}: a linear head, which mmsegmentation does not have; expected UperNet")
    try:
        state, report = to_mmseg(loaded.model.state_dict(), loaded.model.backbone.config)
    except CheckpointError as error:
        raise CheckpointError(f"{shown(folder)}: {error}") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, _encoded({name: tensor.contiguous() for name, tensor in state.items()}, loaded, out.suffix))
    return report


def _encoded(state: dict[str, Tensor], loaded: LoadedSegmentor, suffix: str) -> bytes:
    if suffix == ".safetensors":
        return save(state)
    colours = [list(colour) for colour in loaded.classes.palette]
    meta = {"dataset_meta": {"classes": loaded.classes.names, "palette": colours}}
    file = io.BytesIO()
    torch.save({"meta": meta, "state_dict": state}, file)
    return file.getvalue()
