"""Layer-wise rates and weight decay of every parameter, against the official code, detectron2 and mmsegmentation."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from core.config import load_config
from core.optim import decays_but_biases, layer_decay_groups
from core.vit import ViT, ViTConfig
from pretrain.presets import ENCODERS
from tools.verify.golden import part, read_golden, read_json
from tools.verify.measure import Measure, exact, relative, same_names
from tools.verify.segmentation_model import segmentor_of
from transfer.classification.model import Classifier, Pool
from transfer.detection.mask_rcnn import MaskRCNN, build_mask_rcnn
from transfer.detection.settings import DetectConfig, parameter_groups
from transfer.detection.weights import from_detectron2, sizes_of, to_detectron2
from transfer.segmentation.segmentor import SegmentorConfig, build_segmentor
from transfer.segmentation.weights import from_mmseg, to_mmseg

Groups = dict[str, tuple[float, float]]  # factor of the rate and weight decay, by the reference's name
PUBLISHED_SEGMENTOR = ViTConfig(
    img_size=(512, 512), patch_size=16, embed_dim=768, depth=12, num_heads=12,
    rel_pos_bias=True, layer_scale=True, final_norm=False,
)  # fmt: skip
CLASSIFIERS: dict[str, tuple[str, Pool]] = {"vit_base_pool": ("base", "mean"), "vit_base_class_token": ("base", "cls"),
               "vit_large_pool": ("large", "mean"), "vit_huge_pool": ("huge", "mean")}  # fmt: skip
DECAY_RULES = {"B": "vitdet", "H": "vitdet_huge"}


def compared(what: str, found: Groups, expected: Groups) -> Iterator[Measure]:
    """Factors to 1e-9 relative, weight decay exactly."""
    yield same_names(f"{what}, names", found, expected)
    shared = [name for name in expected if name in found]
    of = {text: torch.tensor([groups[name] for name in shared], dtype=torch.float64)
          for text, groups in (("found", found), ("expected", expected))}  # fmt: skip
    yield relative(f"{what}, factors", of["found"][:, 0], of["expected"][:, 0], 1e-9)
    yield exact(f"{what}, weight decay", of["found"][:, 1], of["expected"][:, 1])


def by_text(grouped: dict[str, list[str]]) -> Groups:
    """Names stored under the text "factor decay"."""
    pairs = {text: tuple(map(float, text.split())) for text in grouped}
    return {name: (pairs[text][0], pairs[text][1]) for text, names in grouped.items() for name in names}


def classifier_groups(folder: Path) -> Iterator[Measure]:
    """The fine-tuning groups of ViT-B, L and H."""
    for case, golden in read_json(folder, "classify_layer_decay").items():
        if case not in CLASSIFIERS:
            continue
        size, pool = CLASSIFIERS[case]
        config = ViTConfig(img_size=(224, 224), **ENCODERS[size])
        with torch.device("meta"):
            model = Classifier(config, 1000, pool)
        groups = layer_decay_groups(model.named_parameters(), config.depth, golden["layer_decay"], 0.05)
        of = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
        yield exact(f"{case}, groups", len(groups), golden["groups"])
        expected = golden.get("parameters") or by_text(next(v for v in golden.values() if isinstance(v, dict)))
        yield from compared(case, {name: of[id(p)] for name, p in model.named_parameters()}, expected)


def detector_groups_of(config: DetectConfig, model: MaskRCNN) -> Groups:
    """The groups of a detector by detectron2's names."""
    theirs = to_detectron2(dict(model.named_parameters()))[1].mapped
    names = {parameter: theirs[name] for name, parameter in model.named_parameters()}
    groups = parameter_groups(config, model)
    found = {names[p]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(names), "every parameter in one group"
    return found


def detector_config(layer_decay: float, rule: str) -> DetectConfig:
    """A recipe with this decay of rates and this rule of weight decay."""
    keys = ["data=x", "out=y", "backbone=z", f"layer_decay={layer_decay}", f"decay_rule={rule}"]
    return load_config(DetectConfig, None, keys)


def detector_groups(folder: Path) -> Iterator[Measure]:
    """Mask R-CNN and Cascade, by the rule of the B and L recipes and by that of H."""
    stored = read_json(folder, "detection_param_groups")
    for kind in ("mask_rcnn", "cascade"):
        state, _ = from_detectron2(part(read_golden(folder, f"detection_losses_{kind}")[0], "weight."))
        vit_config, detector = sizes_of(state)
        with torch.device("meta"):
            model = build_mask_rcnn(ViT(vit_config), detector)
        for letter, rule in DECAY_RULES.items():
            golden = stored[f"tiny_{kind}_{letter}_rule"]
            found = detector_groups_of(detector_config(golden["layer_decay"], rule), model)
            yield from compared(f"{kind}, rule {letter}", found, golden["parameters"])


def segmentor_groups_of(model: nn.Module, depth: int, layer_decay: float, names: dict[str, str]) -> Groups:
    """The groups of a segmentor by mmsegmentation's names."""
    by_parameter = {parameter: names[name] for name, parameter in model.named_parameters()}
    groups = layer_decay_groups(
        model.named_parameters(), depth, layer_decay, 0.05, prefix="backbone.", decays=decays_but_biases
    )
    return {by_parameter[p]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}


def segmentor_groups(folder: Path) -> Iterator[Measure]:
    """A tiny segmentor, and the published one on ViT-B."""
    stored = read_json(folder, "segmentation_param_groups")
    tiny, base = stored["tiny_mae"], stored["mae_base"]
    golden, meta = read_golden(folder, "segmentation_slide")
    names = {ours: theirs for theirs, ours in from_mmseg(part(golden, "weight."))[1].mapped.items()}
    found = segmentor_groups_of(segmentor_of(golden, meta), tiny["depth"], tiny["layer_decay"], names)
    yield from compared("tiny", found, tiny["parameters"])
    with torch.device("meta"):
        model = build_segmentor(ViT(PUBLISHED_SEGMENTOR), SegmentorConfig())
    yield exact("parameters of ViT-B", sum(p.numel() for p in model.parameters()), base["parameters"])
    names = to_mmseg(model.state_dict(), PUBLISHED_SEGMENTOR)[1].mapped
    found = segmentor_groups_of(model, 12, 0.65, names)
    yield from compared("ViT-B", found, by_text(base["lr_factor_and_weight_decay_to_names"]))
