"""Corruptions against the references: recorded results for legacy draws, and plain twins of what is done in parallel."""

import colorsys
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from robustness.corruptions import blur, digital, filters, hsv, noise, weather
from robustness.corruptions.apply import NAMES, apply
from robustness.corruptions.case import DEFINITIONS, Case
from tests.golden_files import require
from tests.test_corruptions import frost_files, noise_images  # noqa: F401  a fixture
from tools.verify.golden import FOLDER
from tools.verify.legacy_draws import legacy_draws
from tools.verify.robustness import golden_image, recorded, row_measures

GOLDEN = recorded(FOLDER)


def test_the_golden_image_is_the_specs() -> None:
    image = golden_image().double()
    assert image.mean().item() == pytest.approx(130.319841, abs=1e-6)
    assert image.std(correction=0).item() == pytest.approx(64.610979, abs=1e-6)
    assert image[:, 0, 0].tolist() == [160, 193, 209] and image[:, 111, 57].tolist() == [106, 129, 127]


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: f"{row['name']}-{row['severity']}-{row['definition']}")
def test_golden(row: dict) -> None:
    require(row_measures(row))


def test_the_table_covers_every_corruption() -> None:
    assert {row["name"] for row in GOLDEN} == set(NAMES) and len(GOLDEN) == 65
    assert {row["definition"] for row in GOLDEN} == set(DEFINITIONS)


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "speckle_noise", "fog"])
def test_float32_draws_move_one_value_in_a_thousand_by_one_level(name: str) -> None:
    image = golden_image()
    for severity in (1, 5):
        draws = legacy_draws(name, severity, image, "imagecorruptions")
        exact = apply(image[None], name, severity, draws=draws).int()
        single = apply(image[None], name, severity, draws={key: drawn.float() for key, drawn in draws.items()}).int()
        difference = (single - exact).abs()
        assert difference.max() <= 1 and difference.float().mean() < 1e-3


