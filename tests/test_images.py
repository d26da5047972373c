"""Image bytes: every mode by its documented rule, and whatever is broken ends as `BadImage`, never as a crash."""

import io
import os
import re
import struct
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from core.images import MAX_PIXELS, BadImage, decode

H, W = 24, 40
UPRIGHT = Image.fromarray(((np.indices((H, W)).sum(0)[..., None] * [2, 1, 3]) % 256).astype(np.uint8))
TURNS = {  # what an image stored with this EXIF orientation needs to stand upright
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def as_tensor(image: Image.Image) -> Tensor:
    pixels = np.array(image)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def pil(data: bytes, mode: str = "RGB") -> Tensor:
    with Image.open(io.BytesIO(data)) as image:
        return as_tensor(image.convert(mode))


def reason(data: bytes, **options: int) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data, **options)
    text = str(caught.value)
    assert text.isprintable() and 0 < len(text) < 150
    return text


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, color: int, rows: bytes, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = chunk(b"IHDR", header), extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def peak_mib() -> float:
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def in_child(function: Callable[[], None]) -> None:
    """Run in a child process, so that a decoder that crashes is a failed test and not the end of all tests."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert not os.WIFSIGNALED(status), f"the decoder died of signal {os.WTERMSIG(status)}"
    assert os.waitstatus_to_exitcode(status) == 0, "see the child's traceback"


# --- modes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [
        ("RGB", "PNG"), ("RGB", "BMP"), ("RGB", "TIFF"), ("RGB", "PPM"), ("L", "PNG"), ("L", "PPM"), ("L", "TIFF"),
        ("1", "PNG"), ("1", "TIFF"), ("P", "PNG"), ("P", "BMP"), ("P", "GIF"), ("CMYK", "TIFF"), ("YCbCr", "TIFF"),
    ],
)  # fmt: skip
def test_lossless_modes_become_rgb_as_pillow_converts_them(mode: str, file_format: str) -> None:
    image = UPRIGHT.convert(mode)
    decoded = decode(encoded(image, file_format))
    assert (decoded.dtype, decoded.shape) == (torch.uint8, (3, H, W))
    assert torch.equal(decoded, as_tensor(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30}, {"subsampling": 0}])
def test_jpegs_on_the_fast_path_equal_pillow(mode: str, options: dict) -> None:
    data = encoded(UPRIGHT.convert(mode), "JPEG", **options)
    assert torch.equal(decode(data), pil(data))


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP"])
def test_cmyk_and_colour_stay_close_through_lossy_formats(file_format: str) -> None:
    image = UPRIGHT.convert("CMYK")
    decoded = decode(encoded(image, file_format, quality=95))
    assert (decoded.float() - as_tensor(image.convert("RGB")).float()).abs().mean() < 12


def test_grey_has_one_channel_where_asked() -> None:
    grey = UPRIGHT.convert("L")
    for data in (encoded(grey, "JPEG"), encoded(grey, "PNG"), encoded(grey, "GIF")):
        decoded = decode(data, channels=1)
        assert decoded.shape == (1, H, W)
        assert torch.equal(decoded, pil(data, "L"))
    colour = decode(encoded(UPRIGHT, "JPEG", quality=95), channels=1)
    assert (colour.float() - as_tensor(grey).float()).abs().mean() < 3


@pytest.mark.parametrize(
    ("image", "file_format", "options", "expected"),
    [
        (Image.new("RGBA", (3, 2), (10, 20, 30, 0)), "PNG", {}, (255, 255, 255)),
        (Image.new("RGBA", (3, 2), (10, 20, 30, 255)), "PNG", {}, (10, 20, 30)),
        (Image.new("RGBA", (3, 2), (0, 100, 200, 51)), "PNG", {}, (204, 224, 244)),
        (Image.new("RGBA", (3, 2), (0, 100, 200, 51)), "TIFF", {}, (204, 224, 244)),
        (Image.new("RGBA", (3, 2), (9, 9, 9, 0)), "WEBP", {"lossless": True}, (255, 255, 255)),
        (Image.new("LA", (3, 2), (0, 51)), "PNG", {}, (204, 204, 204)),
        (Image.new("RGB", (3, 2), (1, 2, 3)), "PNG", {"transparency": (1, 2, 3)}, (255, 255, 255)),
        (Image.new("RGB", (3, 2), (1, 2, 3)), "PNG", {"transparency": (3, 2, 1)}, (1, 2, 3)),
        (Image.new("L", (3, 2), 7), "PNG", {"transparency": 7}, (255, 255, 255)),
        (Image.new("1", (3, 2), 0), "PNG", {"transparency": 0}, (255, 255, 255)),
    ],
)
def test_what_is_transparent_lies_on_white(
    image: Image.Image, file_format: str, options: dict, expected: tuple
) -> None:
    decoded = decode(encoded(image, file_format, **options))
    assert decoded.shape == (3, 2, 3)
    assert torch.equal(decoded, torch.tensor(expected, dtype=torch.uint8).view(3, 1, 1).expand(3, 2, 3))


@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_a_transparent_palette_entry_lies_on_white(file_format: str) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    decoded = decode(encoded(image, file_format, transparency=1))
    assert decoded[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255]]


def test_a_half_transparent_palette_entry_is_blended() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 100, 200, 200, 100, 50])
    image.putdata([0, 1])
    decoded = decode(encoded(image, "PNG", transparency=bytes([51, 255])))
    assert decoded[:, 0].T.tolist() == [[204, 224, 244], [200, 100, 50]]


@pytest.mark.parametrize(
    ("file_format", "dtype"), [("PNG", "<u2"), ("TIFF", "<u2"), ("TIFF", ">u2"), ("PPM", "<u2"), ("TIFF", "<i4")]
)
def test_16_bit_grey_is_scaled_by_its_range(file_format: str, dtype: str) -> None:
    ramp = np.arange(65536).reshape(256, 256)
    decoded = decode(encoded(Image.fromarray(ramp.astype(dtype)), file_format))
    assert torch.equal(decoded, torch.from_numpy(ramp // 257).to(torch.uint8).expand(3, 256, 256))
    assert decoded.eq(255).float().mean() < 0.01


@pytest.mark.parametrize(("color", "samples"), [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colour_and_alpha_keep_their_high_bytes(color: int, samples: int) -> None:
    ramp = np.arange(0, 65536, 257, dtype=">u2")  # high byte = low byte
    pixels = np.repeat(ramp[:, None], samples, axis=1)
    if color in {4, 6}:
        pixels[:, -1] = 65535
    decoded = decode(png(256, 1, 16, color, b"\0" + pixels.tobytes()))
    assert torch.equal(decoded, torch.arange(256, dtype=torch.uint8).expand(3, 1, 256))


def test_pixels_without_a_range_are_refused_by_name() -> None:
    floats = encoded(Image.fromarray(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)), "TIFF")
    assert reason(floats) == "float pixels have no fixed range; convert the file to 8 or 16 bit"
    for values in ([70000, 0], [-1, 0]):
        wide = encoded(Image.fromarray(np.array([values], dtype=np.int32)), "TIFF")
        assert reason(wide) == "integer pixels outside 0..65535; convert the file to 8 or 16 bit"


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_counts(file_format: str) -> None:
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    decoded = decode(data)
    assert torch.equal(decoded, as_tensor(frames[0]))


def test_of_a_multi_picture_jpeg_the_first_counts_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(UPRIGHT, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))], exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "MPO"
        expected = as_tensor(image.convert("RGB").transpose(TURNS[6]))
    assert torch.equal(decode(data), expected)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_single_pixel_is_an_image(file_format: str, channels: int) -> None:
    assert decode(encoded(Image.new("RGB", (1, 1), "white"), file_format), channels).tolist() == [[[255]]] * channels


# --- orientation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize(
    ("file_format", "mode", "options"),
    [
        ("JPEG", "RGB", {}), ("JPEG", "L", {}), ("JPEG", "CMYK", {}), ("PNG", "RGB", {}), ("PNG", "P", {}),
        ("PNG", "I;16", {}), ("TIFF", "RGB", {}), ("WEBP", "RGB", {"lossless": True}),
    ],
)  # fmt: skip
def test_exif_orientation_is_applied_once(orientation: int, file_format: str, mode: str, options: dict) -> None:
    image = (
        Image.fromarray(np.arange(H * W, dtype=np.uint16).reshape(H, W) * 64)
        if mode == "I;16"
        else UPRIGHT.convert(mode)
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain = decode(encoded(image, file_format, **options))
    expected = Image.fromarray(plain.permute(1, 2, 0).numpy())
    if (way := TURNS[orientation]) is not None:
        expected = expected.transpose(way)
    assert torch.equal(decode(encoded(image, file_format, exif=exif, **options)), as_tensor(expected))


# --- broken files ---------------------------------------------------------------------------------------------------


def test_a_truncated_jpeg_is_refused_at_every_cut() -> None:
    for options in ({}, {"progressive": True}):
        data = encoded(UPRIGHT, "JPEG", **options)
        for cut in [*range(1, len(data), 23), len(data) - 3, len(data) - 2, len(data) - 1]:
            assert reason(data[:cut]), cut
    assert reason(data[:-10]) == "broken image: Image is incomplete or truncated"


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_other_truncated_files_are_refused(file_format: str) -> None:
    data = encoded(UPRIGHT, file_format)
    for cut in (1, 20, len(data) // 2, len(data) - 30):
        reason(data[:cut])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "empty file"),
        (b"\0", "not an image, or of an unknown format"),
        (b"dear diary, no picture today\n", "not an image, or of an unknown format"),
        (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not an image, or of an unknown format"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image, or of an unknown format"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 100, None),
        (b"\x89PNG\r\n\x1a\n", None),
        (b"GIF89a", None),
        (b"II*\0\x08\0\0\0", None),
    ],
)
def test_what_is_no_image_is_refused_with_its_reason(data: bytes, expected: str | None) -> None:
    text = reason(data)
    assert expected is None or text == expected


def test_formats_whose_decoder_runs_programs_are_not_tried() -> None:
    data = encoded(UPRIGHT, "EPS")
    assert reason(data) == "not an image, or of an unknown format"


def test_the_name_of_a_file_does_not_matter() -> None:
    """ImageNet holds a PNG called .JPEG; `decode` sees no names and goes by the content."""
    assert torch.equal(decode(encoded(UPRIGHT, "PNG")), decode(encoded(UPRIGHT, "BMP")))


# --- bombs ----------------------------------------------------------------------------------------------------------


def bomb_png() -> bytes:
    rows = zlib.compressobj(1)
    body = b"".join(rows.compress(bytes(2501 * 1000)) for _ in range(20)) + rows.flush()  # 20,000 rows of 20,000 bits
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def bomb_text() -> bytes:
    packed = zlib.compress(bytes(200_000_000), 1)
    return png(1, 1, 8, 0, b"\0\0", extra=chunk(b"zTXt", b"Comment\0\0" + packed) + chunk(b"iCCP", b"x\0\0" + packed))


def lying_jpeg() -> bytes:
    data = bytearray(encoded(UPRIGHT, "JPEG"))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", 65500, 65500)
    return bytes(data)


def lying_bmp() -> bytes:
    data = bytearray(encoded(UPRIGHT, "BMP"))
    data[18:26] = struct.pack("<ii", 30000, 30000)
    return bytes(data)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (bomb_png, "limit of 64 megapixels"),
        (lying_jpeg, "limit of 64 megapixels"),
        (lying_bmp, "limit of 64 megapixels"),
        (lambda: png(100_000, 100_000, 8, 2, b""), "limit of 64 megapixels"),
        (lambda: png(10_000, 9_000, 8, 2, b""), "10000x9000 px is over the limit of 64 megapixels"),
        (lambda: png(2**31 - 1, 2**31 - 1, 8, 2, b""), "limit of 64 megapixels"),
        (lambda: png(0, 5, 8, 2, b""), ""),
        (bomb_text, ""),
        (lambda: encoded(Image.new("1", (9000, 9000)), "TIFF", compression="group4"), "9000x9000 px is over the limit"),
        (lambda: encoded(Image.new("1", (9000, 9000)), "GIF"), "9000x9000 px is over the limit"),
    ],
    ids=["png", "jpeg", "bmp", "huge", "90mp", "int-max", "no-width", "text", "tiff", "gif"],
)  # fmt: skip
def test_bombs_are_refused_quickly_with_little_memory(make: Callable[[], bytes], expected: str) -> None:
    data = make()
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest memory use so far
    before, start = peak_mib(), time.perf_counter()
    assert expected in reason(data)
    assert time.perf_counter() - start < 1
    assert peak_mib() - before < 50


def test_the_limit_counts_pixels_exactly() -> None:
    data = encoded(UPRIGHT, "PNG")
    assert decode(data, max_pixels=H * W).shape == (3, H, W)
    assert reason(data, max_pixels=H * W - 1) == f"{W}x{H} px is over the limit of {(H * W - 1) / 1e6:g} megapixels"


def test_a_raised_limit_holds_beyond_the_decoders_own_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", H * W - 1)  # Pillow warns beyond this and raises beyond twice this
    assert decode(encoded(UPRIGHT, "PNG"), max_pixels=H * W).shape == (3, H, W)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", H * W // 2 - 1)
    assert reason(encoded(UPRIGHT, "PNG")) == f"over the limit of {MAX_PIXELS / 1e6:g} megapixels"


# --- mutants --------------------------------------------------------------------------------------------------------

MUTATED = {
    "jpeg": lambda: encoded(UPRIGHT, "JPEG"),
    "jpeg-progressive": lambda: encoded(UPRIGHT, "JPEG", progressive=True),
    "jpeg-cmyk": lambda: encoded(UPRIGHT.convert("CMYK"), "JPEG"),
    "png": lambda: encoded(UPRIGHT, "PNG"),
    "png-palette": lambda: encoded(UPRIGHT.convert("P"), "PNG", transparency=3),
    "webp": lambda: encoded(UPRIGHT, "WEBP"),
    "gif": lambda: encoded(UPRIGHT, "GIF"),
    "bmp": lambda: encoded(UPRIGHT.convert("P"), "BMP"),
    "ppm": lambda: encoded(UPRIGHT, "PPM"),
    "tiff": lambda: encoded(UPRIGHT, "TIFF"),
    "tiff-lzw": lambda: encoded(UPRIGHT, "TIFF", compression="tiff_lzw"),
    "tiff-jpeg": lambda: encoded(UPRIGHT, "TIFF", compression="jpeg"),
}


def is_image_or_refused(data: bytes) -> bool:
    """Whether the bytes give an image; False where they are refused. Anything else is raised."""
    try:
        decoded = decode(data)
    except BadImage:
        return False
    assert decoded.dtype == torch.uint8 and decoded.ndim == 3 and decoded.shape[0] == 3 and decoded.numel() > 0
    return True


@pytest.mark.parametrize("name", MUTATED)
def test_mutants_give_an_image_or_a_reason(name: str) -> None:
    data = MUTATED[name]()

    def check() -> None:
        rng = np.random.default_rng(list(name.encode()))
        for _ in range(200):
            mutant = bytearray(data)
            for place in rng.integers(len(data), size=rng.integers(1, 4)):
                mutant[place] = rng.integers(256)
            is_image_or_refused(bytes(mutant))

    in_child(check)


@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_png_with_one_flipped_byte_at_any_place(mode: str) -> None:
    data = encoded(UPRIGHT.convert(mode), "PNG")
    kinds = [kind for kind in (b"IHDR", b"PLTE", b"IDAT") if kind in data]
    spans = []  # start of the type, end of the body
    for kind in kinds:
        start = data.index(kind)
        spans.append((start, start + 4 + int.from_bytes(data[start - 4 : start], "big")))

    def check() -> None:
        refused = 0
        for place in range(len(data)):
            mutant = bytearray(data)
            mutant[place] ^= 0x41
            refused += not is_image_or_refused(bytes(mutant))
            for (
                start,
                end,
            ) in spans:  # the same with the checksum made right, so that it is not the checksum that saves us
                if start <= place < end:
                    mutant[end : end + 4] = struct.pack(">I", zlib.crc32(mutant[start:end]))
                    is_image_or_refused(bytes(mutant))
        assert refused > len(data) / 2, "checksums are not looked at"

    in_child(check)
