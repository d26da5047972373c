"""Pictures of labels: classes as colours on the photograph, a legend, tables of such pictures.

Letters: H W a picture, K classes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as VF

from core.errors import shown
from transfer.segmentation.classes import Classes

OPACITY = 0.6  # of colours on the photograph
GAP_PX, LINE_PX, TEXT_PX, NAME_CHARACTERS = 6, 18, 13, 40
WHITE = 255


def overlay(image: Tensor, labels: Tensor | np.ndarray, palette: Sequence[tuple[int, int, int]]) -> Tensor:
    """A photograph with its classes as colours; pixels whose label is no class stay as photographed.

    Args:
        image: uint8 [3, H, W] RGB.
        labels: [H, W], any integer type.
        palette: RGB of each class.
    Returns: uint8 [3, H, W].
    """
    labels = torch.as_tensor(labels).to("cpu", torch.int64)
    known = (labels >= 0) & (labels < len(palette))
    colours = torch.tensor(palette, dtype=torch.float32)  # [K, 3]
    index = labels.clamp(0, len(palette) - 1)
    picture = image.cpu().clone()
    for channel, column in zip(picture, colours.T, strict=True):  # one at a time: photographs may be large
        mixed = channel * (1 - OPACITY) + column[index] * OPACITY  # [H, W]
        channel.copy_(torch.where(known, mixed.round().to(torch.uint8), channel))
    return picture


def legend(classes: Classes, present: Sequence[int], width: int) -> Tensor:
    """Names and colours of some classes, in as many lines as it takes.

    Args:
        present: indices of the classes to name, in this order.
        width: in pixels; more where a single name needs it.
    Returns: uint8 [3, h, w] on white; h is 0 where there is no class to name.
    """
    font = ImageFont.load_default(size=TEXT_PX)
    names = [shown(classes.names[index], NAME_CHARACTERS) for index in present]
    cell = LINE_PX + 3 * GAP_PX + max((int(font.getlength(name)) + 1 for name in names), default=0)
    columns = max(1, width // cell)
    lines = -(-len(names) // columns)
    sheet = Image.new("RGB", (max(width, cell), max(1, lines * LINE_PX)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (index, name) in enumerate(zip(present, names, strict=True)):
        x, y = place % columns * cell + GAP_PX, place // columns * LINE_PX
        box = (x, y + 2, x + LINE_PX, y + LINE_PX - 3)
        draw.rectangle(box, fill=classes.palette[index], outline="dimgray")
        draw.text((x + LINE_PX + GAP_PX, y), name, fill="black", font=font)
    pixels = torch.from_numpy(np.array(sheet)).permute(2, 0, 1)  # [3, h, w]
    return pixels[:, : lines * LINE_PX]


def with_legend(picture: Tensor, classes: Classes, labels: Tensor | np.ndarray) -> Tensor:
    """A picture uint8 [3, H, W] above the legend of the classes that occur in its labels: uint8 [3, H', W']."""
    return below([picture, legend(classes, classes_in([labels], len(classes.names)), picture.shape[2])])


def classes_in(maps: Sequence[Tensor | np.ndarray], num_classes: int) -> list[int]:
    """The classes that occur in some label maps, in their order."""
    found = torch.zeros(num_classes, dtype=torch.bool)
    for labels in maps:
        values = torch.as_tensor(labels).to("cpu", torch.int64).unique()
        found[values[(values >= 0) & (values < num_classes)]] = True
    return found.nonzero()[:, 0].tolist()


def contact_sheet(titles: Sequence[str], rows: Sequence[Sequence[Tensor]], side: int) -> Tensor:
    """Rows of pictures under titles, as a table.

    Args:
        titles: of the columns.
        rows: pictures uint8 [3, h, w] of any size, as many in each row as there are titles.
        side: pictures are made smaller until both of their sides are at most so many pixels.
    Returns: uint8 [3, H, W] on white.
    """
    cells = [[_shrunk(picture, side) for picture in row] for row in rows]
    heading = [_title(title) for title in titles]
    widths = [max(picture.shape[2] for picture in column) for column in zip(heading, *cells, strict=True)]
    return below([beside(row, widths) for row in (heading, *cells)])


def below(pictures: Sequence[Tensor]) -> Tensor:
    """Pictures uint8 [3, h, w] one below the other, with gaps, on white."""
    width = max(picture.shape[2] for picture in pictures)
    gap = torch.full((3, GAP_PX, width), WHITE, dtype=torch.uint8)
    parts = [part for picture in pictures for part in (_on_white(picture, picture.shape[1], width), gap)]
    return torch.cat(parts[:-1], dim=1)


def beside(pictures: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
    """Pictures uint8 [3, h, w] in columns of these widths, with gaps, on white."""
    height = max(picture.shape[1] for picture in pictures)
    gap = torch.full((3, height, GAP_PX), WHITE, dtype=torch.uint8)
    columns = zip(pictures, widths, strict=True)
    parts = [part for picture, width in columns for part in (_on_white(picture, height, width), gap)]
    return torch.cat(parts[:-1], dim=2)


def _on_white(picture: Tensor, height: int, width: int) -> Tensor:
    sheet = torch.full((3, height, width), WHITE, dtype=torch.uint8)
    sheet[:, : picture.shape[1], : picture.shape[2]] = picture
    return sheet


def _shrunk(picture: Tensor, side: int) -> Tensor:
    H, W = picture.shape[1:]
    factor = side / max(H, W)
    if factor >= 1:
        return picture
    return VF.resize(picture, [max(1, round(H * factor)), max(1, round(W * factor))], antialias=True)


def _title(text: str) -> Tensor:
    font = ImageFont.load_default(size=TEXT_PX)
    sheet = Image.new("RGB", (int(font.getlength(text)) + 1, LINE_PX), "white")
    ImageDraw.Draw(sheet).text((0, 0), text, fill="black", font=font)
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1)
