"""Neck, heads, cross entropy and scores of segmentors, against mmsegmentation."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tools.verify.golden import Golden, part, read_golden
from tools.verify.measure import Measure, close, exact, gradient, relative, same_names
from transfer.segmentation.losses import pixel_accuracy_pct, pixel_cross_entropy
from transfer.segmentation.miou import confusion_matrix, scores_of
from transfer.segmentation.necks import Feature2Pyramid
from transfer.segmentation.upernet import FCNHead, UPerHead
from transfer.segmentation.weights import from_mmseg

IGNORED = 255
NUM_CLASSES = 7


def neck_of(golden: Golden) -> Feature2Pyramid:
    """The reference's neck."""
    state, _ = from_mmseg({f"neck.{name}": tensor for name, tensor in part(golden, "pyramid.weight.").items()})
    neck = Feature2Pyramid(48)
    neck.load_state_dict(part(state, "neck."))
    return neck


def heads_of(golden: Golden) -> nn.ModuleDict:
    """Decode head and auxiliary head by their names, without dropout."""
    state, _ = from_mmseg(part(golden, "weight."))
    decode_head = UPerHead(48, 32, NUM_CLASSES, (1, 2, 3, 6), 0.0)
    heads = nn.ModuleDict(
        {"decode_head": decode_head, "auxiliary_head": FCNHead(48, 16, NUM_CLASSES, dropout_ratio=0.0)}
    )
    heads.load_state_dict(state)
    return heads


def inputs_of(golden: Golden, prefix: str = "input") -> list[Tensor]:
    """The four maps that a neck or a head is given."""
    return [golden[f"{prefix}{i}"] for i in range(4)]


def neck(folder: Path) -> Iterator[Measure]:
    """Four maps of four strides in evaluation; batch statistics and what becomes of the running ones in training."""
    golden, _ = read_golden(folder, "segmentation_neck")
    module, maps = neck_of(golden).requires_grad_(False), inputs_of(golden, "pyramid.input")
    outputs = module.eval()([x[:1] for x in maps])
    for i in (0, 1, 3):
        yield close(f"map {i}", outputs[i], golden[f"pyramid.eval.output{i}"], 1e-4)
    yield exact("map 2", outputs[2], maps[2][:1])
    yield close("map 0 in training", module.train()(maps)[0], golden["pyramid.train.output0"], 1e-4)
    buffers, after = dict(module.named_buffers()), part(golden, "pyramid.train.after.")
    for name in ("running_mean", "running_var"):
        yield close(name.replace("_", " "), buffers[f"upsample_4x.1.{name}"], after[f"upsample_4x.1.{name}"], 1e-4)


def heads(folder: Path) -> Iterator[Measure]:
    """Scores of the decode head and of the auxiliary head, pyramid pooling of large and of small maps."""
    golden, _ = read_golden(folder, "segmentation_head")
    modules, maps = heads_of(golden).eval().requires_grad_(False), inputs_of(golden)
    yield close("decode head", modules["decode_head"](maps), golden["decode_head.logits"], 1e-4)
    yield close("auxiliary head", modules["auxiliary_head"](maps[2]), golden["auxiliary_head.logits"], 1e-4)
    pooled = modules.get_submodule("decode_head.ppm")
    yield close("pyramid pooling, large", pooled(golden["ppm.big.input"]), golden["ppm.big.output"], 1e-4)
    yield close("pyramid pooling, small", pooled(golden["input3"]), golden["ppm.small.output"], 1e-4)


def losses(folder: Path) -> Iterator[Measure]:
    """Cross entropy of given scores, of ignored pixels, of the heads in training with their gradients."""
    golden, meta = read_golden(folder, "segmentation_loss")
    labels, weight = golden["label"], meta["config"]["aux_weight"]
    main, aux = golden["logits.main"], golden["logits.aux"]
    expected = part(golden, "given_logits.")
    found = {
        "decode": pixel_cross_entropy(main, labels, "all_pixels", IGNORED),
        "aux": weight * pixel_cross_entropy(aux, labels, "all_pixels", IGNORED),
    }
    for name, loss in found.items():
        yield close(f"given scores, {name}", loss, expected[f"{name}.loss_ce"], 1e-4)
    usual = pixel_cross_entropy(main, labels, "valid_pixels", IGNORED)
    yield close("mean over valid pixels", usual, golden["not_this.mean_over_valid_pixels"], 1e-4)
    for logits, name in ((main, "decode"), (aux, "aux")):
        accuracy = pixel_accuracy_pct(logits, labels, IGNORED)
        yield close(f"given scores, accuracy of {name}", accuracy, expected[f"{name}.acc_seg"][0], 1e-4)
    nothing = pixel_cross_entropy(main, torch.full_like(labels, IGNORED), "all_pixels", IGNORED)
    yield close("ignored pixels", nothing, golden["all_ignored.decode.loss_ce"], 0.0)
    yield from _heads_in_training(golden, meta["gradient_names"], weight)


