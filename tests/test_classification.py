"""Classifiers: golden vectors of the published protocols, augmentation against its oracle, the classifier directory."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from core.distributed import Processes
from core.errors import CheckpointError, NumericError
from core.optim import LARS
from core.task import Place
from core.transforms import AugmentConfig, EvalTransform, random_crop_box
from core.vit import ViT, ViTConfig, drop_path_scales
from pretrain.presets import ENCODERS
from tests.golden_files import require
from tools.verify import classification as verify
from tools.verify.classification import photograph
from tools.verify.golden import FOLDER
from tools.verify.measure import Measure
from tools.verify.parameter_groups import classifier_groups
from transfer.classification.augment import (
    OPERATIONS,
    MixConfig,
    RandAugmentConfig,
    crop_box_without_rejection,
    erase,
    erase_box,
    mix,
    mixed_targets,
    rand_augment,
    soft_cross_entropy,
)
from transfer.classification.data import LabelledBatch
from transfer.classification.evaluate import Outcomes, per_class_pct, ranked_first, ranks
from transfer.classification.model import Classifier, classifier_from, export_classifier, load_classifier
from transfer.classification.tasks import FinetuneMethod, FinetuneTask, LinearProbeTask, ProbeHead

TINY = ViTConfig(img_size=(16, 16), patch_size=4, embed_dim=16, depth=3, num_heads=2)
HALF = (0.5, 0.5, 0.5)


def tiny_vit(seed: int = 0) -> ViT:
    vit = ViT(TINY)
    vit.init_weights(torch.Generator().manual_seed(seed))
    return vit


def batch_of(size: int, num_classes: int = 3, seed: int = 0) -> LabelledBatch:
    generator = torch.Generator().manual_seed(seed)
    return LabelledBatch(
        images=torch.randint(0, 256, (size, 3, 16, 16), dtype=torch.uint8, generator=generator),
        sizes=torch.full((size, 2), 16),
        valid=torch.ones(size, dtype=torch.bool),
        labels=torch.randint(0, num_classes, (size,), generator=generator),
        erased=torch.zeros(size, 4, dtype=torch.int64),
    )


# ---- golden values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "compared",
    [verify.schedules, verify.lars, verify.operations_of_timm, verify.classifier_of_timm],
    ids=lambda compared: compared.__name__,
)
def test_golden(compared: Callable[[], Iterator[Measure]]) -> None:
    require(compared())


def test_layer_decay_of_every_parameter() -> None:
    require(classifier_groups(FOLDER))


def test_parameters_of_the_published_classifiers() -> None:
    expected = {"tiny": 5_717_416, "small": 22_050_664, "base": 86_567_656, "large": 304_326_632, "huge": 632_045_800}
    for size, count in expected.items():
        with torch.device("meta"):
            model = Classifier(ViTConfig(img_size=(224, 224), **ENCODERS[size]), 1000, "mean")
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_lars_of_zeros_and_of_a_suppressed_step() -> None:
    W = nn.Parameter(torch.zeros(2, 2))
    lars = LARS([W], lr=1.0)
    W.grad = torch.ones(2, 2)
    lars.found_inf = torch.tensor(1.0)
    lars.step()
    assert not W.any() and not lars.state[W]["momentum_buffer"].any()
    lars.found_inf = torch.tensor(0.0)
    lars.step()
    assert (W == -1).all()  # a norm of 0 leaves the gradient as it is
    W.grad = torch.full((2, 2), math.nan)
    lars.found_inf = torch.tensor(1.0)
    lars.step()
    assert (W == -1).all() and (lars.state[W]["momentum_buffer"] == 1).all()


def test_mixed_targets_and_their_loss() -> None:
    targets = mixed_targets(torch.tensor([0, 2]), 4, 0.3, 0.1)
    torch.testing.assert_close(targets[0], torch.tensor([0.295, 0.025, 0.655, 0.025]))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(2))
    logits, labels = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0])
    smoothed = soft_cross_entropy(logits, mixed_targets(labels, 4, 1.0, 0.1))
    torch.testing.assert_close(smoothed, F.cross_entropy(logits, labels, label_smoothing=0.1))


# ---- the model ------------------------------------------------------------------------------------------------------


def test_the_class_token_is_no_part_of_the_mean() -> None:
    model = classifier_from(tiny_vit(), 3, "mean", torch.Generator().manual_seed(0))
    images = torch.randn(2, 3, 16, 16)
    before = model(images)
    seen = []

    def disturb(block: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        seen.append(output)
        return torch.cat([output[:, :1] + 100, output[:, 1:]], dim=1)

    handle = model.blocks[-1].register_forward_hook(disturb)
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)
    handle.remove()
    assert len(seen) == 1 and model.pos_embed.requires_grad
    assert model.head.weight.abs().max() < 2e-4 and not model.head.bias.any()
    assert "norm.weight" not in dict(model.named_parameters())


def test_drop_path_drops_whole_images_at_rising_rates() -> None:
    scales = drop_path_scales(0.5, 3, 4000, torch.Generator().manual_seed(0))  # [3, 2, B, 1, 1]
    assert scales.shape == (3, 2, 4000, 1, 1)
    assert (scales[0] == 1).all()
    for i, rate in ((1, 0.25), (2, 0.5)):
        torch.testing.assert_close(scales[i].unique(), torch.tensor([0, 1 / (1 - rate)]))
        assert (scales[i] == 0).double().mean().item() == pytest.approx(rate, abs=0.02)
    assert not torch.equal(scales[2, 0], scales[2, 1])
    vit, images = tiny_vit(), torch.randn(2, 3, 16, 16)
    off = torch.zeros(3, 2, 2, 1, 1)
    off[:, :, 0] = 1  # the second image passes no block
    tokens = vit.tokens(images, branch_scales=off)
    torch.testing.assert_close(tokens[0], vit.tokens(images)[0])
    for block in vit.blocks:
        nn.init.zeros_(block.attn.proj.weight)
        nn.init.zeros_(block.mlp.fc2.weight)
    torch.testing.assert_close(tokens[1], vit.tokens(images)[1])


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_timm_loads_a_classifier_directory(tmp_path: Path, pool: str) -> None:
    model = classifier_from(tiny_vit(), 3, pool, torch.Generator().manual_seed(0))
    nn.init.normal_(model.head.weight)
    names = ("a", "b", "ü")
    export_classifier(tmp_path / "c", model, names, {"step": 1}, mean=HALF, std=HALF, crop_ratio=0.9)
    images = torch.randn(2, 3, 16, 16)
    loaded = load_classifier(tmp_path / "c")
    assert (loaded.classes, loaded.mean, loaded.crop_ratio, loaded.img_size) == (names, HALF, 0.9, (16, 16))
    torch.testing.assert_close(loaded.model(images), model(images), rtol=0, atol=0)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'c'}", pretrained=True).eval()
    torch.testing.assert_close(theirs(images), model(images), rtol=1e-5, atol=1e-5)


def test_a_damaged_classifier_directory_is_refused(tmp_path: Path) -> None:
    model = classifier_from(tiny_vit(), 3, "mean", torch.Generator().manual_seed(0))
    with pytest.raises(CheckpointError, match="no classifier directory"):
        load_classifier(tmp_path)
    folder = tmp_path / "c"
    export_classifier(folder, model, "abc", {}, mean=HALF, std=HALF, crop_ratio=0.9)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"label_names"', '"names"'))
    with pytest.raises(CheckpointError, match=r"not a classifier's description: 'label_names'"):
        load_classifier(folder)
    (folder / "config.json").write_text(text.replace('"depth": 3', '"depth": 2'))
    with pytest.raises(CheckpointError, match=r"blocks\.2"):
        load_classifier(folder)
    nn.init.constant_(model.head.weight, math.nan)
    export_classifier(folder, model, "abc", {}, mean=HALF, std=HALF, crop_ratio=0.9)
    with pytest.raises(NumericError, match=r"head\.weight"):
        load_classifier(folder)


# ---- the tasks ------------------------------------------------------------------------------------------------------


def finetune_task(**changes: object) -> FinetuneTask:
    model = classifier_from(tiny_vit(), 3, "mean", torch.Generator().manual_seed(0))
    settings = {"num_classes": 3, "drop_path": 0.2, "mix": MixConfig(), "seed": 0, "mean": HALF, "std": HALF}
    return FinetuneTask(model, FinetuneMethod(**{**settings, **changes}), lambda score: None)


def test_noise_of_fine_tuning_comes_from_the_place_in_the_run() -> None:
    batch = batch_of(4)

    def loss(at: Place) -> float:
        return finetune_task().losses(batch, at)["cross_entropy"].item()

    assert loss(Place(3, 1, 0)) == loss(Place(3, 1, 5))
    assert len({loss(Place(3, 1, 0)), loss(Place(3, 2, 0)), loss(Place(4, 1, 0))}) == 3


def test_fine_tuning_without_noise_is_smoothed_cross_entropy() -> None:
    task = finetune_task(drop_path=0.0, mix=MixConfig(mixup=0, cutmix=0, smoothing=0.1))
    batch = batch_of(4)
    found = task.losses(batch, Place(0, 0, 0))["cross_entropy"]
    logits = task.model((batch.images / 255 - 0.5) / 0.5)
    torch.testing.assert_close(found, F.cross_entropy(logits, batch.labels, label_smoothing=0.1))


def linear_probe() -> LinearProbeTask:
    head = ProbeHead(16, 3, torch.Generator().manual_seed(1))
    return LinearProbeTask(tiny_vit(), head, HALF, HALF, lambda score: None, Processes())


def test_only_the_linear_layer_of_a_probe_learns_and_statistics_follow_as_batch_norm_does() -> None:
    task, batch = linear_probe(), batch_of(6)
    assert list(task.head.state_dict()) == [
        "0.running_mean", "0.running_var", "0.num_batches_tracked", "1.weight", "1.bias",
    ]  # fmt: skip
    reference = nn.Sequential(nn.BatchNorm1d(16, affine=False, eps=1e-6), nn.Linear(16, 3))
    reference.load_state_dict(task.head.state_dict())
    features = task.backbone.tokens((batch.images / 255 - 0.5) / 0.5)[:, 0]
    expected = F.cross_entropy(reference(features.detach()), batch.labels)
    found = task.losses(batch, Place(0, 0, 0))["cross_entropy"]
    torch.testing.assert_close(found, expected)
    found.backward()
    assert [name for name, p in task.named_parameters() if p.grad is not None] == ["1.weight", "1.bias"]
    assert all(p.grad is None for p in task.backbone.parameters())
    before = {name: value.clone() for name, value in task.head.state_dict().items()}
    task.after_update(0, torch.tensor(False))
    assert all(torch.equal(before[name], value) for name, value in task.head.state_dict().items())
    task.after_update(0, torch.tensor(True))
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(task.head.state_dict()[name], value)


def test_a_folded_probe_is_one_linear_layer() -> None:
    task, batch = linear_probe(), batch_of(6)
    task.losses(batch, Place(0, 0, 0))
    task.after_update(0, torch.tensor(True))
    features = torch.randn(4, 16)
    weight, bias = task.head.folded()
    torch.testing.assert_close(F.linear(features, weight, bias), task.head(features))


# ---- augmentation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_take_grey_images_at_the_very_end_of_the_scale(name: str) -> None:
    assert OPERATIONS[name](photograph(1), 10.0, 1, (7,)).mode == "L"


def test_rand_augment_is_a_function_of_its_generator() -> None:
    image = torch.from_numpy(np.array(photograph())).permute(2, 0, 1)

    def augmented(seed: int, **changes: object) -> torch.Tensor:
        return rand_augment(image, RandAugmentConfig(**changes), (124, 116, 104), np.random.default_rng(seed))

    assert torch.equal(augmented(1), augmented(1))
    assert torch.equal(augmented(1, num_ops=0), image)
    changed = sum(not torch.equal(augmented(seed), image) for seed in range(200))
    assert 130 < changed < 170  # two picks, each applied with probability 1/2: three in four, less those without effect


def test_the_crop_of_the_probe_never_leaves_the_image() -> None:
    rng = np.random.default_rng(0)
    boxes = [crop_box_without_rejection((20, 50), AugmentConfig(min_scale=0.08), rng) for _ in range(500)]
    assert all(top >= 0 and left >= 0 and top + h <= 20 and left + w <= 50 for top, left, h, w in boxes)
    assert max(h for _, _, h, _ in boxes) == 20  # cut to the image instead of drawn again
    rejected = [random_crop_box((20, 50), AugmentConfig(min_scale=0.08), rng) for _ in range(500)]
    assert sum(h == 20 for _, _, h, _ in boxes) > 2 * sum(h == 20 for _, _, h, _ in rejected)


def test_erasing() -> None:
    rng = np.random.default_rng(0)
    boxes = torch.tensor([erase_box((32, 48), 0.25, rng) for _ in range(2000)])
    areas = (boxes[:, 2] * boxes[:, 3]).double() / (32 * 48)
    erased = areas > 0
    assert erased.double().mean().item() == pytest.approx(0.25, abs=0.03)
    assert areas[erased].min() > 0.01 and areas.max() < 0.36
    images = torch.zeros(2, 3, 32, 48)
    out = erase(images, torch.tensor([[0, 0, 0, 0], [4, 10, 20, 30]]), torch.Generator().manual_seed(0))
    assert not out[0].any()
    inside = out[1, :, 4:24, 10:40]
    assert inside.std().item() == pytest.approx(1, abs=0.05)
    assert out[1].count_nonzero() == inside.count_nonzero() == 3 * 20 * 30


def test_mixing_reverses_the_batch_and_weighs_labels_by_area() -> None:
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 10)
    labels = torch.arange(4)
    kinds = set()
    for seed in range(40):
        mixed, targets = mix(images, labels, 4, MixConfig(smoothing=0.0), np.random.default_rng(seed))
        ratio = targets[0, 0].item()
        torch.testing.assert_close(targets[0, 3].item(), 1 - ratio)
        if mixed[0].unique().numel() <= 1 or torch.allclose(mixed[0], mixed[0, 0, 0, 0]):
            torch.testing.assert_close(mixed[0, 0, 0, 0].item(), 3 * (1 - ratio), atol=1e-5, rtol=0)
            kinds.add("mixup")
        else:
            assert (mixed[0] == 3).double().mean().item() == pytest.approx(1 - ratio, abs=1e-6)
            kinds.add("cutmix")
    assert kinds == {"mixup", "cutmix"}
    untouched, targets = mix(images, labels, 4, MixConfig(mixup=0, cutmix=0), np.random.default_rng(0))
    assert torch.equal(untouched, images) and targets[0, 0] > 0.9


# ---- figures --------------------------------------------------------------------------------------------------------


def test_ranks_and_figures() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (200, 7), generator=generator).float()  # many ties
    labels = torch.randint(0, 7, (200,), generator=generator)
    order = scores.argsort(dim=1, descending=True, stable=True)
    expected = (order == labels[:, None]).int().argmax(dim=1)
    assert torch.equal(ranks(scores, labels), expected)
    outcomes = Outcomes(labels, ranked_first(scores), expected, F.cross_entropy(scores, labels, reduction="none"))
    figures = outcomes.figures()
    assert figures["eval/top1_pct"] == pytest.approx(100 * (order[:, 0] == labels).double().mean().item())
    assert figures["eval/top5_pct"] == pytest.approx(100 * (expected < 5).double().mean().item())
    confusion = outcomes.confusion(7)
    assert confusion.sum() == 200 and np.trace(confusion) == (order[:, 0] == labels).sum()
    confusion[2] = 0
    assert per_class_pct(confusion, "abcdefg")["c"] is None


@pytest.mark.parametrize(("side", "ratio", "resized"), [(224, 0.875, 256), (256, 1.0, 256), (384, 1.0, 384)])
def test_evaluation_resizes_as_published(side: int, ratio: float, resized: int) -> None:
    image = torch.from_numpy(np.array(photograph().resize((400, 300)))).permute(2, 0, 1)
    found = EvalTransform((side, side), ratio)(image)
    scale = resized / 300
    picture = photograph().resize((400, 300)).resize((int(400 * scale), resized), Image.Resampling.BICUBIC)
    left, top = round((picture.width - side) / 2), round((resized - side) / 2)
    expected = np.asarray(picture.crop((left, top, left + side, top + side)))
    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), expected)
