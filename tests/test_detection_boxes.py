"""Boxes, anchors, matching, sampling, pooling: golden values of detectron2, and what must hold besides."""

import math
from pathlib import Path

import pytest
import torch

from tests.detection_golden import fixed_permutation, load_golden
from transfer.detection.anchors import AnchorGenerator
from transfer.detection.boxes import BoxCoder, clip, nonempty, pairwise_iou, scale
from transfer.detection.matching import Matcher, random_permutation, sample
from transfer.detection.pooling import RoiPooler
from transfer.detection.pyramid import strides_of
from transfer.detection.rpn import MATCHER

LEVELS = ("p2", "p3", "p4", "p5", "p6")
STRIDES = strides_of(16)
ANCHORS = AnchorGenerator((32, 64, 128, 256, 512), (0.5, 1, 2), STRIDES)
CPU = torch.device("cpu")


# ---- golden values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["square", "rectangle"])
def test_anchors(shared: Path, case: str) -> None:
    golden, _ = load_golden(shared, "anchors")
    grids = [tuple(golden[f"{case}.grid.{level}"].tolist()) for level in LEVELS]
    for level, anchors in zip(LEVELS, ANCHORS(grids, CPU), strict=True):
        torch.testing.assert_close(anchors, golden[f"{case}.{level}"], atol=1e-4, rtol=0)


