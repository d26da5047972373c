"""Crops and normalisation: inside the image, drawn from the given generator only, and equal to the published ones."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF
from torchvision.transforms.v2 import functional as VF

from core.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    AugmentConfig,
    normalize,
    random_crop_box,
    random_crop_flip,
    resize_center_crop,
)

EXTREME_SIZES = [(1, 4000), (4000, 1), (1, 1), (2, 3), (3, 200)]


def noise_image(height: int, width: int, channels: int = 3) -> Tensor:
    rng = np.random.default_rng([height, width])
    return torch.from_numpy(rng.integers(0, 256, (channels, height, width), dtype=np.uint8))


# --- the random crop ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(224, 224), (100, 300), (301, 97), (7, 5)])
@pytest.mark.parametrize("config", [AugmentConfig(), AugmentConfig(min_scale=0.9), AugmentConfig(max_ratio=1.0)])
def test_random_crops_lie_inside_and_keep_scale_and_ratio(size: tuple[int, int], config: AugmentConfig) -> None:
    H, W = size
    rng = np.random.default_rng(0)
    for _ in range(500):
        top, left, height, width = random_crop_box(size, config, rng)
        assert 0 <= top <= H - height and 0 <= left <= W - width and height > 0 and width > 0
        assert (height - 0.5) / (width + 0.5) <= config.max_ratio and (width - 0.5) / (height + 0.5) <= config.max_ratio
        if (height, width) != fallback_size(size, config):
            assert (height + 0.5) * (width + 0.5) >= config.min_scale * H * W


def fallback_size(size: tuple[int, int], config: AugmentConfig) -> tuple[int, int]:
    H, W = size
    return min(H, round(W * config.max_ratio)), min(W, round(H * config.max_ratio))


def test_random_crops_reach_the_whole_range() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop_box((224, 224), AugmentConfig(), rng) for _ in range(3000)])
    top, left, height, width = boxes.T
    area, ratio = height * width / 224**2, width / height
    assert area.min() < 0.21 and area.max() > 0.98 and 0.5 < area.mean() < 0.65
    assert ratio.min() < 0.76 and ratio.max() > 1.31 and abs(np.log(ratio).mean()) < 0.02
    for start, side in ((top, height), (left, width)):
        assert (start == 0).any() and (start == 224 - side).any()


@pytest.mark.parametrize("size", EXTREME_SIZES)
def test_an_extreme_image_still_has_a_crop(size: tuple[int, int]) -> None:
    H, W = size
    for seed in range(50):
        top, left, height, width = random_crop_box(size, AugmentConfig(), np.random.default_rng(seed))
        assert 0 <= top <= H - height and 0 <= left <= W - width and height > 0 and width > 0


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((1, 4000), (0, 1999, 1, 1)),
        ((4000, 1), (1999, 0, 1, 1)),
        ((30, 4000), (0, 1980, 30, 40)),
        ((4000, 30), (1980, 0, 40, 30)),
    ],
)
def test_after_ten_misses_the_central_crop_is_taken(size: tuple[int, int], box: tuple[int, ...]) -> None:
    config = AugmentConfig(min_scale=1.0)  # the whole area in a ratio of at most 4:3 never fits such a strip
    assert random_crop_box(size, config, np.random.default_rng(0)) == box


def test_the_box_is_torchvisions_for_the_same_draws() -> None:
    """Replays torchvision's RandomResizedCrop.get_params by hand with the draws of our generator."""
    config, (H, W) = AugmentConfig(), (200, 300)
    for seed in range(100):
        rng = np.random.default_rng(seed)
        expected = None
        while expected is None:
            target_area = H * W * rng.uniform(0.2, 1.0)
            aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(target_area * aspect)), round(math.sqrt(target_area / aspect))
            if 0 < w <= W and 0 < h <= H:
                expected = int(rng.integers(0, H - h + 1)), int(rng.integers(0, W - w + 1)), h, w
        assert random_crop_box((H, W), config, np.random.default_rng(seed)) == expected


# --- crop and flip --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [(60, 80), *EXTREME_SIZES])
@pytest.mark.parametrize(("channels", "size"), [(3, (32, 32)), (1, (16, 48))])
def test_crop_and_flip_give_the_asked_size(image_size: tuple[int, int], channels: int, size: tuple[int, int]) -> None:
    image = noise_image(*image_size, channels)
    result = random_crop_flip(image, size, AugmentConfig(), np.random.default_rng(3))
    assert (result.shape, result.dtype) == ((channels, *size), torch.uint8)


def test_crop_and_flip_draw_only_from_the_given_generator() -> None:
    image = noise_image(60, 80)

    def crop(seed: int) -> Tensor:
        return random_crop_flip(image, (32, 32), AugmentConfig(), np.random.default_rng(seed))

    torch.manual_seed(0)
    np.random.seed(0)
    first = [crop(seed) for seed in range(8)]
    torch.manual_seed(1)
    np.random.seed(1)
    assert all(torch.equal(a, crop(seed)) for seed, a in enumerate(first))
    assert not any(torch.equal(first[0], other) for other in first[1:])


