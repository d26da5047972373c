"""The whole detector: detectron2's losses, gradients and detections through the weight converter."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.errors import CheckpointError
from core.task import Place
from core.vit import ViT, ViTConfig
from tests.detection_golden import (
    Golden,
    batch_of,
    detector_of,
    fixed_permutation,
    load_golden,
    no_targets,
    part,
    targets_of,
    unpacked,
)
from transfer.detection import cascade
from transfer.detection.box_head import box_losses
from transfer.detection.boxes import BoxCoder, pairwise_iou
from transfer.detection.mask_rcnn import DetectorConfig, MaskRCNN, build_mask_rcnn
from transfer.detection.masks import mask_targets
from transfer.detection.matching import random_permutation
from transfer.detection.pyramid import strides_of
from transfer.detection.roi_heads import FIRST_THRESHOLD, ROIHeadsConfig
from transfer.detection.rois import LabelledRois, SampledRois, sample_rois
from transfer.detection.rpn import MATCHER, RPNConfig
from transfer.detection.targets import PaddedTruth, Targets
from transfer.detection.weights import from_detectron2, sizes_of, to_detectron2

KINDS = ["mask_rcnn", "cascade"]


class Reference:
    """The reference's detector in training, with all that it found on the way."""

    def __init__(self, shared: Path, name: str) -> None:
        self.golden, self.meta = load_golden(shared, name)
        self.config = self.meta["config"]
        self.model = detector_of(self.golden, self.config)
        self.images, self.sizes = batch_of(self.golden, self.config)

    def losses(self, targets: list[Targets]) -> dict[str, Tensor]:
        return self.model.losses(self.images, self.sizes, targets, fixed_permutation)


@pytest.fixture(scope="module", params=KINDS)
def training(shared: Path, request: pytest.FixtureRequest) -> Reference:
    return Reference(shared, f"losses_{request.param}")


@pytest.fixture(scope="module", params=KINDS)
def inference(shared: Path, request: pytest.FixtureRequest) -> Reference:
    return Reference(shared, f"inference_{request.param}")


# ---- golden values --------------------------------------------------------------------------------------------------


