"""The whole detector: detectron2's losses, gradients and detections through the weight converter."""

import pytest
import torch
from torch import Tensor

from core.errors import CheckpointError
from core.task import Place
from core.vit import ViT, ViTConfig
from tests.golden_files import require
from tools.verify.detection_model import Kind, Reference, inference, losses, of_image
from tools.verify.detection_reference import fixed_permutation, no_targets, targets_of
from tools.verify.golden import FOLDER, part
from transfer.detection import cascade
from transfer.detection.box_head import box_losses
from transfer.detection.boxes import BoxCoder
from transfer.detection.mask_rcnn import DetectorConfig, MaskRCNN, build_mask_rcnn
from transfer.detection.matching import random_permutation
from transfer.detection.pyramid import strides_of
from transfer.detection.roi_heads import ROIHeadsConfig
from transfer.detection.rois import LabelledRois
from transfer.detection.rpn import RPNConfig
from transfer.detection.targets import Targets
from transfer.detection.weights import from_detectron2, sizes_of, to_detectron2

KINDS = ["mask_rcnn", "cascade"]


# ---- golden values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_golden_losses_gradients_and_regions(kind: Kind) -> None:
    require(losses(FOLDER, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_golden_detections(kind: Kind) -> None:
    require(inference(FOLDER, kind))


def test_regions_that_enter_each_stage_of_a_cascade(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Reference(FOLDER, "losses_cascade")
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