@pytest.mark.parametrize("flip_ratio", [0.0, 1.0])
def test_crop_and_flip_equal_torchvision_on_the_same_box(flip_ratio: float) -> None:
    config = AugmentConfig(flip_ratio=flip_ratio)
    for seed, image_size in enumerate([(60, 80), (81, 57), (300, 200), (20, 20)]):
        image = noise_image(*image_size)
        box = random_crop_box(image_size, config, np.random.default_rng(seed))
        expected = VF.resized_crop(image, *box, [32, 48], interpolation=InterpolationMode.BICUBIC, antialias=True)
        if flip_ratio:
            expected = VF.horizontal_flip(expected)
        assert torch.equal(random_crop_flip(image, (32, 48), config, np.random.default_rng(seed)), expected)


def test_half_of_the_images_are_mirrored() -> None:
    config = AugmentConfig(min_scale=1.0, max_ratio=1.0)  # always the whole square, so that only the flip is left
    image = noise_image(8, 8)
    mirrored = 0
    for seed in range(400):
        result = random_crop_flip(image, (8, 8), config, np.random.default_rng(seed))
        assert torch.equal(result, image) or torch.equal(result, image.flip(-1))
        mirrored += torch.equal(result, image.flip(-1))
    assert 160 < mirrored < 240


# --- evaluation -----------------------------------------------------------------------------------------------------


def published(image: Tensor, size: int, resized: int) -> Tensor:
    """torchvision's Resize(resized, bicubic) and CenterCrop(size) on a PIL image, as MAE's evaluation does."""
    pixels = image.permute(1, 2, 0).numpy()
    pil = Image.fromarray(pixels if image.shape[0] == 3 else pixels[..., 0])
    result = TF.center_crop(TF.resize(pil, resized, InterpolationMode.BICUBIC), [size, size])
    return torch.from_numpy(np.array(result).reshape(size, size, -1)).permute(2, 0, 1)


@pytest.mark.parametrize(
    "image_size",
    [
        (256, 256), (255, 255), (257, 256), (300, 400), (400, 300), (333, 500), (500, 333), (375, 500), (179, 139),
        (31, 45), (224, 224), (227, 1000), (1001, 225), (640, 481), (1, 2), (256, 301), (301, 256), (10, 159), (49, 98), (147, 98), (98, 343),
    ],
)  # fmt: skip
def test_resize_and_centre_crop_equal_the_published_transform(image_size: tuple[int, int]) -> None:
    image = noise_image(*image_size)
    result = resize_center_crop(image, (224, 224), 0.875)
    assert result.dtype == torch.uint8
    assert torch.equal(result, published(image, 224, 256))


def test_resize_and_centre_crop_equal_the_published_transform_at_random_sizes() -> None:
    rng = np.random.default_rng(5)
    for _ in range(60):
        image = noise_image(*rng.integers(20, 200, 2))
        assert torch.equal(resize_center_crop(image, (56, 56), 0.875), published(image, 56, 64)), image.shape


def test_grey_images_and_other_ratios_equal_the_published_transform() -> None:
    grey = noise_image(90, 61, channels=1)
    assert torch.equal(resize_center_crop(grey, (56, 56), 0.875), published(grey, 56, 64))
    image = noise_image(90, 61)
    assert torch.equal(resize_center_crop(image, (32, 32), 1.0), published(image, 32, 32))
    same = noise_image(32, 32)
    assert torch.equal(resize_center_crop(same, (32, 32), 1.0), same)


def test_a_size_that_is_not_square_covers_its_share() -> None:
    yy = torch.arange(100, dtype=torch.uint8).view(1, -1, 1).expand(3, 100, 200)
    result = resize_center_crop(yy, (50, 100), 0.5)  # the image is kept at its size, its middle cut out
    assert torch.equal(result, yy[:, 25:75, 50:150])


@pytest.mark.parametrize("image_size", [*EXTREME_SIZES, (1, 60_000), (60_000, 2)])
def test_strips_do_not_grow_to_gigabytes(image_size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *args: made.append(math.prod(size)) or resize(self, size, *args)
    )
    result = resize_center_crop(noise_image(*image_size), (224, 224), 0.875)
    assert result.shape == (3, 224, 224)
    assert max(made) <= 16 * 256 * 256


def test_of_a_strip_the_middle_is_kept() -> None:
    strip = torch.zeros(3, 4, 1001, dtype=torch.uint8)
    strip[:, :, 490:511] = 200
    assert resize_center_crop(strip, (32, 32), 1.0).eq(200).all()


# --- normalisation --------------------------------------------------------------------------------------------------


def test_normalize_is_the_published_formula() -> None:
    images = torch.stack([noise_image(5, 7), noise_image(5, 7).flip(-1)])
    result = normalize(images, IMAGENET_MEAN, IMAGENET_STD, torch.float32)
    expected = torch.stack(
        [VF.normalize(VF.to_dtype(i, torch.float32, scale=True), IMAGENET_MEAN, IMAGENET_STD) for i in images]
    )
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


def test_normalize_takes_grey_and_other_types() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    result = normalize(images, (0.5,), (0.25,), torch.float64)
    assert result.dtype == torch.float64
    assert result.flatten().tolist() == [-2.0, 2.0]