def _heads_in_training(golden: Golden, gradient_names: list[str], weight: float) -> Iterator[Measure]:
    modules, maps = heads_of(golden).train(), [x.requires_grad_() for x in inputs_of(golden)]
    labels, expected = golden["label"], part(golden, "train.")
    scores = {"decode": modules["decode_head"](maps), "aux": modules["auxiliary_head"](maps[2])}
    found = {name: pixel_cross_entropy(x, labels, "all_pixels", IGNORED) for name, x in scores.items()}
    found["aux"] = weight * found["aux"]
    for name, loss in found.items():
        yield close(f"training, {name}", loss, expected[f"{name}.loss_ce"], 1e-4)
        accuracy = pixel_accuracy_pct(scores[name], labels, IGNORED)
        yield close(f"training, accuracy of {name}", accuracy, expected[f"{name}.acc_seg"][0], 1e-4)
    (found["decode"] + found["aux"]).backward()
    for i, x in enumerate(maps):
        yield gradient(f"gradient of map {i}", x.grad, expected[f"grad.input{i}"])
    names = from_mmseg(part(golden, "weight."))[1].mapped
    parameters, buffers = dict(modules.named_parameters()), dict(modules.named_buffers())
    gradients = {theirs: parameters[ours].grad for theirs, ours in names.items() if ours in parameters}
    yield from gradient_norms(gradients, dict(zip(gradient_names, expected["grad_norm"].tolist(), strict=True)))
    after = part(expected, "after.")
    yield exact("running statistics", len(after), 2 * sum(isinstance(m, nn.BatchNorm2d) for m in modules.modules()))
    for name, buffer in after.items():
        yield close(f"running statistics, {name}", buffers[names[name]], buffer, 1e-4)


def gradient_norms(found: dict[str, Tensor | None], expected: dict[str, float]) -> Iterator[Measure]:
    """Norms of gradients by name."""
    yield same_names("names of gradients", found, expected)
    for name, norm in expected.items():
        value = found.get(name)
        length = torch.inf if value is None else value.double().norm().item()
        yield relative(f"gradient norm of {name}", length, norm, 1e-2, plus=1e-6)


def metric(folder: Path) -> Iterator[Measure]:
    """Confusion matrices of whole numbers, IoU and accuracies, of one image and of two."""
    golden, meta = read_golden(folder, "segmentation_metric")
    for case in ("toy", "two_images"):
        expected = part(golden, f"{case}.")
        pairs = zip(expected["prediction"], expected["label"], strict=True)
        parts = [confusion_matrix(found, label, 6, meta["config"]["ignore_index"]) for found, label in pairs]
        confusion = torch.stack(parts).sum(dim=0)
        counts = {
            "intersection": confusion.diagonal(),
            "label_pixels": confusion.sum(1),
            "prediction_pixels": confusion.sum(0),
        }
        counts["union"] = counts["label_pixels"] + counts["prediction_pixels"] - counts["intersection"]
        for name, count in counts.items():
            yield exact(f"{case}, {name}", count, expected[name].long())
        scores = scores_of(confusion)
        yield close(f"{case}, IoU", scores.iou, expected["IoU"], 1e-5, nan=True)
        yield close(f"{case}, accuracy", scores.acc, expected["Acc"], 1e-5, nan=True)
        yield close(f"{case}, accuracy of all pixels", scores.aacc, float(expected["aAcc"]), 1e-5)
        for found, name in ((scores.aacc, "aAcc"), (scores.miou, "mIoU"), (scores.macc, "mAcc")):
            rounded = float(np.round(100 * found, 2))
            yield close(f"{case}, {name} as printed", rounded, float(expected[f"rounded.{name}"]), 1e-5)
