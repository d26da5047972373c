"""k-NN, LARS and schedules against their vectors; RandAugment's operations and the classifier against timm."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import nn

from core.knn import knn_classify, topk_accuracy_pct
from core.optim import LARS, warmup_cosine
from core.vit import ViT, ViTConfig
from tools.verify.measure import Measure, close, exact, relative
from transfer.classification.augment import OPERATIONS
from transfer.classification.model import Pool, classifier_from

# Similarities to the query (1, 0): 1, 0.6, 0 and -1; lengths differ, since only directions count.
FEATURES = torch.tensor([[2.0, 0.0], [0.6, 0.8], [0.0, 3.0], [-1.0, 0.0]])
LABELS = torch.tensor([0, 1, 1, 2])
QUERY = torch.tensor([[5.0, 0.0]])
BY_HAND = {
    1: ((1,), (), ()),
    2: ((1,), (0.6,), ()),
    3: ((1,), (0.6, 0), ()),
    4: ((1,), (0.6, 0), (-1,)),
    1000: ((1,), (0.6, 0), (-1,)),
}  # fmt: skip  similarities that vote for each class, by k

# Weights after two steps at rate 6.4 of the official LARS, in float64 (spec classify section 3), by weight decay.
LARS_WEIGHTS = {
    0.0: [0.981456273617894, 1.962912547235788, 3.055631179146319, 3.925825094471575],
    0.1: [0.978033267065662, 1.956066534131324, 3.007451753683108, 3.912133068262648],
}
LARS_BIAS = [-11.48, 5.24]

# Rates by epoch of fine-tuning (100 epochs, 1251 steps each) and of the probe (90 epochs of 78), spec classify.
FINETUNE = {
    0: 0, 1 / 1251: 3.1974420464e-7, 1: 4e-4, 5: 2e-3, 50: 1.0830380558e-3, 99: 1.5464692877e-6,
    100 - 1 / 1251: 1.0000003492e-6,
}  # fmt: skip
PROBE = {0: 0, 1 / 78: 8.2051282051e-3, 1: 0.64, 10: 6.4, 45: 3.8242890305, 89: 2.4670840297e-3}


def knn() -> Iterator[Measure]:
    """Scores computed by hand: each neighbour counts exp(similarity / 0.07)."""
    for k, votes in BY_HAND.items():
        expected = torch.tensor([[sum(math.exp(s / 0.07) for s in of_class) for of_class in votes]])
        scores = knn_classify(FEATURES, LABELS, QUERY, num_classes=3, k=k)
        yield relative(f"scores, k={k}", scores, expected, 1e-5)
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.4, 0.35, 0.25]])
    found = [topk_accuracy_pct(scores, torch.tensor([1, 1, 0, 2]), k) for k in (1, 2, 3, 5)]
    yield exact("accuracies", found, [25.0, 50.0, 100.0, 100.0])


def lars() -> Iterator[Measure]:
    """Two steps of a weight, whose rate follows its norm, and of a bias, whose rate does not."""
    for weight_decay, expected in LARS_WEIGHTS.items():
        W = nn.Parameter(torch.tensor([[1.0, 2], [3, 4]], dtype=torch.float64))
        b = nn.Parameter(torch.tensor([1.0, -1], dtype=torch.float64))
        optimizer = LARS([W, b], lr=6.4, weight_decay=weight_decay)
        for t in (1, 2):
            W.grad = t * torch.tensor([[0.1, 0.2], [-0.3, 0.4]], dtype=torch.float64)
            b.grad = t * torch.tensor([0.5, -0.25], dtype=torch.float64)
            optimizer.step()
        for name, found, wanted in (("weights", W, expected), ("bias", b, LARS_BIAS)):
            vector = torch.tensor(wanted, dtype=torch.float64)
            yield relative(f"{name}, weight decay {weight_decay}", found.detach().flatten(), vector, 1e-13)


def schedules() -> Iterator[Measure]:
    """Rates of fine-tuning and of the linear probe."""
    for epoch, rate in FINETUNE.items():
        found = warmup_cosine(epoch, lr=2e-3, epochs=100, warmup_epochs=5, min_lr=1e-6)
        yield relative(f"fine-tuning, epoch {epoch:.4g}", found, rate, 1e-9)
    for epoch, rate in PROBE.items():
        found = warmup_cosine(epoch, lr=6.4, epochs=90, warmup_epochs=10)
        yield relative(f"probe, epoch {epoch:.4g}", found, rate, 1e-9)


# ---- timm -----------------------------------------------------------------------------------------------------------


def _factor(m: float, s: int) -> tuple[float]:
    return (max(0.1, 1 + s * m / 10 * 0.9),)


TIMM_OPERATIONS: dict[str, tuple[str, Callable[[float, int], tuple[float, ...]]]] = {
    # timm's operation, and its argument at a magnitude and sign
    "AutoContrast": ("AutoContrast", lambda m, s: ()),
    "Equalize": ("Equalize", lambda m, s: ()),
    "Invert": ("Invert", lambda m, s: ()),
    "Rotate": ("Rotate", lambda m, s: (s * m / 10 * 30,)),
    "Posterize": ("PosterizeIncreasing", lambda m, s: (4 - int(m / 10 * 4),)),
    "Solarize": ("SolarizeIncreasing", lambda m, s: (256 - int(m / 10 * 256),)),
    "SolarizeAdd": ("SolarizeAdd", lambda m, s: (min(128, int(m / 10 * 110)),)),
    "Color": ("ColorIncreasing", _factor),
    "Contrast": ("ContrastIncreasing", _factor),
    "Brightness": ("BrightnessIncreasing", _factor),
    "Sharpness": ("SharpnessIncreasing", _factor),
    "ShearX": ("ShearX", lambda m, s: (s * m / 10 * 0.3,)),
    "ShearY": ("ShearY", lambda m, s: (s * m / 10 * 0.3,)),
    "TranslateX": ("TranslateXRel", lambda m, s: (s * m / 10 * 0.45,)),
    "TranslateY": ("TranslateYRel", lambda m, s: (s * m / 10 * 0.45,)),
}
FILL = (124, 116, 104)


def photograph(channels: int = 3) -> Image.Image:
    """A picture of smooth colours, 32 x 24 px."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((32, 24), Image.Resampling.BICUBIC)
    return coarse if channels == 3 else coarse.convert("L")


