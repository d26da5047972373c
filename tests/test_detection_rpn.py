"""Pyramid and region proposals: golden values of detectron2, and what must hold besides."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from core.errors import NumericError
from tests.golden_files import require
from tools.verify.detection_backbone import ReferenceRPN, pyramid, rpn
from tools.verify.detection_reference import STRIDES, fixed_permutation, no_targets
from tools.verify.golden import FOLDER
from tools.verify.measure import Measure
from transfer.detection.pyramid import LayerNorm2d, SimpleFeaturePyramid
from transfer.detection.rpn import RPN, RPNConfig, RPNOutput
from transfer.detection.targets import Targets


def truth(boxes: Tensor) -> Targets:
    return Targets(boxes, torch.zeros(len(boxes), dtype=torch.int64), [[]] * len(boxes))


# ---- golden values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compared", [pyramid, rpn], ids=["pyramid", "rpn"])
def test_golden(compared: Callable[[Path], Iterator[Measure]]) -> None:
    require(compared(FOLDER))


def test_proposals_are_no_path_for_gradients() -> None:
    reference = ReferenceRPN(FOLDER)
    module = reference.rpn()
    output = module(reference.features)
    assert output.logits.requires_grad
    for training in (True, False):
        assert not any(found.boxes.requires_grad for found in module.proposals(output, reference.sizes, training))


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
