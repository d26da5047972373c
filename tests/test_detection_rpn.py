"""Pyramid and region proposals: golden values of detectron2, and what must hold besides."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from core.errors import NumericError
from tests.detection_golden import Golden, fixed_permutation, load_golden, no_targets, part
from transfer.detection.boxes import pairwise_iou
from transfer.detection.pyramid import LayerNorm2d, SimpleFeaturePyramid, strides_of
from transfer.detection.rpn import MATCHER, RPN, RPNConfig, RPNOutput
from transfer.detection.targets import Targets
from transfer.detection.weights import from_detectron2

LEVELS = ("p2", "p3", "p4", "p5", "p6")
STRIDES = strides_of(16)
CLOSE = {"atol": 1e-4, "rtol": 0.0}


def loaded(module: nn.Module, golden: Golden, theirs: str, ours: str) -> nn.Module:
    """A part of the detector with the reference's weights, which are those of the names `weight.<...>`."""
    state, _ = from_detectron2({f"{theirs}{key}": value for key, value in part(golden, "weight.").items()})
    module.load_state_dict(part(state, ours))
    return module.eval()


def truth(boxes: Tensor) -> Targets:
    return Targets(boxes, torch.zeros(len(boxes), dtype=torch.int64), [[]] * len(boxes))


# ---- golden values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["even", "odd"])
def test_pyramid(shared: Path, case: str) -> None:
    golden, meta = load_golden(shared, "pyramid")
    config = meta["config"]
    pyramid = SimpleFeaturePyramid(config["in_channels"], config["out_channels"])
    loaded(pyramid, golden, "backbone.", "backbone.pyramid.")
    with torch.no_grad():
        maps = pyramid(golden[f"{case}.input"])
    for level, found in zip(LEVELS, maps, strict=True):
        torch.testing.assert_close(found, golden[f"{case}.{level}"], **CLOSE)


def test_channel_norm(shared: Path) -> None:
    golden, _ = load_golden(shared, "pyramid")
    norm = LayerNorm2d(8)
    norm.load_state_dict(part(golden, "channel_norm.weight."))
    found = norm(golden["channel_norm.input"])
    torch.testing.assert_close(found, golden["channel_norm.output"], atol=1e-3, rtol=0)


class Reference:
    """The reference's RPN on its features."""

    def __init__(self, shared: Path) -> None:
        self.golden, self.meta = load_golden(shared, "rpn")
        self.features = [self.golden[f"input.{level}"] for level in LEVELS]
        self.sizes = self.golden["input.image_sizes"]
        self.targets = [truth(self.golden[f"input.image{i}.gt_boxes"]) for i in range(2)]

    def rpn(self, **changes: object) -> RPN:
        config = self.meta["config"]
        limits = {
            f"{kind}_nms_topk_{when}": n
            for kind in ("pre", "post")
            for when, n in zip(config["topk_order"], config[f"{kind}_nms_topk"], strict=True)
        }
        rpn = RPN(RPNConfig(**{**limits, **changes}), config["channels"], STRIDES)
        loaded(rpn, self.golden, "proposal_generator.", "rpn.")
        return rpn


@pytest.fixture(scope="module")
def reference(shared: Path) -> Reference:
    return Reference(shared)


def test_head(reference: Reference) -> None:
    rpn = reference.rpn()
    for level in ("p4", "p5", "p6"):
        logits, deltas = rpn.head(reference.golden[f"input.{level}"])
        torch.testing.assert_close(logits, reference.golden[f"head.{level}.objectness"], **CLOSE)
        torch.testing.assert_close(deltas, reference.golden[f"head.{level}.deltas"], **CLOSE)


def test_labels_and_samples_of_anchors(reference: Reference) -> None:
    rpn, golden = reference.rpn(), reference.golden
    anchors = rpn(reference.features).anchors
    for i, target in enumerate(reference.targets):
        index, labels = MATCHER(pairwise_iou(target.boxes, anchors))
        assert torch.equal(labels, golden[f"train.image{i}.labels"])
        positive = labels == 1
        assert torch.equal(index[positive], golden[f"train.image{i}.matched_index"].long()[positive])
        chosen = rpn.sample(labels, fixed_permutation)
        assert torch.equal(chosen[0], golden[f"train.image{i}.sampled_positive"])
        assert torch.equal(chosen[1], golden[f"train.image{i}.sampled_negative"])


def test_losses(reference: Reference) -> None:
    rpn, golden = reference.rpn(), reference.golden
    losses = rpn.losses(rpn(reference.features), reference.targets, fixed_permutation)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, golden[f"train.{name}"], atol=1e-5, rtol=0)


def test_losses_of_every_labelled_anchor(reference: Reference) -> None:
    many = reference.meta["config"]["exhaustive_batch_size_per_image"]
    rpn = reference.rpn(batch_size_per_image=many)
    losses = rpn.losses(rpn(reference.features), reference.targets, fixed_permutation)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, reference.golden[f"exhaustive.{name}"], atol=1e-5, rtol=0)


def test_losses_without_ground_truth(reference: Reference) -> None:
    rpn, golden = reference.rpn(), reference.golden
    output = rpn(reference.features)
    losses = rpn.losses(output, [no_targets(), no_targets()], fixed_permutation)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, golden[f"no_gt.{name}"], atol=1e-5, rtol=0)
    labels = MATCHER(pairwise_iou(torch.zeros(0, 4), output.anchors))[1]
    positive, negative = rpn.sample(labels, fixed_permutation)
    assert len(positive) == 0 and torch.equal(negative, golden["no_gt.image0.sampled_negative"])


