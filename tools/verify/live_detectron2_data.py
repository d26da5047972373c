"""What of detection is no network beside detectron2 itself: selection, masks, jitter, sizes, rates, schedules.

Imported only where detectron2 can be.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.layers.mask_ops import paste_masks_in_image
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from detectron2.structures import Boxes
from fvcore.common.param_scheduler import MultiStepParamScheduler

from core.optim import warmup_multistep
from tools.verify.detection_data import JITTER_SEEDS, objects_of
from tools.verify.golden import part, read_golden, read_json
from tools.verify.live_detectron2 import Twins
from tools.verify.measure import Measure, close, exact
from tools.verify.parameter_groups import DECAY_RULES, compared, detector_config, detector_groups_of
from transfer.detection.inference import select
from transfer.detection.jitter import Draws, JitterConfig, eval_size, jitter, jittered_size
from transfer.detection.masks import paste_masks

OF_RULE: dict[str, dict] = {  # what the published configurations tell its constructor of groups
    "B": {"weight_decay_norm": 0.0, "overrides": {"pos_embed": {"weight_decay": 0.0}}},
    "H": {"weight_decay_norm": None, "overrides": {}},
}


def selection(folder: Path) -> Iterator[Measure]:
    """Threshold, suppression class by class, limit."""
    golden, _ = read_golden(folder, "detection_inference_mask_rcnn")
    given = part(golden, "select.input.")
    height, width = given["image_size"].tolist()
    for kind, boxes in (("", given["boxes"]), ("agnostic, ", given["boxes"][:, :4])):
        chosen = {"score_threshold": 0.05, "nms_threshold": 0.5}
        found = select(boxes, given["probabilities"], given["image_size"], **chosen, limit=100)
        (instances,), (kept,) = fast_rcnn_inference(
            [boxes], [given["probabilities"]], [(height, width)], 0.05, 0.5, 100
        )
        yield close(f"{kind}boxes", found.boxes, instances.pred_boxes.tensor, 1e-2)
        yield close(f"{kind}scores", found.scores, instances.scores, 5e-4)
        yield exact(f"{kind}classes", found.labels, instances.pred_classes)
        yield exact(f"{kind}regions", found.region, kept)


def pasting(folder: Path) -> Iterator[Measure]:
    """Soft masks as bitmaps of an image."""
    golden, meta = read_golden(folder, "detection_paste")
    height, width = meta["config"]["output"]
    masks, boxes = golden["input.masks"], golden["input.boxes"]
    expected = paste_masks_in_image(masks, Boxes(boxes), (height, width), threshold=0.5)
    yield exact("masks", paste_masks(masks, boxes, (height, width)), expected)


def jittered(folder: Path) -> Iterator[Measure]:
    """Pixels of a picture jittered ten times."""
    golden, _ = read_golden(folder, "detection_lsj")
    image, objects = golden["input.image"], objects_of(golden)
    theirs = T.AugmentationList(
        [T.RandomFlip(horizontal=True), T.ResizeScale(0.1, 2.0, 80, 80), T.FixedSizeCrop((80, 80), pad=False)]
    )
    state = np.random.get_state()
    for seed in JITTER_SEEDS:
        np.random.seed(seed)
        given = T.AugInput(image.numpy().copy())
        theirs(given)
        draws = Draws(*golden[f"seed{seed}.draws"].tolist())
        moved, _ = jitter(image.permute(2, 0, 1), objects, 80, JitterConfig(), draws)
        expected = torch.from_numpy(np.ascontiguousarray(given.image.transpose(2, 0, 1)))
        yield exact(f"pixels, seed {seed}", moved, expected)
    np.random.set_state(state)


def resizes(folder: Path) -> Iterator[Measure]:
    """Sizes of the evaluation and of the jitter."""
    table = read_json(folder, "detection_resize_table")
    for size, _ in table["test_resize"]["rows"]:
        expected = T.ResizeShortestEdge.get_output_shape(size[0], size[1], 1024, 1024)
        yield exact(f"evaluation size of {size}", eval_size(size, 1024), expected)
    theirs = T.ResizeScale(0.1, 2.0, 1024, 1024)
    for size, scale, _ in table["scale_jitter"]["rows"]:
        transform = theirs._get_resize(np.broadcast_to(np.uint8(0), (size[0], size[1], 3)), scale)
        expected = (transform.new_h, transform.new_w)
        yield exact(f"size of {size} at {scale}", jittered_size(size, 1024, scale), expected)


def groups(folder: Path) -> Iterator[Measure]:
    """Rates and weight decay of every parameter of both kinds of detector, by both published rules."""
    for kind in ("mask_rcnn", "cascade"):
        twins = Twins(folder, f"losses_{kind}")
        names = {id(parameter): name for name, parameter in twins.theirs.named_parameters()}
        for letter, rule in DECAY_RULES.items():
            config = detector_config(0.7, rule)
            theirs = get_default_optimizer_params(
                twins.theirs, base_lr=1.0, weight_decay=config.weight_decay, **OF_RULE[letter],
                lr_factor_func=partial(get_vit_lr_decay_rate, lr_decay_rate=0.7, num_layers=twins.config["depth"]),
            )  # fmt: skip
            expected = {names[id(p)]: (group["lr"], group.get("weight_decay", config.weight_decay))
                        for group in theirs for p in group["params"]}  # fmt: skip
            yield from compared(f"{kind}, rule {letter}", detector_groups_of(config, twins.ours), expected)


def schedules(folder: Path) -> Iterator[Measure]:
    """Factor of the rate at every stored iteration of the published recipes."""
    for name, recipe in read_json(folder, "detection_schedule")["recipes"].items():
        share, last = recipe["iterations"] / 184375, recipe["iterations"]
        drops = MultiStepParamScheduler([1.0, 0.1, 0.01], milestones=recipe["milestones"], num_updates=last)
        theirs = WarmupParamScheduler(drops, 0.001, 250 / 184375)
        for step, _ in recipe["multiplier"]:
            found = warmup_multistep(step, warmup_steps=250 * share, start=0.001, milestones=recipe["milestones"])
            yield close(f"{name}, iteration {step}", found, theirs(step / last), 1e-9)