def assert_losses(found: dict[str, Tensor], golden: Golden, prefix: str) -> None:
    expected = {k: v for k, v in part(golden, prefix).items() if k.startswith("loss_")}
    assert found.keys() == expected.keys()
    for name, loss in found.items():
        torch.testing.assert_close(loss, expected[name], atol=1e-4, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def test_losses_and_gradients(training: Reference) -> None:
    model, golden = training.model, training.golden
    model.zero_grad()
    losses = training.losses(targets_of(golden))
    assert_losses(losses, golden, "expected.")
    sum(losses.values()).backward()
    names = dict(model.named_parameters())
    theirs = to_detectron2({name: torch.zeros(0) if p.grad is None else p.grad for name, p in names.items()})[0]
    for name, norm in zip(training.meta["gradient_names"], golden["expected.grad_norm"].tolist(), strict=True):
        assert theirs[name].double().norm().item() == pytest.approx(norm, rel=1e-2, abs=1e-6), name
    for name, expected in part(golden, "expected.grad.").items():
        assert (theirs[name] - expected).norm() <= 1e-2 * (expected.norm() + 1e-6), name


def test_losses_with_bitmaps(training: Reference) -> None:
    loss = training.losses(targets_of(training.golden, bitmaps=True))["loss_mask"]
    torch.testing.assert_close(loss, training.golden["expected.bitmap.loss_mask"], atol=1e-3, rtol=0)


@pytest.mark.parametrize("case", ["second_image_without_gt", "no_gt"])
def test_losses_of_images_without_ground_truth(training: Reference, case: str) -> None:
    targets = [targets_of(training.golden)[0] if case != "no_gt" else no_targets(), no_targets()]
    assert_losses(training.losses(targets), training.golden, f"{case}.")


def sampled(training: Reference, targets: list[Targets]) -> tuple[list[Tensor], SampledRois]:
    """Candidates of each image (proposals, then ground truth), and the ROIs drawn from them."""
    model, config = training.model, training.config
    with torch.no_grad():
        output = model.rpn(model.backbone(training.images))
        proposals = [found.boxes for found in model.rpn.proposals(output, training.sizes, training=True)]
    rois = sample_rois(
        proposals,
        PaddedTruth.of(targets),
        threshold=FIRST_THRESHOLD,
        num_classes=config["classes"],
        batch_size_per_image=config["roi_batch_size_per_image"],
        positive_fraction=config["roi_positive_fraction"],
        permutation=fixed_permutation,
    )
    return [torch.cat([boxes, target.boxes]) for boxes, target in zip(proposals, targets, strict=True)], rois


def of_image(rois: LabelledRois, i: int) -> LabelledRois:
    return rois[rois.image == i]


def test_proposals_and_sampled_regions(training: Reference) -> None:
    golden, targets = training.golden, targets_of(training.golden)
    with torch.no_grad():
        output = training.model.rpn(training.model.backbone(training.images))
        proposals = training.model.rpn.proposals(output, training.sizes, training=True)
    candidates, rois = sampled(training, targets)
    for i in range(2):
        expected = part(golden, f"expected.image{i}.")
        torch.testing.assert_close(proposals[i].logits, expected["logits"], atol=1e-4, rtol=0)
        torch.testing.assert_close(proposals[i].boxes, expected["proposals"], atol=1e-2, rtol=0)
        chosen = torch.cat([expected["roi_sampled_foreground"], expected["roi_sampled_background"]])
        found = of_image(rois.all, i)
        assert torch.equal(found.boxes, candidates[i][chosen])
        assert torch.equal(found.labels, expected["roi_classes"])
        torch.testing.assert_close(found.boxes, expected["roi_boxes"], atol=1e-2, rtol=0)
        assert rois.num_objects[i] == len(expected["roi_sampled_foreground"])


def test_sampled_regions_of_images_without_ground_truth(training: Reference) -> None:
    for case, targets in (
        ("second_image_without_gt", [targets_of(training.golden)[0], no_targets()]),
        ("no_gt", [no_targets(), no_targets()]),
    ):
        candidates, rois = sampled(training, targets)
        for i in range(2):
            expected = part(training.golden, f"{case}.image{i}.")
            chosen = torch.cat([expected["roi_sampled_foreground"], expected["roi_sampled_background"]])
            assert torch.equal(of_image(rois.all, i).boxes, candidates[i][chosen])


def test_sampled_anchors(training: Reference) -> None:
    rpn, golden = training.model.rpn, training.golden
    with torch.no_grad():
        anchors = rpn(training.model.backbone(training.images)).anchors
    for i, target in enumerate(targets_of(golden)):
        positive, negative = rpn.sample(MATCHER(pairwise_iou(target.boxes, anchors))[1], fixed_permutation)
        assert torch.equal(positive, golden[f"expected.image{i}.rpn_sampled_positive"])
        assert torch.equal(negative, golden[f"expected.image{i}.rpn_sampled_negative"])


def test_mask_targets_of_the_sampled_regions(training: Reference) -> None:
    golden, targets = training.golden, targets_of(training.golden)
    rois = sampled(training, targets)[1]
    objects = rois.objects
    drawn = mask_targets(targets, rois.num_objects, objects.instances, objects.boxes, 28, torch.device("cpu"))
    assert torch.equal(drawn, golden["expected.mask_targets"].bool())


def test_regions_that_enter_each_stage_of_a_cascade(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Reference(shared, "losses_cascade")
    entered: list[LabelledRois] = []

    def watched(scores: Tensor, deltas: Tensor, rois: LabelledRois, coder: BoxCoder) -> tuple[Tensor, Tensor]:
        entered.append(rois)
        return box_losses(scores, deltas, rois, coder)

    monkeypatch.setattr(cascade, "box_losses", watched)
    training.losses(targets_of(training.golden))
    for stage in (1, 2):
        for i in range(2):
            expected = part(training.golden, f"expected.image{i}.stage{stage}_")
            found = of_image(entered[stage], i)
            torch.testing.assert_close(found.boxes, expected["boxes"], atol=1e-2, rtol=0)
            assert torch.equal(found.labels, expected["classes"])


def test_pyramid_of_the_images(inference: Reference) -> None:
    with torch.no_grad():
        maps = dict(zip(("p2", "p3", "p4", "p5", "p6"), inference.model.backbone(inference.images), strict=True))
    close = {"atol": 1e-3, "rtol": 0}
    expected = part(inference.golden, "expected.")
    torch.testing.assert_close(maps["p2"][:, :, ::8, ::8], expected["p2_every_eighth"], **close)
    torch.testing.assert_close(maps["p3"][:, :, ::4, ::4], expected["p3_every_fourth"], **close)
    torch.testing.assert_close(maps["p4"][:, :, ::2, ::2], expected["p4_every_second"], **close)
    torch.testing.assert_close(maps["p5"], expected["p5"], **close)
    torch.testing.assert_close(maps["p6"], expected["p6"], **close)


def test_detections(inference: Reference) -> None:
    model, golden = inference.model, inference.golden
    original_sizes = [tuple(size) for size in inference.config["output_sizes"]]
    with torch.no_grad():
        features = model.backbone(inference.images)
        proposals = model.rpn.proposals(model.rpn(features), inference.sizes, training=False)
        in_network = model.roi.detect(features, proposals, inference.sizes)
    detections = model.detect(inference.images, inference.sizes, original_sizes)
    for i, found in enumerate(detections):
        expected = part(golden, f"expected.image{i}.")
        torch.testing.assert_close(proposals[i].boxes, expected["proposals"], atol=1e-2, rtol=0)
        torch.testing.assert_close(in_network[i][0].boxes, expected["network_boxes"], atol=1e-2, rtol=0)
        torch.testing.assert_close(in_network[i][1], expected["mask_prob"], atol=2e-3, rtol=0)
        torch.testing.assert_close(found.boxes, expected["boxes"], atol=1e-2, rtol=0)
        torch.testing.assert_close(found.scores, expected["scores"], atol=5e-4, rtol=0)
        assert torch.equal(found.labels, expected["classes"])
        masks = unpacked(expected["masks_packed"], *original_sizes[i])
        assert (found.masks != masks).float().mean() <= 1e-3


# ---- what must hold besides -----------------------------------------------------------------------------------------


def tiny_vit() -> ViT:
    config = ViTConfig(
        img_size=(32, 32), patch_size=8, embed_dim=16, depth=2, num_heads=2, class_token=False,
        window_size=3, global_blocks=(1,), rel_pos_grid=(8, 8),
    )  # fmt: skip
    vit = ViT(config)
    vit.init_weights(torch.Generator().manual_seed(0))
    return vit


def tiny_detector(with_cascade: bool, seed: int = 0) -> MaskRCNN:
    """A detector of three classes for images of 64 px."""
    roi = ROIHeadsConfig(
        num_box_convs=1, box_fc_dim=16, num_mask_convs=1, batch_size_per_image=16, score_threshold=0.2,
        detections_per_image=6,
    )  # fmt: skip
    rpn = RPNConfig(batch_size_per_image=32, num_convs=1, post_nms_topk_train=40, post_nms_topk_test=20)
    config = DetectorConfig(num_classes=3, cascade=with_cascade, channels=8, rpn=rpn, roi=roi)
    model = build_mask_rcnn(tiny_vit(), config)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.eval()


def tiny_images() -> tuple[Tensor, Tensor, list[Targets]]:
    """Two padded images of 64 px, sizes and ground truth; nothing is in the second."""
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images[0, :, :, 48:] = 0
    images[1, :, 40:] = 0
    bitmap = torch.zeros(64, 48, dtype=torch.bool)
    bitmap[8:40, 4:30] = True
    target = Targets(torch.tensor([[4.0, 8, 30, 40]]), torch.tensor([1]), [bitmap])
    return images, torch.tensor([[64, 48], [40, 64]]), [target, no_targets()]


@pytest.mark.parametrize(
    ("size", "pyramid", "total"),
    [((768, 12, 12), 5.560, 110.896), ((1024, 24, 16), None, 330.685), ((1280, 32, 16), None, 661.204)],
)
def test_parameters_of_the_published_detectors(size: tuple[int, int, int], pyramid: float | None, total: float) -> None:
    dim, depth, heads = size
    last_of_each_quarter = tuple(range(depth // 4 - 1, depth, depth // 4))
    with torch.device("meta"):
        config = ViTConfig(
            img_size=(224, 224), patch_size=16, embed_dim=dim, depth=depth, num_heads=heads, class_token=False,
            window_size=14, global_blocks=last_of_each_quarter, rel_pos_grid=(64, 64),
        )  # fmt: skip
        model = build_mask_rcnn(ViT(config), DetectorConfig())

    def millions(module: torch.nn.Module) -> float:
        return round(sum(p.numel() for p in module.parameters()) / 1e6, 3)

    assert millions(model) == total
    if pyramid:
        found = [millions(part) for part in (model.backbone.vit, model.backbone.pyramid, model.rpn, model.roi)]
        assert found == [85.889, pyramid, 1.184, 18.263]


@pytest.mark.parametrize("with_cascade", [False, True])
def test_detections_of_a_batch_are_those_of_its_images(with_cascade: bool) -> None:
    model = tiny_detector(with_cascade)
    images, sizes, _ = tiny_images()
    original_sizes = [(100, 75), (20, 32)]
    together = model.detect(images, sizes, original_sizes)
    for i, found in enumerate(together):
        (alone,) = model.detect(images[i : i + 1], sizes[i : i + 1], original_sizes[i : i + 1])
        assert len(found.boxes) and found.masks.shape == (len(found.boxes), *original_sizes[i])
        torch.testing.assert_close(found.boxes, alone.boxes, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(found.scores, alone.scores, atol=1e-5, rtol=1e-4)
        assert torch.equal(found.labels, alone.labels) and torch.equal(found.masks, alone.masks)
        assert torch.equal(found.paste(slice(1, 3)), found.masks[1:3])
        height, width = original_sizes[i]
        assert (found.boxes >= 0).all() and (found.boxes <= torch.tensor([width, height] * 2)).all()


@pytest.mark.parametrize("with_cascade", [False, True])
def test_losses_depend_on_the_place_in_the_run_alone(with_cascade: bool) -> None:
    model = tiny_detector(with_cascade)
    images, sizes, targets = tiny_images()
    before = torch.random.get_rng_state()

    def losses_at(index: int) -> list[float]:
        generator = Place(step=3, index=index, turn=0).generator(seed=0, device=images.device)
        losses = model.losses(images, sizes, targets, random_permutation(generator))
        return [loss.item() for loss in losses.values()]

    assert losses_at(0) == losses_at(0) != losses_at(1)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("with_cascade", [False, True])
def test_every_weight_has_a_gradient(with_cascade: bool) -> None:
    model = tiny_detector(with_cascade)
    images, sizes, targets = tiny_images()
    for given in (targets, [no_targets(), no_targets()]):
        model.zero_grad()
        losses = model.losses(images, sizes, given, fixed_permutation)
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    stages = ["_stage0", "_stage1", "_stage2"] if with_cascade else [""]
    of_boxes = {f"loss_{kind}{stage}" for kind in ("cls", "box_reg") for stage in stages}
    assert losses.keys() == {"loss_rpn_cls", "loss_rpn_loc", "loss_mask"} | of_boxes


def test_dropped_branches_reach_the_vit() -> None:
    model = tiny_detector(with_cascade=False)
    images, sizes, targets = tiny_images()
    scales = torch.zeros(2, 2, 2, 1, 1)
    kept = model.losses(images, sizes, targets, fixed_permutation)["loss_rpn_cls"]
    dropped = model.losses(images, sizes, targets, fixed_permutation, branch_scales=scales)["loss_rpn_cls"]
    assert kept != dropped


def test_losses_and_weights_stay_float32_under_autocast() -> None:
    model = tiny_detector(with_cascade=True)
    images, sizes, targets = tiny_images()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(images, sizes, targets, fixed_permutation)
        detections = model.detect(images, sizes, [(64, 48), (40, 64)])
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert all(found.boxes.dtype == found.scores.dtype == torch.float32 for found in detections)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_training_lowers_the_losses() -> None:
    model = tiny_detector(with_cascade=False)
    images, sizes, targets = tiny_images()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    totals = []
    for step in range(12):
        generator = Place(step=step, index=0, turn=0).generator(seed=0, device=images.device)
        total = sum(model.losses(images, sizes, targets, random_permutation(generator)).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert sum(totals[-3:]) < 0.8 * sum(totals[:3])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("with_cascade", [False, True])
def test_a_gpu_finds_what_a_cpu_finds(with_cascade: bool) -> None:
    model = tiny_detector(with_cascade)
    images, sizes, targets = tiny_images()
    device = torch.device("cuda")
    expected = model.losses(images, sizes, targets, fixed_permutation)
    detections = model.detect(images, sizes, [(64, 48), (40, 64)])
    model, images, sizes, targets = (
        model.to(device),
        images.to(device),
        sizes.to(device),
        [t.to(device) for t in targets],
    )
    losses = model.losses(images, sizes, targets, lambda n: fixed_permutation(n).to(device))
    for name, loss in losses.items():
        torch.testing.assert_close(loss.cpu(), expected[name], atol=1e-3, rtol=1e-3)
    for found, wanted in zip(model.detect(images, sizes, [(64, 48), (40, 64)]), detections, strict=True):
        torch.testing.assert_close(found.scores.cpu(), wanted.scores, atol=1e-3, rtol=1e-3)
        assert found.masks.is_cuda


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_cascade", [False, True])
def test_weights_go_to_detectron2_and_back(with_cascade: bool) -> None:
    state = tiny_detector(with_cascade).state_dict()
    theirs, report = to_detectron2(state)
    assert report.mapped.keys() == state.keys() and set(report.mapped.values()) == theirs.keys()
    back, report = from_detectron2({**theirs, "pixel_mean": torch.zeros(3, 1, 1)})
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    assert report.ignored == ("pixel_mean",)
    assert report.lines()[-1] == "ignored  pixel_mean" and len(report.lines()) == len(state) + 1


@pytest.mark.parametrize("with_cascade", [False, True])
def test_sizes_are_read_from_the_weights(with_cascade: bool) -> None:
    model = tiny_detector(with_cascade)
    vit_config, config = sizes_of(model.state_dict())
    assert vit_config == model.backbone.vit.config
    assert (config.num_classes, config.cascade, config.channels, config.rpn.num_convs) == (3, with_cascade, 8, 1)
    build_mask_rcnn(ViT(vit_config), config).load_state_dict(model.state_dict())


def test_names_without_a_place_are_refused() -> None:
    theirs, _ = to_detectron2(tiny_detector(with_cascade=False).state_dict())
    with pytest.raises(CheckpointError, match=r"no place for roi_heads\.keypoint_head\.weight"):
        from_detectron2({**theirs, "roi_heads.keypoint_head.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"no place for head\.weight"):
        to_detectron2({"head.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="no weights of a Mask R-CNN"):
        sizes_of({"backbone.vit.pos_embed": torch.zeros(1, 5, 4)})


def test_a_patch_side_without_a_pyramid_is_refused() -> None:
    vit = ViT(ViTConfig(img_size=(28, 28), patch_size=14, embed_dim=16, depth=1, num_heads=2, class_token=False))
    with pytest.raises(ValueError, match="patch_size=14"):
        build_mask_rcnn(vit, DetectorConfig(num_classes=2))
    assert strides_of(8) == (2, 4, 8, 16, 32)
