"""Pictures of run directories, made small enough to stand in one file."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from core.errors import shown
from core.images import BadImage, decode
from tools.report.blocks import Picture

MAX_FILE_BYTES = 64 * 2**20
WEBP_METHOD = 4  # the encoder's effort, of 6


@dataclass(frozen=True)
class Quality:
    """How pictures are kept: the longest side in pixels, WebP's quality, and how many at most."""

    side_px: int
    webp: int
    most: int


# From what is wanted to what always fits; the last keeps none.
LADDER = (Quality(1000, 82, 24), Quality(760, 72, 20), Quality(560, 60, 12), Quality(0, 0, 0))


@dataclass
class Album:
    """Embeds pictures until there are too many, and counts what it left out."""

    quality: Quality
    embedded: int = 0
    left_out: list[str] = field(default_factory=list)

    def add(self, path: Path, alt: str, caption: str) -> Picture | str:
        """A picture of a file, or in words why there is none."""
        if self.embedded >= self.quality.most:
            self.left_out.append(path.name)
            return (
                f"{shown(path.name)}: left out, the report holds no more than {self.quality.most} pictures of this size"
            )
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise BadImage("larger than a report reads")
            pixels = decode(path.read_bytes())  # [3, H, W]
        except FileNotFoundError:
            return f"{shown(path.name)}: not there"
        except OSError as error:
            return f"{shown(path.name)}: {shown(error.strerror or 'cannot be read')}"
        except BadImage as error:
            return f"{shown(path.name)}: {shown(str(error))}"
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        image.thumbnail((self.quality.side_px, self.quality.side_px), Image.Resampling.LANCZOS)
        self.embedded += 1
        return Picture(_uri(image, self.quality.webp), image.width, image.height, alt, caption)


def _uri(image: Image.Image, quality: int) -> str:
    data = io.BytesIO()
    image.save(data, "WEBP", quality=quality, method=WEBP_METHOD)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()


def sorted_out(found: Sequence[Picture | str]) -> tuple[list[Picture], list[str]]:
    """Pictures apart from the words that stand for those that are not there."""
    return [one for one in found if isinstance(one, Picture)], [one for one in found if isinstance(one, str)]
