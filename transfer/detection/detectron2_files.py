"""Files of detectron2's ViTDet as detector directories, and back. The names are those of `weights.py`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from core.backbone_io import fill
from core.errors import CheckpointError, ConfigError, shown
from core.files import replace_file
from core.vit import ViT
from transfer.detection.coco_names import Categories
from transfer.detection.detector import export_detector, load_detector
from transfer.detection.mask_rcnn import build_mask_rcnn
from transfer.detection.weights import ConversionReport, from_detectron2, sizes_of, to_detectron2

# How the published .pkl files, pickles of NumPy arrays, become a file without code in it.
FROM_PICKLE = (
    'python -c "import pickle, sys, numpy, safetensors.numpy as s; '
    "s.save_file({k: numpy.ascontiguousarray(v) for k, v in pickle.load(open(sys.argv[1], 'rb'), encoding='latin1')"
    "['model'].items()}, sys.argv[2])\" IN.pkl OUT.safetensors"
)


def is_detectron2(state: Mapping[str, Any]) -> bool:
    """Whether these are names of a detectron2 ViTDet."""
    return any(name.startswith(("backbone.net.", "proposal_generator.")) for name in state)


def refuse_pickle(path: Path) -> None:
    """Raise CheckpointError for a .pkl: reading one runs whatever it says."""
    if path.suffix == ".pkl":
        raise CheckpointError(f"{shown(path)}: a pickle can run any code; where you trust it: {FROM_PICKLE}")


def detector_from_detectron2(
    state: Mapping[str, Tensor], categories: Categories, out: Path, source: str
) -> ConversionReport:
    """Write weights under detectron2's names as a detector directory.

    Thresholds and numbers of regions leave no trace in weights: the detector has ViTDet's. The side of its images is
    that of its relative positions.

    Args:
        source: the printable name of the file that they come from.
    Raises: CheckpointError for weights that are not those of a ViTDet, or of another number of classes; NumericError.
    """
    try:
        ours, report = from_detectron2(state)
        vit_config, config = sizes_of(ours)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    if config.num_classes != len(categories.names):
        raise CheckpointError(
            f"{source}: {config.num_classes} classes, {categories.origin} has {len(categories.names)}; "
            "give the JSON that it was trained on as --names-json"
        )
    model = build_mask_rcnn(ViT(vit_config), config)
    fill(model, ours, source)
    assert vit_config.rel_pos_grid is not None, "sizes_of needs relative positions"
    side = max(vit_config.rel_pos_grid) * vit_config.patch_size
    provenance = {"converted_from": source, "layout": "detectron2 ViTDet"}
    export_detector(out, model, config, categories.names, categories.ids, side, provenance)
    return report


def detector_to_detectron2(folder: Path, out: Path) -> ConversionReport:
    """Write the weights of a detector directory under detectron2's names, as safetensors."""
    if out.suffix != ".safetensors":
        raise ConfigError(
            f"{shown(out)}: a detector directory becomes a file of detectron2's names; name it .safetensors"
        )
    state, report = to_detectron2(load_detector(folder).model.state_dict())
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, save({name: tensor.contiguous() for name, tensor in state.items()}))
    return report