def test_anchors_of_a_cell_and_of_a_whole_image(shared: Path) -> None:
    golden, _ = load_golden(shared, "anchors")
    full = ANCHORS([(1024 // stride, 1024 // stride) for stride in STRIDES], CPU)
    for i, level in enumerate(LEVELS):
        torch.testing.assert_close(torch.tensor(ANCHORS.cell_anchors(i)), golden[f"cell.{level}"], atol=1e-4, rtol=0)
        assert len(full[i]) == golden["full.count"][i]
        torch.testing.assert_close(full[i][:4], golden["full.first"][i], atol=1e-4, rtol=0)
        torch.testing.assert_close(full[i][-4:], golden["full.last"][i], atol=1e-4, rtol=0)
        torch.testing.assert_close(full[i].double().sum(dim=0), golden["full.sum"][i], atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("case", range(4))
def test_box_coder(shared: Path, case: int) -> None:
    golden, _ = load_golden(shared, "box_coder")
    source, target = golden["source"], golden["target"]
    coder = BoxCoder(tuple(golden[f"case{case}.weights"].tolist()))
    encoded = coder.encode(source, target)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(encoded, golden[f"case{case}.encoded"], **close)
    torch.testing.assert_close(coder.decode(encoded, source), golden[f"case{case}.roundtrip"], **close)
    decoded = coder.decode(golden[f"case{case}.deltas"], source)
    torch.testing.assert_close(decoded, golden[f"case{case}.decoded"], **close)


@pytest.mark.parametrize("matrix", ["hand", "random", "no_gt", "unreachable_gt"])
def test_matcher(shared: Path, matrix: str) -> None:
    golden, _ = load_golden(shared, "matcher")
    matchers = {
        "rpn": MATCHER,
        **{
            name: Matcher((threshold,), (0, 1))
            for name, threshold in {"roi": 0.5, "cascade1": 0.6, "cascade2": 0.7}.items()
        },
    }
    for name, matcher in matchers.items():
        index, labels = matcher(golden[f"{matrix}.iou"])
        assert torch.equal(index, golden[f"{matrix}.{name}.index"])
        assert torch.equal(labels.long(), golden[f"{matrix}.{name}.label"])


def test_iou(shared: Path) -> None:
    golden, _ = load_golden(shared, "matcher")
    torch.testing.assert_close(
        pairwise_iou(golden["pairs.a"], golden["pairs.b"]), golden["pairs.iou"], atol=1e-6, rtol=0
    )


def test_numbers_of_samples(shared: Path) -> None:
    golden, _ = load_golden(shared, "matcher")
    for positives, negatives, requested, percent, num_positive, num_negative in golden["sampler.counts"].tolist():
        labels = torch.cat([torch.ones(positives), torch.zeros(negatives), torch.full((5,), -1)]).long()
        chosen = sample(labels, requested, percent / 100, 0, fixed_permutation)
        assert [len(rows) for rows in chosen] == [num_positive, num_negative]
        assert (labels[chosen[0]] == 1).all() and (labels[chosen[1]] == 0).all()


def test_levels_of_regions(shared: Path) -> None:
    golden, _ = load_golden(shared, "pooler")
    pool = RoiPooler(STRIDES)
    assert torch.equal(pool.assign_levels(golden["levels.boxes"]), golden["levels.level"])
    assert torch.equal(pool.assign_levels(golden["levels.random_boxes"]), golden["levels.random_level"])


@pytest.mark.parametrize("size", [7, 14])
def test_pooled_regions(shared: Path, size: int) -> None:
    golden, _ = load_golden(shared, "pooler")
    features = [golden[f"input.{level}"] for level in LEVELS[:4]]
    per_image = [golden["input.image0.boxes"], golden["input.image1.boxes"]]
    boxes = torch.cat(per_image)
    image = torch.tensor([0] * len(per_image[0]) + [1] * len(per_image[1]))
    pool = RoiPooler(STRIDES)
    torch.testing.assert_close(pool(features, boxes, image, size), golden[f"pooled{size}"], atol=1e-4, rtol=0)
    alone = pool(features, per_image[1][:2], torch.ones(2, dtype=torch.int64), size)
    torch.testing.assert_close(alone, golden[f"pooled{size}.second_image_only"], atol=1e-4, rtol=0)


# ---- what must hold besides -----------------------------------------------------------------------------------------


def random_boxes(n: int, seed: int = 0, side: float = 100) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator) * side
    return torch.cat([corner, corner + 1 + torch.rand(n, 2, generator=generator) * side], dim=1)


def test_deltas_lead_to_their_target() -> None:
    source, target = random_boxes(20, 0), random_boxes(20, 1)
    coder = BoxCoder((10, 10, 5, 5))
    torch.testing.assert_close(coder.decode(coder.encode(source, target), source), target, atol=1e-4, rtol=1e-5)


def test_a_box_grows_by_at_most_1000_over_16_and_may_shrink_to_nothing() -> None:
    coder = BoxCoder((1, 1, 1, 1))
    box = torch.tensor([[0.0, 0, 16, 16]])
    grown = coder.decode(torch.tensor([[0.0, 0, 1e4, 1e4]]), box)
    torch.testing.assert_close(grown[0, 2:] - grown[0, :2], torch.tensor([1000.0, 1000]))
    shrunk = coder.decode(torch.tensor([[0.0, 0, -1e4, -1e4]]), box)
    assert not nonempty(shrunk)[0] and shrunk.isfinite().all()


def test_boxes_are_decoded_in_float32() -> None:
    decoded = BoxCoder((1, 1, 1, 1)).decode(torch.zeros(1, 4, dtype=torch.bfloat16), torch.tensor([[0, 0, 1001.0, 3]]))
    assert decoded.dtype == torch.float32 and decoded.tolist() == [[0, 0, 1001, 3]]


def test_boxes_are_clipped_to_their_own_image() -> None:
    boxes = torch.tensor([[[-5.0, -5, 50, 60], [10, 20, 30, 40]]] * 2)
    sizes = torch.tensor([[20, 30], [100, 25]])
    expected = [[[0, 0, 30, 20], [10, 20, 30, 20]], [[0, 0, 25, 60], [10, 20, 25, 40]]]
    clipped = clip(boxes, sizes.unsqueeze(1))
    assert clipped.tolist() == expected
    assert nonempty(clipped).tolist() == [[True, False], [True, True]]


def test_scaled_boxes() -> None:
    assert scale(torch.tensor([[1.0, 2, 3, 4]]), (10, 20), (30, 10)).tolist() == [[0.5, 6, 1.5, 12]]


def test_iou_of_boxes_without_area_and_of_nothing() -> None:
    point, box = torch.zeros(1, 4), torch.tensor([[0.0, 0, 2, 2]])
    assert pairwise_iou(point, torch.cat([point, box])).tolist() == [[0, 0]]
    assert pairwise_iou(box, box).tolist() == [[1]]
    assert pairwise_iou(point[:0], box).shape == (0, 1)


def test_iou_of_stacked_boxes_is_that_of_each_stack() -> None:
    a, b = random_boxes(6).view(2, 3, 4), random_boxes(8, 1).view(2, 4, 4)
    stacked = pairwise_iou(a, b)
    assert all(torch.equal(stacked[i], pairwise_iou(a[i], b[i])) for i in range(2))


def test_low_quality_matches_keep_their_own_best_ground_truth() -> None:
    iou = torch.tensor(
        [[0.6, 0.65, 0.64], [0.5, 0.4, 0.2]]
    )  # box 0 is the best that truth 1 has; truth 0 is better for it
    index, labels = MATCHER(iou)
    assert index.tolist() == [0, 0, 0] and labels.tolist() == [1, 1, -1]


def test_samples_are_drawn_from_the_generator_given() -> None:
    labels = torch.tensor([1] * 50 + [0] * 200 + [-1] * 50)
    before = torch.random.get_rng_state()
    drawn = [sample(labels, 32, 0.5, 0, random_permutation(torch.Generator().manual_seed(s))) for s in (3, 3, 4)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not torch.equal(drawn[0][1], drawn[2][1])
    assert all(len(set(rows.tolist())) == 16 for rows in drawn[0])


def test_regions_of_no_size_are_pooled_from_the_finest_map() -> None:
    assert RoiPooler(STRIDES).assign_levels(torch.zeros(1, 4)).tolist() == [2]


def test_levels_follow_the_patch_side() -> None:
    boxes = random_boxes(100, side=600)
    assert strides_of(8) == (2, 4, 8, 16, 32)
    assert torch.equal(RoiPooler(strides_of(8)).assign_levels(boxes / 2), RoiPooler(STRIDES).assign_levels(boxes))
    with pytest.raises(ValueError, match="patch_size=14"):
        strides_of(14)


def test_no_regions_are_pooled_to_nothing_with_a_gradient() -> None:
    features = [torch.ones(1, 3, 2 * s, 2 * s, requires_grad=True) for s in (8, 4, 2, 1)]
    pooled = RoiPooler(STRIDES)(features, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 7)
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()
    assert all(feature.grad is not None and not feature.grad.any() for feature in features)


def test_sizes_of_anchors() -> None:
    for box in torch.tensor(ANCHORS.cell_anchors(2)):
        width, height = box[2] - box[0], box[3] - box[1]
        assert math.isclose(width * height, 128**2, rel_tol=1e-6)
