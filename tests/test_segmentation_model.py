"""The whole segmentor: its losses and gradients, parameter groups, schedule, weights of mmsegmentation, running statistics."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from core.distributed import Processes
from core.errors import CheckpointError
from core.optim import warmup_poly
from core.vit import ViT, ViTConfig, drop_path_scales
from tests.golden_files import require
from tools.verify.golden import FOLDER, part, read_golden
from tools.verify.measure import Measure
from tools.verify.parameter_groups import segmentor_groups
from tools.verify.segmentation_data import schedules
from tools.verify.segmentation_model import training
from transfer.segmentation.batch_norm import RunningStatistics
from transfer.segmentation.segmentor import Segmentor, SegmentorConfig, build_segmentor, segmentation_vit
from transfer.segmentation.weights import from_mmseg, sizes_of, to_mmseg

PUBLISHED = {"rel_pos_bias": True, "layer_scale": True, "final_norm": False}
MAE_BASE = ViTConfig(img_size=(512, 512), patch_size=16, embed_dim=768, depth=12, num_heads=12, **PUBLISHED)


def tiny_segmentor(average: str = "all_pixels", **changes: bool) -> Segmentor:
    plain = ViT(ViTConfig(img_size=(32, 32), patch_size=8, embed_dim=16, depth=4, num_heads=2))
    plain.init_weights(torch.Generator().manual_seed(0))
    vit = segmentation_vit(plain, **{"rel_pos_bias": False, "layer_scale": False, **changes})
    model = build_segmentor(vit, SegmentorConfig(num_classes=5, channels=8, aux_channels=4, average=average))
    model.init_weights(torch.Generator().manual_seed(1))
    return model


def batch(num_images: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 5, (num_images, 32, 32), generator=generator)
    labels[:, :7] = 255
    return torch.randn(num_images, 3, 32, 32, generator=generator), labels.byte()


# ---- golden values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "compared", [training, segmentor_groups, schedules], ids=["training", "parameter_groups", "schedules"]
)
def test_golden(compared: Callable[[Path], Iterator[Measure]]) -> None:
    require(compared(FOLDER))


def test_schedules_of_few_steps() -> None:
    assert [warmup_poly(t, total_steps=5, warmup_steps=0) for t in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]
    assert warmup_poly(0, total_steps=3, warmup_steps=1) == 1e-6
    assert warmup_poly(2, total_steps=4, warmup_steps=0, power=2) == pytest.approx(1 / 9)


# ---- weights --------------------------------------------------------------------------------------------------------


def test_weights_come_back() -> None:
    golden, _ = read_golden(FOLDER, "segmentation_slide")
    theirs = part(golden, "weight.")
    ours, report = from_mmseg(theirs | {"data_preprocessor.mean": torch.zeros(3)})
    assert report.ignored == ("data_preprocessor.mean",) and len(report.mapped) == len(theirs) == len(ours)
    vit, config = sizes_of(ours)
    assert (vit.img_size, vit.depth, vit.num_heads, config.num_classes) == ((64, 64), 4, 3, 7)
    again, back = to_mmseg(ours, vit)
    assert set(back.added) == {f"backbone.layers.{i}.attn.relative_position_index" for i in range(4)}
    assert theirs.keys() | set(back.added) == again.keys()
    assert all(again[name] is tensor for name, tensor in theirs.items())
    assert from_mmseg(again)[0].keys() == ours.keys()
    assert {"backbone.layers.0.ln1.bias -> backbone.blocks.0.norm1.bias", "ignored  data_preprocessor.mean"} <= set(
        report.lines()
    )


def test_a_plain_vit_is_complete_for_mmsegmentation() -> None:
    model = tiny_segmentor().eval()
    theirs, report = to_mmseg(model.state_dict(), model.backbone.config)
    assert len(report.added) == 4 * 4 and report.lines()[-1].startswith("added    backbone.layers.3.")
    ours, _ = from_mmseg(theirs)
    vit, config = sizes_of(ours)
    assert vit.rel_pos_bias and vit.layer_scale
    published = build_segmentor(ViT(vit), config)
    published.load_state_dict(ours)
    images, _ = batch()
    torch.testing.assert_close(published.eval().logits(images), model.logits(images))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("backbone.layers.0.attn.q_bias", "this is a BEiT backbone; only UperNet on mmsegmentation's MAE backbone"),
        ("backbone.layers.0.attn.attn.in_proj_weight", "this is mmsegmentation's VisionTransformer backbone"),
        ("backbone.stages.0.blocks.0.norm1.weight", "this is a Swin backbone"),
        ("backbone.layer1.0.conv1.weight", "this is a ResNet backbone"),
        ("backbone.layers.0.0.patch_embed.weight", "this is a MixVisionTransformer backbone"),
        ("neck.lateral_convs.0.conv.weight", "this is a MultiLevelNeck"),
        ("decode_head.linear_fuse.conv.weight", "no place for decode_head.linear_fuse.conv.weight; expected UperNet"),
        ("backbone.ln1.weight", "no place for backbone.ln1.weight"),
    ],
)
def test_other_networks_are_refused_by_name(name: str, line: str) -> None:
    golden, _ = read_golden(FOLDER, "segmentation_slide")
    with pytest.raises(CheckpointError, match=line):
        from_mmseg(part(golden, "weight.") | {name: torch.zeros(1)})


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"backbone.pos_embed": torch.zeros(1, 21, 48)}, "20 positions and a table of 52 rows do not suit 4x4"),
        ({"decode_head.ppm.branches.4.bn.weight": torch.zeros(1)}, "pyramid pooling of 5 scales"),
        ({"decode_head.lateral_convs.3.bn.weight": torch.zeros(1)}, "4 lateral convolutions, expected 3"),
        ({"auxiliary_head.conv.bn.weight": None}, "no weights of UperNet on a ViT: 'auxiliary_head.conv.bn.weight'"),
    ],
)
def test_sizes_that_cannot_be_told(change: dict[str, Tensor | None], line: str) -> None:
    golden, _ = read_golden(FOLDER, "segmentation_slide")
    state = {**from_mmseg(part(golden, "weight."))[0], **change}
    with pytest.raises(CheckpointError, match=line):
        sizes_of({name: tensor for name, tensor in state.items() if tensor is not None})


# ---- what must hold besides -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"rel_pos_bias": True, "layer_scale": True}])
def test_every_weight_has_a_gradient(changes: dict[str, bool]) -> None:
    model, (images, labels) = tiny_segmentor(**changes).train(), batch()
    losses = model.losses(images, labels)
    assert all(loss.dtype == torch.float32 and loss.shape == () for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_noise_comes_from_the_generator() -> None:
    model, (images, labels) = tiny_segmentor().train(), batch()
    before = torch.random.get_rng_state()

    def losses(seed: int) -> list[float]:
        generator = torch.Generator().manual_seed(seed)
        scales = drop_path_scales(0.5, 4, 2, generator)
        return [loss.item() for loss in model.losses(images, labels, generator, scales).values()]

    assert losses(0) == losses(0) != losses(1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_crops_without_a_label_have_no_loss() -> None:
    images, labels = batch()
    for average in ("all_pixels", "valid_pixels"):
        model = tiny_segmentor(average).train()
        losses = model.losses(images, torch.full_like(labels, 255))
        assert [loss.item() for loss in losses.values()] == [0, 0]
        sum(losses.values()).backward()
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_scores_under_autocast_are_float32() -> None:
    model, (images, _) = tiny_segmentor().eval(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        scores = model.logits(images).values
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, model.logits(images).values, atol=0.02, rtol=0.05)


def test_running_statistics_belong_to_the_step() -> None:
    model, (images, labels) = tiny_segmentor().train(), batch()
    statistics = RunningStatistics(model)

    def state() -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in model.named_buffers()}

    def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        return all(torch.equal(a[name], b[name]) for name in a)

    start = state()
    statistics.begin()  # the pass before the first step
    model.losses(images, labels)
    statistics.begin()  # the first step
    assert equal(state(), start)
    model.losses(images, labels)
    once = state()
    statistics.settle(torch.tensor(True), Processes())
    assert equal(state(), once) and not equal(once, start)
    statistics.begin()  # a step that is not finite
    model.losses(images * float("nan"), labels)
    statistics.settle(torch.tensor(False), Processes())
    assert equal(state(), once)


def test_its_batch_norms_can_be_synchronised() -> None:
    model = tiny_segmentor()
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) == norms == 14


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_a_segmentor_that_cannot_be_built() -> None:
    plain = ViT(ViTConfig(img_size=(32, 32), patch_size=8, embed_dim=16, depth=2, num_heads=2))
    with pytest.raises(ValueError, match="final norm, which a segmentor has no use for"):
        build_segmentor(plain, SegmentorConfig())
    vit = segmentation_vit(plain, rel_pos_bias=False, layer_scale=False)
    with pytest.raises(ValueError, match=r"blocks=\[0, 0, 1, 2\]: the backbone has 2 blocks, 0 to 1"):
        build_segmentor(vit, SegmentorConfig(blocks=(0, 0, 1, 2)))
    with pytest.raises(ValidationError, match="ignore_index=4: is one of the 5 classes"):
        SegmentorConfig(num_classes=5, ignore_index=4)


def test_labels_of_another_size() -> None:
    images, labels = batch()
    with pytest.raises(ValueError, match=r"labels are \[2, 31, 32\], expected \[2, 32, 32\]"):
        tiny_segmentor().losses(images, labels[:, 1:])


def test_scores_in_training_mode() -> None:
    with pytest.raises(AssertionError, match="call eval"):
        tiny_segmentor().train().logits(batch()[0])