@pytest.mark.parametrize("when", ["train", "test"])
def test_proposals(reference: Reference, when: str) -> None:
    rpn = reference.rpn()
    proposals = rpn.proposals(rpn(reference.features), reference.sizes, training=when == "train")
    for i, found in enumerate(proposals):
        torch.testing.assert_close(found.logits, reference.golden[f"{when}.image{i}.logits"], **CLOSE)
        expected = reference.golden[f"{when}.image{i}.proposals"]
        torch.testing.assert_close(found.boxes, expected, atol=1e-2, rtol=0)
        assert not found.boxes.requires_grad


# ---- what must hold besides -----------------------------------------------------------------------------------------


def tiny_rpn(**changes: object) -> tuple[RPN, list[Tensor]]:
    """An RPN and features of two images of 64 px."""
    generator = torch.Generator().manual_seed(0)
    rpn = RPN(RPNConfig(**{"batch_size_per_image": 32, **changes}), 8, STRIDES)
    rpn.init_weights(generator)
    features = [torch.randn(2, 8, n, n, generator=generator) for n in (16, 8, 4, 2, 1)]
    return rpn, features


def test_a_batch_is_its_images_one_by_one() -> None:
    rpn, features = tiny_rpn()
    sizes = torch.tensor([[64, 48], [40, 64]])
    targets = [truth(torch.tensor([[4.0, 4, 40, 44]])), no_targets()]
    with torch.no_grad():
        together = rpn(features)
        losses = rpn.losses(together, targets, fixed_permutation)
        alone = [rpn([f[i : i + 1] for f in features]) for i in range(2)]
        of_each = [rpn.losses(alone[i], [targets[i]], fixed_permutation) for i in range(2)]
    for name, loss in losses.items():
        torch.testing.assert_close(loss, (of_each[0][name] + of_each[1][name]) / 2)
    for i, found in enumerate(rpn.proposals(together, sizes, training=True)):
        (expected,) = rpn.proposals(alone[i], sizes[i : i + 1], training=True)
        torch.testing.assert_close(found.boxes, expected.boxes)
        torch.testing.assert_close(found.logits, expected.logits)


def output_of(boxes: Tensor, logits: Tensor) -> RPNOutput:
    """An output whose anchors are the boxes wanted, all on one level."""
    return RPNOutput(logits[None], torch.zeros(1, len(boxes), 4), boxes, [len(boxes)])


def test_proposals_that_are_not_finite_stop_a_training_and_are_left_out_of_a_test() -> None:
    rpn, _ = tiny_rpn()
    output = output_of(torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]]), torch.tensor([1.0, 2.0]))
    output.deltas[0, 1, 0] = torch.nan
    size = torch.tensor([[64, 64]])
    with pytest.raises(NumericError, match="not finite"):
        rpn.proposals(output, size, training=True)
    (found,) = rpn.proposals(output, size, training=False)
    assert found.boxes.tolist() == [[0, 0, 10, 10]] and found.logits.tolist() == [1]
    output.logits[0, 0] = torch.inf
    (found,) = rpn.proposals(output, size, training=False)
    assert found.boxes.shape == (0, 4)


def test_logits_beyond_a_sigmoid_keep_their_order() -> None:
    rpn, _ = tiny_rpn()
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40], [50, 50, 60, 60]])
    (found,) = rpn.proposals(output_of(boxes, torch.tensor([40.0, 60, 50])), torch.tensor([[64, 64]]), training=False)
    assert found.logits.tolist() == [60, 50, 40]


def test_proposals_outside_the_image_are_dropped() -> None:
    rpn, _ = tiny_rpn()
    output = output_of(torch.tensor([[40.0, 0, 60, 10], [-9, -9, 5, 5]]), torch.tensor([2.0, 1.0]))
    (found,) = rpn.proposals(output, torch.tensor([[64, 32]]), training=True)
    assert found.boxes.tolist() == [[0, 0, 5, 5]]


def test_initial_weights_come_from_the_generator_given() -> None:
    before = torch.random.get_rng_state()
    with torch.random.fork_rng():
        modules = [nn.ModuleDict({"rpn": tiny_rpn()[0], "pyramid": SimpleFeaturePyramid(16, 8)}) for _ in range(2)]
    for module in modules:
        generator = torch.Generator().manual_seed(1)
        module["rpn"].init_weights(generator)
        module["pyramid"].init_weights(generator)
    assert torch.equal(before, torch.random.get_rng_state())
    states = [module.state_dict() for module in modules]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert states[0]["rpn.head.convs.0.weight"].std() == pytest.approx(0.01, rel=0.1)
    weight = states[0]["pyramid.p2.up1.weight"]  # the default's bound is 1 / sqrt(fan in), of a (in, out, k, k) weight
    assert weight.abs().max() <= (8 * 2 * 2) ** -0.5 and weight.std() == pytest.approx((8 * 4 * 3) ** -0.5, rel=0.1)


def test_the_channel_norm_is_float32_under_autocast_and_copies_no_channels_last_map() -> None:
    x = torch.randn(1, 4, 5, 8).permute(0, 3, 1, 2)  # what a ViT's map is like
    with torch.autocast("cpu", torch.bfloat16):
        normed = LayerNorm2d(8)(x.bfloat16())
    assert normed.dtype == torch.float32 and normed.is_contiguous(memory_format=torch.channels_last)
