"""Corruptions, what callers may rely on: shapes, what a result depends on, any size, clear refusals, textures."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from core.errors import DataError
from robustness.corruptions import textures
from robustness.corruptions.apply import BENCHMARK, CORRUPTIONS, EXTRA, GROUPS, NAMES, apply, corrupt, draw
from robustness.corruptions.case import DEFINITIONS
from robustness.corruptions.digital import jpeg_step
from robustness.corruptions.textures import INSTALL, FrostTextures, load_textures

SIZES = [(32, 32), (33, 47), (64, 500)]


def noise_images(count: int, height: int, width: int) -> Tensor:
    """Smooth colours with some noise; parts are black and white."""
    rng = np.random.default_rng([count, height, width])
    coarse = torch.from_numpy(rng.uniform(-80, 335, (count, 3, 6, 6)))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (smooth + torch.from_numpy(rng.normal(0, 4, smooth.shape))).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module", autouse=True)
def frost_files() -> FrostTextures:
    """The textures of the imagecorruptions package, which `make venv` installs."""
    try:
        return load_textures()
    except DataError as error:
        pytest.skip(str(error))


def test_names_are_in_the_order_of_the_table() -> None:
    assert len(BENCHMARK) == 15 and len(EXTRA) == 4 and BENCHMARK + EXTRA == NAMES == tuple(CORRUPTIONS)
    assert [len(names) for names in GROUPS.values()] == [3, 4, 4, 4, 4]
    assert GROUPS["noise"] == ("gaussian_noise", "shot_noise", "impulse_noise")
    assert GROUPS["weather"] == ("snow", "frost", "fog", "brightness")
    assert NAMES[15:] == ("speckle_noise", "gaussian_blur", "spatter", "saturate")


# --- what a result depends on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_any_size_in_any_batch(name: str) -> None:
    """Shape and type are kept, the given images are left alone, and a neighbour or the order changes no byte."""
    for size in SIZES:
        images = noise_images(2, *size)
        before = images.clone()
        for definition in DEFINITIONS:
            for severity in (1, 2, 5):
                together = corrupt(images, name, severity, image_ids=[7, 8], definition=definition)
                assert (together.shape, together.dtype) == (images.shape, torch.uint8)
                swapped = corrupt(images.flip(0), name, severity, image_ids=[8, 7], definition=definition)
                assert torch.equal(swapped.flip(0), together)
                assert not torch.equal(together, images)
        assert torch.equal(images, before)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_32_is_32_batches_of_one(name: str) -> None:
    images = noise_images(32, 40, 56)
    for severity in (2, 4):
        together = corrupt(images, name, severity, image_ids=range(32), seed=3)
        alone = [corrupt(images[i : i + 1], name, severity, image_ids=[i], seed=3) for i in range(32)]
        assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("name", NAMES)
def test_kept_draws_give_the_same_result(name: str) -> None:
    images = noise_images(3, 48, 40)
    for definition in DEFINITIONS:
        drawn = draw(name, 4, (48, 40), image_ids=[5, 6, 7], seed=2, definition=definition)
        kept = apply(images, name, 4, draws=drawn, definition=definition)
        assert torch.equal(kept, corrupt(images, name, 4, image_ids=[5, 6, 7], seed=2, definition=definition))


def digest_of_all() -> str:
    """Of every corruption of a batch, in the bits of this process."""
    images, sha = noise_images(4, 64, 64), hashlib.sha256()
    for name in NAMES:
        sha.update(corrupt(images, name, 3, image_ids=[0, 1, 2, 3]).numpy().tobytes())
    return sha.hexdigest()


def test_another_process_gives_the_same_bytes() -> None:
    """A second Python; a little over two seconds of imports."""
    code = "import torch; torch.set_num_threads(1); from tests.test_corruptions import digest_of_all as d; print(d())"
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    here = digest_of_all()
    torch.set_num_threads(threads)
    assert other.stdout.strip() == here


def test_draws_stay_what_they_are() -> None:
    """Draws and their seeds may not change unnoticed: figures hang on them."""
    sha = hashlib.sha256()
    for name in NAMES:
        for key, drawn in draw(name, 3, (64, 48), image_ids=[0, 1, 2**40], seed=5).items():
            sha.update(f"{name} {key} {drawn.dtype} {tuple(drawn.shape)}".encode() + drawn.numpy().tobytes())
    assert sha.hexdigest()[:16] == "5b95e5e9f3830e36"


def test_draws_differ_by_seed_image_corruption_and_severity() -> None:
    def of(name: str = "gaussian_noise", severity: int = 1, image_id: int = 0, seed: int = 0) -> Tensor:
        return draw(name, severity, (32, 32), image_ids=[image_id], seed=seed)["noise"]

    first = of()
    assert torch.equal(first, of())
    for other in (of(seed=1), of(image_id=1), of(severity=2), of(name="speckle_noise")):
        assert not torch.equal(first, other)


def test_nothing_draws_from_the_global_generators() -> None:
    images = noise_images(1, 32, 32)
    torch.manual_seed(0)
    np.random.seed(0)
    first = [corrupt(images, name, 3, image_ids=[0]) for name in NAMES]
    torch.manual_seed(1)
    np.random.seed(1)
    assert all(torch.equal(a, corrupt(images, name, 3, image_ids=[0])) for a, name in zip(first, NAMES, strict=True))


def test_draws_of_the_device_are_others_and_repeat() -> None:
    images = noise_images(2, 32, 32)
    for name in NAMES:
        host = corrupt(images, name, 3, image_ids=[0, 1])
        device = corrupt(images, name, 3, image_ids=[0, 1], draws_on="device")
        again = corrupt(images.flip(0), name, 3, image_ids=[1, 0], draws_on="device")
        assert torch.equal(device, again.flip(0))
        drawn = bool(draw(name, 3, (32, 32), image_ids=[0]))
        assert torch.equal(device, host) != drawn


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_is_within_one_level() -> None:
    images = noise_images(4, 96, 80)
    for name in NAMES:
        for definition in DEFINITIONS:
            host = corrupt(images, name, 3, image_ids=range(4), definition=definition)
            device = corrupt(images.cuda(), name, 3, image_ids=range(4), definition=definition)
            assert device.is_cuda and (device.cpu().int() - host.int()).abs().max() <= 1, (name, definition)


def test_an_empty_batch_stays_empty() -> None:
    assert corrupt(noise_images(1, 32, 32)[:0], "fog", 1, image_ids=[]).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("name", ["gaussian_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform"])
def test_flat_areas_keep_their_level(name: str) -> None:
    """Weights add up to one, and the hair that float32 sums are short of it does not become a level."""
    for level in (1, 77, 128, 254, 255):
        flat = torch.full((1, 3, 40, 40), level, dtype=torch.uint8)
        for severity in (1, 3, 5):
            assert corrupt(flat, name, severity, image_ids=[0]).eq(level).all(), (level, severity)


# --- refusals -------------------------------------------------------------------------------------------------------

GOOD = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "fogg"}, "corruption: got 'fogg', expected one of gaussian_noise, "),
        ({"severity": 0}, "severity: got 0, expected 1, 2, 3, 4 or 5"),
        ({"severity": 6}, "severity: got 6, expected 1, 2, 3, 4 or 5"),
        ({"definition": "orig"}, "definition: got 'orig', expected one of imagenet_c, imagecorruptions"),
        ({"images": GOOD.float()}, "images: got torch.float32 (2, 3, 32, 32), expected torch.uint8 [B, 3, H, W]"),
        ({"images": GOOD[0]}, "images: got torch.uint8 (3, 32, 32), expected torch.uint8 [B, 3, H, W]"),
        ({"images": GOOD[:, :1]}, "images: got torch.uint8 (2, 1, 32, 32), expected torch.uint8 [B, 3, H, W]"),
        ({"images": GOOD[..., :31]}, "images: got 32x31 px, expected sides of at least 32 px"),
        ({"image_ids": [1]}, "image_ids: got 1 for 2 images, expected one each"),
        ({"image_ids": [1, -1]}, "seed, image_ids: got -1, expected whole numbers from 0"),
        ({"draws_on": "gpu"}, "draws_on: got 'gpu', expected cpu or device"),
    ],
)
def test_wrong_arguments(changed: dict, message: str) -> None:
    arguments = {"images": GOOD, "name": "fog", "severity": 1, "image_ids": [0, 1]} | changed
    with pytest.raises(ValueError) as error:
        corrupt(**arguments)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_draws_for_another_batch_are_refused() -> None:
    drawn = draw("fog", 1, (32, 32), image_ids=[0])
    with pytest.raises(ValueError, match=r"draws\['uniform'\]: got 1 for 2 images, expected one each"):
        apply(GOOD, "fog", 1, draws=drawn)


# --- frost's textures -----------------------------------------------------------------------------------------------


def test_frost_without_the_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textures.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError) as error:
        load_textures.__wrapped__()
    assert INSTALL in str(error.value) and "\n" not in str(error.value)


def test_textures_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"frost1\.png: missing, and frost needs it"):
        load_textures(tmp_path)
    for i, name in enumerate(textures.FILES):
        Image.new("RGB", (60 + i, 50), (200, 10 * i, 0)).save(tmp_path / name)
    mine = load_textures(tmp_path)
    assert load_textures(tmp_path) is mine
    result = corrupt(GOOD, "frost", 3, image_ids=[0, 1], textures=mine)
    assert (result[:, 0].int() - 140).abs().max() <= 2 and result[:, 2].max() <= 2  # 0.7 of it; two are JPEGs
    (tmp_path / "frost3.png").write_bytes(b"not a picture")
    load_textures.cache_clear()
    with pytest.raises(DataError, match=r"frost3\.png: not an image"):
        load_textures(tmp_path)


def test_a_texture_covers_any_image(frost_files: FrostTextures) -> None:
    """The original takes it as it is, imagecorruptions a tenth larger; one that is too small is enlarged by both."""
    assert frost_files.covering(1, 224, 224, always_rescale=False).shape == (3, 315, 560)
    assert frost_files.covering(1, 224, 224, always_rescale=True).shape == (3, 347, 616)
    assert frost_files.covering(1, 315, 500, always_rescale=False).shape == (3, 347, 616)  # no place to choose from
    for rescale in (False, True):
        H, W = frost_files.covering(1, 640, 900, rescale).shape[1:]
        assert 704 <= H <= 705 and pytest.approx(560 / 315, rel=0.01) == W / H
    large = noise_images(1, 640, 900)
    for definition in DEFINITIONS:
        assert corrupt(large, "frost", 1, image_ids=[0], definition=definition).shape == large.shape


# --- the JPEG step --------------------------------------------------------------------------------------------------


def test_the_jpeg_step_takes_a_quarter_of_the_noise() -> None:
    """Residuals of gaussian_noise before and after, spec section 1: 19.2 to 14.7 levels at severity 1."""
    grey = torch.full((2, 3, 224, 224), 120, dtype=torch.uint8)
    noisy = corrupt(grey, "gaussian_noise", 1, image_ids=[0, 1])
    stored = jpeg_step(noisy)
    assert (stored.shape, stored.dtype) == (noisy.shape, torch.uint8)
    before, after = ((x.double() - 120).std() for x in (noisy, stored))
    assert 19 < before < 21 and 0.65 < after / before < 0.8
    assert torch.equal(jpeg_step(noisy[1:]), stored[1:])
