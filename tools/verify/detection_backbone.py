"""The ViT of detectors, the feature pyramid and the region proposal network, against detectron2."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.vit import Block, ViT, ViTConfig, drop_path_scales, resize_pos_embed
from tools.verify.detection_reference import LEVELS, STRIDES, fixed_permutation, load_part, no_targets
from tools.verify.golden import Golden, part, read_golden
from tools.verify.measure import Measure, close, exact
from transfer.detection.boxes import pairwise_iou
from transfer.detection.pyramid import LayerNorm2d, SimpleFeaturePyramid
from transfer.detection.rpn import MATCHER, RPN, RPNConfig
from transfer.detection.targets import Targets


def block_of(golden: Golden, meta: dict[str, Any], case: str) -> tuple[Block, tuple[int, int]]:
    """The reference's transformer block of a case (window, everywhere, resized_tables), and the grid of its input."""
    sizes = meta["config"]["block"]
    window = sizes["cases"][case]["window_size"] or None
    rows, columns = sizes["cases"][case]["grid"]
    table = (window, window) if window else tuple(sizes["cases"][case]["input_size"])
    block = Block(sizes["dim"], sizes["num_heads"], sizes["mlp_ratio"], window, table)
    block.load_state_dict(part(golden, f"block.{case}.weight."))
    return block.eval().requires_grad_(False), (rows, columns)


def vit_of(golden: Golden, meta: dict[str, Any]) -> ViT:
    """The reference's ViT with windows."""
    sizes = meta["config"]["vit"]
    side, grid = sizes["pretrain_img_size"], (sizes["grid"], sizes["grid"])
    config = ViTConfig(
        img_size=(side, side), patch_size=sizes["patch_size"], embed_dim=sizes["embed_dim"], depth=sizes["depth"],
        num_heads=sizes["num_heads"], class_token=False, window_size=sizes["window_size"],
        global_blocks=tuple(sizes["global_blocks"]), rel_pos_grid=grid,
    )  # fmt: skip
    vit = ViT(config)
    vit.load_state_dict(part(golden, "vit.weight."))
    return vit