def operations_of_timm() -> Iterator[Measure]:
    """Pixels after each of RandAugment's operations, at four magnitudes and both signs."""
    from timm.data import auto_augment

    yield exact("operations", sorted(OPERATIONS), sorted(TIMM_OPERATIONS))
    for name, (theirs, arguments) in TIMM_OPERATIONS.items():
        for magnitude in (0.0, 3.3, 9.0, 9.71):
            for sign in (1, -1):
                expected = auto_augment.NAME_TO_OP[theirs](
                    photograph(), *arguments(magnitude, sign), fillcolor=FILL, resample=Image.Resampling.BICUBIC
                )
                found = OPERATIONS[name](photograph(), magnitude, sign, FILL)
                yield exact(f"{name} at {sign * magnitude}", np.asarray(found), np.asarray(expected))


@torch.no_grad()
def classifier_of_timm() -> Iterator[Measure]:
    """Scores of a classifier on the mean of the patches, and on the class token."""
    from timm.models.vision_transformer import VisionTransformer

    generator = torch.Generator().manual_seed(0)
    vit = ViT(ViTConfig(img_size=(32, 32), patch_size=8, embed_dim=48, depth=2, num_heads=3))
    vit.init_weights(generator)
    pools: dict[Pool, str] = {"mean": "avg", "cls": "token"}
    for pool, theirs_pool in pools.items():
        model = classifier_from(vit, 5, pool, generator).eval()
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        theirs = VisionTransformer(
            img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5, global_pool=theirs_pool
        )  # fmt: skip
        theirs.load_state_dict(model.state_dict())
        images = torch.randn(2, 3, 32, 32, generator=generator)
        yield close(f"scores, {pool}", model(images), theirs.eval()(images), 1e-4)