# --- noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("photons", noise.SHOT_PHOTONS)
def test_the_poisson_table_is_the_exact_distribution(photons: int) -> None:
    table = noise.poisson_table(photons, torch.float64, torch.device("cpu"))
    cumulative = table.cumulative.view(256, photons + 1)
    for level in (0, 1, 40, 128, 255):
        mean = level / 255 * photons
        pmf = [
            math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) if mean else float(k == 0) for k in range(photons)
        ]
        expected = [math.fsum(pmf[: k + 1]) for k in range(photons)]
        np.testing.assert_allclose(cumulative[level, :photons].numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_are_those_of_a_plain_search(dtype: torch.dtype) -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat_interleave(400)
    uniform = torch.from_numpy(np.random.default_rng(0).random(len(images))).to(dtype)
    uniform[::400], uniform[1::400] = 0, 1 - torch.finfo(dtype).eps  # the ends of the range
    for photons in noise.SHOT_PHOTONS:
        rows = noise.poisson_table(photons, dtype, images.device).cumulative.view(256, -1)
        expected = torch.searchsorted(rows, uniform.view(256, 400), right=True).flatten()
        assert torch.equal(noise.poisson_counts(images, uniform, photons).long(), expected)


def test_impulses_have_their_share() -> None:
    grey = torch.full((1, 3, 200, 200), 100, dtype=torch.uint8)
    case = Case(4, "imagenet_c", 200, 200)
    from robustness.corruptions.draws import source_of

    draws = {key: drawn[None] for key, drawn in noise.draw_impulses(source_of(0, 0, 2, 4, None), case).items()}
    result = noise.impulse_noise(grey, draws, case)
    for level in (0, 255):
        assert result.eq(level).double().mean().item() == pytest.approx(0.17 / 2, abs=0.005)
    assert (result.eq(100) | result.eq(0) | result.eq(255)).all()


# --- blur -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [(32, 32), (40, 57)])
def test_glass_is_the_sequential_loop(severity: int, size: tuple[int, int]) -> None:
    _, reach, passes = blur.GLASS[severity - 1]
    (H, W), rng = size, np.random.default_rng(severity)
    image = torch.from_numpy(rng.integers(0, 256, (3, H, W), dtype=np.uint8))
    offsets = rng.integers(-reach, reach, (passes, H - 2 * reach, W - 2 * reach, 2))
    plain = image.permute(1, 2, 0).numpy().copy()
    result = image[None]
    for field in offsets:
        for i, h in enumerate(range(H - reach, reach, -1)):
            for j, w in enumerate(range(W - reach, reach, -1)):
                dx, dy = field[i, j]
                plain[h, w] = plain[h + dy, w + dx]
        result = blur.copy_from_neighbours(result, torch.from_numpy(field)[None], reach)
    assert torch.equal(result[0], torch.from_numpy(plain).permute(2, 0, 1))


@pytest.mark.parametrize("border", ["nearest", "reflect"])
@pytest.mark.parametrize(("sigma", "truncate"), [(0.7, 4.0), (6.0, 4.0), (2.44, 3.0), (40.0, 3.0)])
def test_gaussian_is_the_plain_sum(border: filters.Border, sigma: float, truncate: float) -> None:
    line = np.random.default_rng(1).uniform(0, 255, 37)
    radius = int(truncate * sigma + 0.5)
    padded = np.pad(line, radius, mode="edge" if border == "nearest" else "symmetric")
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    expected = np.correlate(padded, weights / weights.sum(), mode="valid")
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        row = torch.from_numpy(line).to(dtype).view(1, 1, 1, 37).expand(1, 1, 34, 37)
        result = filters.gaussian(row, sigma, truncate, border)
        np.testing.assert_allclose(result[0, 0, 5].numpy(), expected, rtol=0, atol=tolerance)
        np.testing.assert_allclose(
            filters.gaussian(row.mT, sigma, truncate, border)[0, 0, :, 5].numpy(), expected, rtol=0, atol=tolerance
        )


def test_disks_have_the_cells_and_sums_of_the_reference() -> None:
    cells = [29, 49, 113, 197, 317]
    sums = [1, 1, 1, 1.012975, 1.010786]
    for (radius, edge), count, total in zip(blur.DEFOCUS, cells, sums, strict=True):
        grid = np.arange(-radius, radius + 1)
        assert (grid[:, None] ** 2 + grid**2 <= radius**2).sum() == count
        assert blur.disk(radius, edge).sum(dtype=np.float64) == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_defocus_is_the_plain_sum(severity: int) -> None:
    images = noise_images(1, 36, 45)
    kernel = torch.from_numpy(blur.disk(*blur.DEFOCUS[severity - 1])).double()
    radius = len(kernel) // 2
    padded = torch.nn.functional.pad(images.double(), (radius,) * 4, mode="reflect")
    plain = torch.nn.functional.conv2d(padded.transpose(0, 1), kernel[None, None]).transpose(0, 1)
    result = blur.defocus_blur(images, {}, Case(severity, "imagenet_c", 36, 45))
    assert (result - (plain - 1e-3).clamp(0, 255)).abs().max() < 1.002  # truncation, and nothing else


@pytest.mark.parametrize("degrees", [0.0, 45.0, -45.0, 17.3, -90.0, -133.0])
def test_motion_is_the_plain_sum(degrees: float) -> None:
    images = noise_images(1, 34, 39).double()
    plain = np.zeros((3, 34, 39))
    weights = np.exp(-(np.arange(31) ** 2) / (2 * 8.0**2))
    for i, weight in enumerate(weights / weights.sum()):
        oy = math.ceil(i * math.sin(math.radians(degrees)) - 0.5)
        ox = math.ceil(i * math.cos(math.radians(degrees)) - 0.5)
        rows, columns = (np.arange(34) + oy).clip(0, 33), (np.arange(39) + ox).clip(0, 38)
        plain += weight * images[0].numpy()[:, rows][:, :, columns]
    result = filters.motion(images, 15, 8.0, [degrees], stops_at_border=False)[0]
    np.testing.assert_allclose(result.numpy(), plain, rtol=0, atol=1e-9)


def test_motion_of_imagecorruptions_darkens_what_is_smaller_than_the_line() -> None:
    white = torch.full((1, 3, 32, 32), 255.0)
    assert filters.motion(white, 20, 15, [0.0], stops_at_border=False).min() > 254.9
    assert filters.motion(white, 20, 15, [0.0], stops_at_border=True).max() < 254


@pytest.mark.parametrize("factor", [1.0, 1.11, 1.3, 2.5, 4.5])
def test_a_zoomed_centre_is_interpolated_between_corners(factor: float) -> None:
    x = noise_images(1, 50, 33).double()
    result = filters.zoom_centre(x, factor)
    for axis, size in ((2, 50), (3, 33)):
        part = math.ceil(size / factor)
        start, out = (size - part) // 2, round(part * factor)
        assert result.shape[axis] == out >= size
        positions = start + np.arange(out) * (part - 1) / (out - 1)
        low = np.floor(positions).astype(int).clip(max=start + part - 2)
        share = torch.from_numpy(positions - low).view([-1, 1] if axis == 2 else [1, -1])
        x = x.index_select(axis, torch.from_numpy(low)) * (1 - share) + x.index_select(
            axis, torch.from_numpy(low + 1)
        ) * share  # fmt: skip
    np.testing.assert_allclose(result.numpy(), x.numpy(), rtol=0, atol=1e-9)


def test_zoom_lists_have_the_references_lengths() -> None:
    assert [len(zooms) for zooms in blur.ZOOMS] == [12, 16, 11, 13, 11]
    assert blur.ZOOMS[0][-1] == pytest.approx(1.11)


# --- weather and colour ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [2.0, 1.4])
def test_diamond_square_is_the_plain_recursion(decay: float) -> None:
    side, rng = 16, np.random.RandomState(4)
    uniform = rng.random_sample(side * side - 1)
    draws, heights, step, amplitude = iter(uniform), np.zeros((side, side)), side, 100.0

    def mean_of(points: list[tuple[int, int]]) -> float:
        mean = sum(heights[y % side, x % side] for y, x in points) / 4
        return mean + amplitude * (2 * amplitude * next(draws) - amplitude)

    while step >= 2:
        half = step // 2
        for y in range(half, side, step):
            for x in range(half, side, step):
                heights[y, x] = mean_of([(y + a, x + b) for a in (-half, half) for b in (-half, half)])
        for first_y, first_x in ((0, half), (half, 0)):
            for y in range(first_y, side, step):
                for x in range(first_x, side, step):
                    heights[y, x] = mean_of([(y - half, x), (y + half, x), (y, x - half), (y, x + half)])
        step, amplitude = half, amplitude / decay
    heights = (heights - heights.min()) / np.ptp(heights)
    result = weather.diamond_square(torch.from_numpy(uniform)[None], side, decay)[0]
    np.testing.assert_allclose(result.numpy(), heights, rtol=0, atol=1e-9)


def test_fog_maps_are_as_large_as_the_definition_says() -> None:
    for definition, height, width, side in (
        ("imagenet_c", 32, 32, 256),
        ("imagenet_c", 224, 257, 512),
        ("imagecorruptions", 32, 32, 32),
        ("imagecorruptions", 33, 47, 64),
    ):
        assert weather.fog_side(Case(1, definition, height, width)) == side


def test_hsv_is_that_of_the_standard_library() -> None:
    rng = np.random.default_rng(0)
    pixels = np.concatenate(
        [rng.integers(0, 256, (300, 3)), [[0, 0, 0], [9, 9, 9], [255, 255, 0], [0, 80, 80], [5, 0, 5]]]
    )
    rgb = torch.from_numpy(pixels / 255).T[None, :, None]  # [1, 3, 1, N]
    ours = torch.stack(hsv.rgb_to_hsv(rgb), dim=-1)[0, 0]
    expected = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in pixels / 255])
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(hsv.hsv_to_rgb(*hsv.rgb_to_hsv(rgb)).numpy(), rgb.numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
def test_a_dry_lens_changes_nothing(severity: int) -> None:
    """The reference divides by zero where no drop is."""
    images = noise_images(1, 32, 32)
    assert torch.equal(apply(images, "spatter", severity, draws={"noise": torch.full((1, 32, 32), -9.0)}), images)


# --- digital --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(224, 224), (32, 32), (33, 47), (64, 500), (375, 500)])
@pytest.mark.parametrize("definition", DEFINITIONS)
def test_pixelate_is_pils(size: tuple[int, int], definition: str) -> None:
    (H, W), images = size, noise_images(1, *size)
    up = Image.Resampling.BOX if definition == "imagenet_c" else Image.Resampling.NEAREST
    for severity, ratio in enumerate(digital.PIXELATE, 1):
        small = as_pil(images[0]).resize((int(W * ratio), int(H * ratio)), Image.Resampling.BOX)
        expected = from_pil(small.resize((W, H), up))
        assert torch.equal(apply(images, "pixelate", severity, draws={}, definition=definition)[0], expected)


def test_pixelate_of_a_tall_image_is_pils_within_a_level() -> None:
    """Current PIL takes the height first where it is more than twice the width, and rounds in between."""
    images = noise_images(1, 400, 70)
    expected = from_pil(
        as_pil(images[0]).resize((28, 160), Image.Resampling.BOX).resize((70, 400), Image.Resampling.BOX)
    )
    assert (apply(images, "pixelate", 3, draws={})[0].int() - expected.int()).abs().max() <= 1


def test_jpeg_is_pils() -> None:
    images = noise_images(2, 45, 61)
    for severity, quality in enumerate((25, 18, 15, 10, 7), 1):
        expected = torch.stack([through_pil_jpeg(image, quality=quality) for image in images])
        assert torch.equal(apply(images, "jpeg_compression", severity, draws={}), expected)
    expected = torch.stack([through_pil_jpeg(image, quality=85, optimize=True) for image in images])
    assert torch.equal(digital.jpeg_step(images), expected)


def test_contrast_is_the_plain_formula() -> None:
    images = noise_images(1, 40, 33)
    x = images[0].permute(1, 2, 0).numpy() / 255.0
    means = x.mean(axis=(0, 1), keepdims=True)
    expected = (np.clip((x - means) * 0.2 + means, 0, 1) * 255).astype(np.uint8)
    assert torch.equal(apply(images, "contrast", 3, draws={})[0].permute(1, 2, 0), torch.from_numpy(expected))


@pytest.mark.parametrize("whole_sample", [True, False])
def test_samples_are_mirrored_at_the_border(whole_sample: bool) -> None:
    x, rng = noise_images(1, 34, 40).double(), np.random.default_rng(2)
    rows, columns = rng.uniform(-60, 90, (1, 20, 20)), rng.uniform(-60, 90, (1, 20, 20))
    padded = np.pad(x[0].numpy(), ((0, 0), (100, 100), (100, 100)), mode="reflect" if whole_sample else "symmetric")
    low_y, low_x = np.floor(rows[0]).astype(int), np.floor(columns[0]).astype(int)
    fy, fx = rows[0] - low_y, columns[0] - low_x
    plain = sum(
        wy * wx * padded[:, low_y + 100 + a, low_x + 100 + b]
        for a, wy in ((0, 1 - fy), (1, fy))
        for b, wx in ((0, 1 - fx), (1, fx))
    )
    result = filters.sample(x, torch.from_numpy(rows), torch.from_numpy(columns), whole_sample)
    np.testing.assert_allclose(result[0].numpy(), plain, rtol=0, atol=1e-9)


def test_the_affine_map_takes_three_points_where_the_draws_say() -> None:
    images = noise_images(1, 60, 60).float()
    none = digital._affine(images, torch.zeros(1, 3, 2))
    np.testing.assert_allclose(none.numpy(), images.numpy(), rtol=0, atol=0.01)
    moved = digital._affine(images, torch.tensor([3.0, 5.0]).expand(1, 3, 2))  # all three alike: (x, y)
    np.testing.assert_allclose(moved[..., 5:, 3:].numpy(), images[..., :-5, :-3].numpy(), rtol=0, atol=0.01)


def as_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def through_pil_jpeg(image: Tensor, **options: int | bool) -> Tensor:
    file = io.BytesIO()
    as_pil(image).save(file, "JPEG", **options)
    return from_pil(Image.open(file))