@torch.no_grad()
def windowed_vit(folder: Path) -> Iterator[Measure]:
    """Blocks with and without windows, with resized tables; a ViT of them on a square and a rectangle; drop path."""
    golden, meta = read_golden(folder, "detection_vit")
    for case in ("window", "everywhere", "resized_tables"):
        block, grid = block_of(golden, meta, case)
        x = golden[f"block.{case}.input"].flatten(1, 2)  # [B, N, D]
        if f"block.{case}.attention_output" in golden:
            attended = block.attn(x, grid=grid).unflatten(1, grid)
            yield close(f"attention, {case}", attended, golden[f"block.{case}.attention_output"], 1e-4)
        yield close(f"block, {case}", block(x, grid=grid).unflatten(1, grid), golden[f"block.{case}.output"], 1e-4)
    vit = vit_of(golden, meta)
    for case in ("square", "rectangle"):
        images = golden[f"vit.{case}.input"]
        first, last = vit.feature_maps(images, [0, vit.config.depth - 1])
        yield close(f"{case}, last block", last, golden[f"vit.{case}.last_feat"], 1e-4)
        yield close(f"{case}, block 0", first.permute(0, 2, 3, 1), golden[f"vit.{case}.block0_output"], 1e-4)
        new = (images.shape[-2] // vit.config.patch_size, images.shape[-1] // vit.config.patch_size)
        position = resize_pos_embed(vit.pos_embed, vit.config.grid, new)[:, 1:].unflatten(1, new)
        yield close(f"{case}, positions", position, golden[f"vit.{case}.position"], 1e-4)
    rates = golden["vit.drop_path_rates"]
    rate, depth = meta["config"]["vit"]["drop_path_rate"], vit.config.depth
    scales = drop_path_scales(rate, depth, 1000, torch.Generator().manual_seed(0))
    yield close("drop path", 1 - 1 / scales.amax(dim=(1, 2, 3, 4)), rates.float(), 1e-6)


@torch.no_grad()
def pyramid(folder: Path) -> Iterator[Measure]:
    """Five maps from one, of an even and an odd map; the channel norm where there is next to no variance."""
    golden, meta = read_golden(folder, "detection_pyramid")
    module = SimpleFeaturePyramid(meta["config"]["in_channels"], meta["config"]["out_channels"])
    load_part(module, part(golden, "weight."), "backbone.", "backbone.pyramid.")
    for case in ("even", "odd"):
        for level, found in zip(LEVELS, module(golden[f"{case}.input"]), strict=True):
            yield close(f"{case}, {level}", found, golden[f"{case}.{level}"], 1e-4)
    norm = LayerNorm2d(8)
    norm.load_state_dict(part(golden, "channel_norm.weight."))
    yield close("channel norm", norm(golden["channel_norm.input"]), golden["channel_norm.output"], 1e-3)


class ReferenceRPN:
    """The reference's region proposal network on its features."""

    def __init__(self, folder: Path) -> None:
        self.golden, self.meta = read_golden(folder, "detection_rpn")
        self.features = [self.golden[f"input.{level}"] for level in LEVELS]
        self.sizes = self.golden["input.image_sizes"]
        self.targets = [self._truth(self.golden[f"input.image{i}.gt_boxes"]) for i in range(2)]

    @staticmethod
    def _truth(boxes: Tensor) -> Targets:
        return Targets(boxes, torch.zeros(len(boxes), dtype=torch.int64), [[]] * len(boxes))

    def rpn(self, **changes: object) -> RPN:
        """It, with other settings than the stored ones."""
        config = self.meta["config"]
        limits = {
            f"{kind}_nms_topk_{when}": n
            for kind in ("pre", "post")
            for when, n in zip(config["topk_order"], config[f"{kind}_nms_topk"], strict=True)
        }
        rpn = RPN(RPNConfig(**{**limits, **changes}), config["channels"], STRIDES)
        load_part(rpn, part(self.golden, "weight."), "proposal_generator.", "rpn.")
        return rpn


@torch.no_grad()
def rpn(folder: Path) -> Iterator[Measure]:
    """Head, labels and samples of anchors, losses, proposals of training and of a test."""
    reference = ReferenceRPN(folder)
    module, golden = reference.rpn(), reference.golden
    output = module(reference.features)
    for level in ("p4", "p5", "p6"):
        logits, deltas = module.head(golden[f"input.{level}"])
        yield close(f"logits of {level}", logits, golden[f"head.{level}.objectness"], 1e-4)
        yield close(f"deltas of {level}", deltas, golden[f"head.{level}.deltas"], 1e-4)
    for i, target in enumerate(reference.targets):
        index, labels = MATCHER(pairwise_iou(target.boxes, output.anchors))
        expected = part(golden, f"train.image{i}.")
        yield exact(f"labels of image {i}", labels, expected["labels"])
        matched = expected["matched_index"].long()
        yield exact(f"matches of image {i}", index[labels == 1], matched[labels == 1])
        positive, negative = module.sample(labels, fixed_permutation)
        yield exact(f"positive samples of image {i}", positive, expected["sampled_positive"])
        yield exact(f"negative samples of image {i}", negative, expected["sampled_negative"])
    yield from _rpn_losses(reference)
    for when in ("train", "test"):
        for i, found in enumerate(module.proposals(output, reference.sizes, training=when == "train")):
            yield close(f"{when}, logits of image {i}", found.logits, golden[f"{when}.image{i}.logits"], 1e-4)
            yield close(f"{when}, proposals of image {i}", found.boxes, golden[f"{when}.image{i}.proposals"], 1e-2)


def _rpn_losses(reference: ReferenceRPN) -> Iterator[Measure]:
    golden, many = reference.golden, reference.meta["config"]["exhaustive_batch_size_per_image"]
    nothing = [no_targets(), no_targets()]
    cases = {
        "train": (reference.rpn(), reference.targets),
        "exhaustive": (reference.rpn(batch_size_per_image=many), reference.targets),
        "no_gt": (reference.rpn(), nothing),
    }
    for case, (module, targets) in cases.items():
        losses = module.losses(module(reference.features), targets, fixed_permutation)
        for name, loss in losses.items():
            yield close(f"{case}, {name}", loss, golden[f"{case}.{name}"], 1e-5)
    module = reference.rpn()
    labels = MATCHER(pairwise_iou(torch.zeros(0, 4), module(reference.features).anchors))[1]
    positive, negative = module.sample(labels, fixed_permutation)
    yield exact("positive samples without ground truth", len(positive), 0)
    yield exact("negative samples without ground truth", negative, golden["no_gt.image0.sampled_negative"])
