"""Whole segmentors: windows, scores, predictions, training; their backbone; against mmsegmentation."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.vit import ViT
from tools.verify.golden import Golden, part, read_golden
from tools.verify.measure import Measure, close, exact, gradient
from tools.verify.segmentation_parts import IGNORED, gradient_norms
from transfer.segmentation.losses import pixel_accuracy_pct
from transfer.segmentation.segmentor import Segmentor, SegmentorConfig, build_segmentor
from transfer.segmentation.slide import (
    HasLogits,
    ImageScores,
    InferenceConfig,
    image_labels,
    image_scores,
    labels_of,
    window_starts,
)
from transfer.segmentation.weights import from_mmseg, sizes_of

SLIDE, WHOLE = InferenceConfig(crop=64, stride=43), InferenceConfig(mode="whole")


def segmentor_of(golden: Golden, meta: dict[str, Any]) -> Segmentor:
    """The reference's segmentor, through the weight converter; in evaluation mode, without dropout."""
    state, _ = from_mmseg(part(golden, "weight."))
    vit_config, found = sizes_of(state)
    assert (found.channels, found.aux_channels) == (meta["config"]["channels"], meta["config"]["aux_channels"])
    config = SegmentorConfig(**{**dict(found), "dropout_ratio": 0.0, "blocks": tuple(meta["config"]["out_indices"])})
    model = build_segmentor(ViT(vit_config), config)
    model.load_state_dict(state)
    return model.eval()


def whole_scores(scores: ImageScores) -> Tensor:
    """All scores at once, [B, K, H, W]."""
    B, H, W, K = len(scores.values), len(scores.rows), len(scores.columns), scores.values.shape[-1]
    whole = torch.full((B, H, W, K), torch.nan)
    for rows, columns, block in scores.blocks():
        whole[:, rows, columns] = block
    return whole.permute(0, 3, 1, 2)


def image_logits(model: HasLogits, images: Tensor, config: InferenceConfig = WHOLE) -> Tensor:
    """Scores of every pixel, [B, K, H, W]."""
    return whole_scores(image_scores(model, images, config))


def scores_at_size(values: Tensor) -> ImageScores:
    """Scores [B, K, H, W] that are those of pixels already."""
    return ImageScores(values.permute(0, 2, 3, 1), torch.eye(values.shape[2]), torch.eye(values.shape[3]))


@torch.no_grad()
def sliding_window(folder: Path) -> Iterator[Measure]:
    """Positions of windows; scores and prediction of whole images; scales and flips merged."""
    golden, meta = read_golden(folder, "segmentation_slide")
    yield from _windows(golden)
    model = segmentor_of(golden, meta)
    first = image_logits(model, golden["input.wide"][..., :64])
    yield close("first window", _every_second(first), golden["first_window.logits_every_second"], 1e-3)
    for case in ("wide", "tall"):
        scores = image_logits(model, golden[f"input.{case}"], SLIDE)
        yield close(f"{case}, scores", _every_second(scores), golden[f"{case}.logits_every_second"], 1e-3)
    height, width = meta["config"]["final_size"]
    final = whole_scores(image_scores(model, golden["input.wide"], SLIDE).at((height, width)))
    yield close("wide, final scores", _every_second(final)[0], golden["wide.final_logits_every_second"], 1e-3)
    prediction = image_labels(model, [golden["input.wide"]], (height, width), SLIDE)
    yield exact("wide, prediction", prediction[0], golden["wide.prediction"].long())
    views = [scores_at_size(golden[f"merge.input{i}"]) for i in range(4)]
    found = labels_of([(view.mirrored() if i % 2 else view).at((25, 36)) for i, view in enumerate(views)])[0]
    decided = golden["merge.undecided"] == 0
    yield exact("merged views", found[decided], golden["merge.prediction"].long()[decided])


def _every_second(scores: Tensor) -> Tensor:
    return scores[:, :, ::2, ::2].contiguous()


def _windows(golden: Golden) -> Iterator[Measure]:
    expected: dict[tuple[int, ...], list[list[int]]] = {}
    for row in golden["windows"].tolist():
        expected.setdefault(tuple(row[:4]), []).append(row[4:])
    yield exact("sizes of windows", len(expected), 7)
    for (crop, stride, height, width), windows in expected.items():
        tops, lefts = window_starts(height, crop, stride), window_starts(width, crop, stride)
        found = [[top, left, crop, crop] for top in tops for left in lefts]
        yield exact(f"windows of {crop} every {stride} on {height}x{width}", found, windows)


def training(folder: Path) -> Iterator[Measure]:
    """Losses, accuracies, gradients and running statistics of one training pass."""
    golden, meta = read_golden(folder, "segmentation_slide")
    model, expected = segmentor_of(golden, meta).train(), part(golden, "train.")
    losses = model.losses(expected["input"], expected["label"])
    yield close("loss of the decode head", losses["loss_decode"], expected["decode.loss_ce"], 1e-4)
    yield close("loss of the auxiliary head", losses["loss_aux"], expected["aux.loss_ce"], 1e-4)
    torch.stack(list(losses.values())).sum().backward()
    parameters = dict(model.named_parameters())
    names = {old: new for old, new in from_mmseg(part(golden, "weight."))[1].mapped.items() if new in parameters}
    gradients = {theirs: parameters[ours].grad for theirs, ours in names.items()}
    norms = dict(zip(meta["gradient_names"], expected["grad_norm"].tolist(), strict=True))
    yield from gradient_norms(gradients, norms)
    for name, value in part(expected, "grad.").items():
        yield gradient(f"gradient of {name}", gradients[name], value)
    norm = model.neck.upsample_4x[1]
    for name in ("running_mean", "running_var"):
        after = expected[f"after.neck.upsample_4x.1.{name}"]
        yield close(name.replace("_", " "), getattr(norm, name), after, 1e-4)
    yield from _accuracies(golden, meta)


def _accuracies(golden: Golden, meta: dict[str, Any]) -> Iterator[Measure]:
    model, expected = segmentor_of(golden, meta).train(), part(golden, "train.")
    with torch.no_grad():
        maps = model.features(expected["input"])
        scores = {"decode": model.decode_head(maps), "aux": model.auxiliary_head(maps[2])}
    for name, logits in scores.items():
        accuracy = pixel_accuracy_pct(logits, expected["label"], IGNORED)
        yield close(f"accuracy of {name}, per cent", accuracy, expected[f"{name}.acc_seg"][0], 1e-2)
