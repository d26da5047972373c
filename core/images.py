"""Image bytes to a uint8 tensor: everything that a folder of photographs holds, or a `BadImage` that says why not.

Rules (docs/data.md): EXIF orientation is applied; CMYK, grey and palette become RGB; what is transparent is laid on
white; 16-bit grey is scaled by its value range; of an animation the first frame counts; nothing truncated is accepted.
"""

import io
import re
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from core.errors import shown

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # no EPS: Pillow would run its program
MAX_PIXELS = 64_000_000
_MODES = {1: "L", 3: "RGB"}


class BadImage(Exception):  # noqa: N818  the field's word
    """These bytes are no usable image; the message is the reason, without the name."""


def decode(data: bytes, channels: int = 3, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode one image file.

    Args:
        data: the bytes of the file.
        channels: 3 for RGB, 1 for grey.
        max_pixels: larger images are refused from their header alone, before any memory is taken.
    Returns: uint8 [channels, H, W], upright.
    Raises: BadImage with the reason.
    """
    if not data:
        raise BadImage("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on bombs, whose limit is ours, and on odd metadata
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise BadImage(f"{width}x{height} px is over the limit of {max_pixels / 1e6:g} megapixels")
                if image.format in {"JPEG", "MPO"} and image.mode in {"RGB", "L"}:
                    return _decode_jpeg(data, channels)
                return _decode_with_pil(image, channels)
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage(f"over the limit of {max_pixels / 1e6:g} megapixels") from None
    except MemoryError:
        raise
    except Exception as error:  # garbage makes decoders raise anything: OSError, ValueError, SyntaxError, struct.error
        raise BadImage(_reason(error)) from None


def _decode_jpeg(data: bytes, channels: int) -> Tensor:
    encoded = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())  # the decoder wants writable memory
    mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
    return decode_jpeg(encoded, mode=mode, apply_exif_orientation=True)


def _decode_with_pil(image: Image.Image, channels: int) -> Tensor:
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode in {"I", "I;16", "I;16B", "I;16L", "I;16N"}:
        image = _from_16_bit(image)
    if image.mode == "F":
        raise BadImage("float pixels have no fixed range; convert the file to 8 or 16 bit")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.array(image.convert(_MODES[channels]))  # [H, W(, 3)]
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)  # [channels, H, W]


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImage("integer pixels outside 0..65535; convert the file to 8 or 16 bit")
    # PIL's own conversion clips at 255 and would turn almost every pixel white.
    return Image.fromarray((values // 257).astype(np.uint8))


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or of an unknown format"
    text = re.split(r"\.cpp:\d+\W+", str(error))[-1]  # torchvision names its source file first
    return f"broken image: {shown(' '.join(text.split()))[:100] or type(error).__name__}"
