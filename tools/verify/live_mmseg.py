"""Segmentors beside mmsegmentation itself, with the weights and inputs of the golden files.

Imported only where mmsegmentation can be, after `mmseg_engine.operators.stand_in`.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from mmengine.structures import PixelData
from mmseg.engine.optimizers import LayerDecayOptimizerConstructor
from mmseg.evaluation import IoUMetric
from mmseg.structures import SegDataSample
from torch import Tensor

from tools.verify.golden import part, read_golden
from tools.verify.measure import Measure, close, exact, gradient, same_names
from tools.verify.parameter_groups import compared, segmentor_groups_of
from tools.verify.segmentation_data import SEEDS, recipe, swapped
from tools.verify.segmentation_model import SLIDE, image_logits, segmentor_of
from tools.verify.segmentation_parts import IGNORED, inputs_of
from transfer.segmentation.augment import augment
from transfer.segmentation.losses import pixel_accuracy_pct, pixel_cross_entropy
from transfer.segmentation.miou import confusion_matrix, scores_of
from transfer.segmentation.mmseg_engine.data import training_pipeline
from transfer.segmentation.mmseg_engine.model import mmseg_segmentor
from transfer.segmentation.slide import image_labels
from transfer.segmentation.weights import from_mmseg


class Twins:
    """The same segmentor here and in mmsegmentation, without dropout."""

    def __init__(self, folder: Path) -> None:
        self.golden, self.meta = read_golden(folder, "segmentation_slide")
        self.ours = segmentor_of(self.golden, self.meta)
        self.theirs = mmseg_segmentor(self.ours, SLIDE).eval()


def samples_of(labels: Tensor) -> list[SegDataSample]:
    """Labels [B, H, W] as mmsegmentation has them."""
    return [SegDataSample(gt_sem_seg=PixelData(data=label[None].long())) for label in labels]


@torch.no_grad()
def neck(folder: Path) -> Iterator[Measure]:
    """Four maps of four strides in evaluation and in training, and the running statistics afterwards."""
    twins = Twins(folder)
    maps = inputs_of(read_golden(folder, "segmentation_neck")[0], "pyramid.input")
    for when in ("evaluation", "training"):
        ours, theirs = twins.ours.neck.train(when == "training"), twins.theirs.neck.train(when == "training")
        for i, (found, expected) in enumerate(zip(ours(maps), theirs(tuple(maps)), strict=True)):
            yield close(f"map {i} in {when}", found, expected, 1e-4)
    after = from_mmseg({f"neck.{name}": buffer for name, buffer in theirs.named_buffers()})[0]
    for name, buffer in ours.named_buffers():
        yield close(f"running statistics, {name}", buffer, after[f"neck.{name}"], 1e-4)


@torch.no_grad()
def heads(folder: Path) -> Iterator[Measure]:
    """Scores of the decode head and of the auxiliary head."""
    twins, maps = Twins(folder), inputs_of(read_golden(folder, "segmentation_head")[0])
    yield close("decode head", twins.ours.decode_head(maps), twins.theirs.decode_head(tuple(maps)), 1e-4)
    expected = twins.theirs.auxiliary_head(tuple(maps))
    yield close("auxiliary head", twins.ours.auxiliary_head(maps[2]), expected, 1e-4)


@torch.no_grad()
def losses(folder: Path) -> Iterator[Measure]:
    """Cross entropy and accuracy of given scores, also where every pixel is ignored."""
    twins = Twins(folder)
    golden, meta = read_golden(folder, "segmentation_loss")
    modules = {"main": twins.theirs.decode_head, "aux": twins.theirs.auxiliary_head}
    weights = {"main": 1.0, "aux": meta["config"]["aux_weight"]}
    for where, labels in (("labels", golden["label"]), ("nothing", torch.full_like(golden["label"], IGNORED))):
        for name, head in modules.items():
            logits = golden[f"logits.{name}"]
            expected = head.loss_by_feat(logits, samples_of(labels))
            found = weights[name] * pixel_cross_entropy(logits, labels, "all_pixels", IGNORED)
            yield close(f"{name}, {where}", found, expected["loss_ce"], 1e-4)
            if where == "labels":
                accuracy = pixel_accuracy_pct(logits, labels, IGNORED)
                yield close(f"{name}, accuracy", accuracy, expected["acc_seg"][0], 1e-4)


def training(folder: Path) -> Iterator[Measure]:
    """Losses, the gradient of every weight, running statistics.

    In float64: in float32 rounding alone moves single gradients by a hundredth, where it decides a ReLU.
    """
    twins = Twins(folder)
    model, theirs, given = twins.ours.double().train(), twins.theirs.double().train(), part(twins.golden, "train.")
    images = given["input"].double()
    found = model.losses(images, given["label"])
    expected = theirs.loss(images, samples_of(given["label"]))
    wanted = {"loss_decode": expected["decode.loss_ce"], "loss_aux": expected["aux.loss_ce"]}
    yield same_names("names of losses", found, wanted)
    for name, loss in found.items():
        yield close(name, loss.double(), wanted[name].double(), 1e-4)
    for of_one in (found, wanted):
        torch.stack(list(of_one.values())).sum().backward()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    names = from_mmseg(theirs.state_dict())[1].mapped
    for name, parameter in theirs.named_parameters():
        wanted_gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        yield gradient(f"gradient of {name}", parameters[names[name]].grad, wanted_gradient)
    for name, buffer in theirs.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            yield close(f"running statistics, {name}", buffers[names[name]], buffer, 1e-4)


@torch.no_grad()
def sliding_window(folder: Path) -> Iterator[Measure]:
    """Scores of whole images, and their prediction at another size."""
    twins = Twins(folder)
    for case in ("wide", "tall"):
        images = twins.golden[f"input.{case}"]
        size = (images.shape[2], images.shape[3])
        expected = twins.theirs.slide_inference(images, [{"img_shape": size}])
        yield close(f"{case}, scores", image_logits(twins.ours, images, SLIDE), expected, 1e-3)
    height, width = twins.meta["config"]["final_size"]
    images = twins.golden["input.wide"]
    shape = (images.shape[2], images.shape[3])
    sample = SegDataSample(metainfo={"ori_shape": (height, width), "img_shape": shape, "pad_shape": shape})
    (predicted,) = twins.theirs.predict(images, [sample])
    found = image_labels(twins.ours, [images], (height, width), SLIDE)
    yield exact("wide, prediction", found[0].long(), predicted.pred_sem_seg.data[0].long())


def metric(folder: Path) -> Iterator[Measure]:
    """Counts, IoU and accuracies of one image and of two."""
    golden, meta = read_golden(folder, "segmentation_metric")
    ignore_index = meta["config"]["ignore_index"]
    for case in ("toy", "two_images"):
        prediction, label = golden[f"{case}.prediction"], golden[f"{case}.label"]
        confusion = confusion_matrix(prediction, label, 6, ignore_index)
        areas = IoUMetric.intersect_and_union(prediction, label, 6, ignore_index)
        intersection, label_pixels, prediction_pixels = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        union = label_pixels + prediction_pixels - intersection
        counts = (intersection, union, prediction_pixels, label_pixels)
        for name, found, expected in zip(
            ("intersection", "union", "predicted", "labelled"), counts, areas, strict=True
        ):
            yield exact(f"{case}, {name}", found, expected.long())
        scores, expected = scores_of(confusion), IoUMetric.total_area_to_metrics(*areas)
        for name, value in (("IoU", scores.iou), ("Acc", scores.acc), ("aAcc", torch.tensor(scores.aacc))):
            wanted = torch.as_tensor(np.asarray(expected[name])).to(value.dtype)
            yield close(f"{case}, {name}", value, wanted, 1e-5, nan=True)


def augmentation(folder: Path) -> Iterator[Measure]:
    """Resize, crop, flip and colours in order, for ten seeds."""
    tensors, meta = read_golden(folder, "segmentation_augment")
    image, label = tensors["input.image"].numpy(), tensors["input.label"].numpy()
    config, crop = recipe(meta["config"]), meta["config"]["crop"]
    pipeline = training_pipeline(config, crop, IGNORED)
    state = np.random.get_state()
    for seed in SEEDS:
        np.random.seed(seed)
        given = {"img": image.copy(), "gt_seg_map": label.copy(), "seg_fields": ["gt_seg_map"]}
        expected = pipeline({**given, "img_shape": label.shape, "ori_shape": label.shape})
        moved, moved_label = augment(swapped(image), label, crop, IGNORED, config, np.random.RandomState(seed))
        found = torch.from_numpy(swapped(moved)).permute(2, 0, 1)
        yield exact(f"image, seed {seed}", found, expected["inputs"])
        wanted = expected["data_samples"].gt_sem_seg.data[0]
        yield exact(f"label, seed {seed}", torch.from_numpy(moved_label).long(), wanted.long())
    np.random.set_state(state)


def groups(folder: Path) -> Iterator[Measure]:
    """Rates and weight decay of every parameter."""
    twins = Twins(folder)
    depth = len(twins.ours.backbone.blocks)
    settings = {"type": "OptimWrapper", "optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.05}}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints every group
        constructor = LayerDecayOptimizerConstructor(settings, {"num_layers": depth, "layer_decay_rate": 0.65})
        wrapper = constructor(twins.theirs)
    theirs = {id(parameter): name for name, parameter in twins.theirs.named_parameters()}
    expected = {
        theirs[id(p)]: (group["lr"], group["weight_decay"])
        for group in wrapper.optimizer.param_groups
        for p in group["params"]
    }
    names = {ours: name for name, ours in from_mmseg(twins.theirs.state_dict())[1].mapped.items()}
    yield from compared("tiny", segmentor_groups_of(twins.ours, depth, 0.65, names), expected)
