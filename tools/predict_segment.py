"""`rcmae predict` with a segmentor: the class of every pixel as PNGs, and coloured overlays with a legend."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import encode_jpeg

from core.errors import shown
from core.files import replace_file
from transfer.segmentation.augment import fitted_size, resize_image, without_threads
from transfer.segmentation.classes import Classes
from transfer.segmentation.directory import load_segmentor
from transfer.segmentation.draw import overlay, with_legend
from transfer.segmentation.tasks import Labeller

MAX_PALETTE = 256  # colours that a PNG can have


class SegmentorPredictions:
    """Writes labels/: a PNG of class indices for each photograph, in the colours of the classes; overlays/: the
    photographs under these colours, with a legend; classes.json: what the indices mean, and which file is which.
    """  # fmt: skip

    def __init__(self, model: Path, out: Path, device: torch.device, precision: str) -> None:
        """Raises: CheckpointError."""
        self._loaded = load_segmentor(model)
        self._loaded.model.to(device).eval()
        self._out, self._labeller = out, Labeller(self._loaded.inference, device, precision)
        self._entries: list[dict[str, Any]] = []
        without_threads()

    def add(self, stem: str, index: int, name: str, image: Tensor) -> None:
        """Label the pixels of a photograph uint8 [3, H, W]."""
        classes, size = self._loaded.classes, (image.shape[1], image.shape[2])
        pixels = resize_image(np.ascontiguousarray(image.permute(1, 2, 0)), fitted_size(size, self._loaded.scale))
        view = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)  # [1, 3, h, w]
        labels = self._labeller(self._loaded.model, [view], size).cpu()  # [H, W]
        picture = with_legend(overlay(image, labels, classes.palette), classes, labels)
        jpeg = encode_jpeg(picture.contiguous(), quality=92).numpy().tobytes()
        for folder, ending, data in (("labels", "png", index_png(labels, classes)), ("overlays", "jpg", jpeg)):
            target = self._out / folder / f"{stem}.{ending}"
            target.parent.mkdir(parents=True, exist_ok=True)
            replace_file(target, data)
        self._entries.append({"file_name": name, "label": f"labels/{stem}.png", "height": size[0], "width": size[1]})

    def finish(self) -> str:
        """Write what the indices mean."""
        pairs = zip(self._loaded.classes.names, self._loaded.classes.palette, strict=True)
        classes = [{"index": i, "name": name, "colour": "#" + bytes(rgb).hex()} for i, (name, rgb) in enumerate(pairs)]
        described = {"classes": classes, "images": self._entries}
        replace_file(self._out / "classes.json", json.dumps(described, indent=1).encode())
        return f"labels in {shown(self._out / 'labels')}, pictures in {shown(self._out / 'overlays')}"


def index_png(labels: Tensor, classes: Classes) -> bytes:
    """Labels [H, W] as a PNG of class indices with the palette of the classes; grey of 16 bits for more than 256."""
    buffer = io.BytesIO()
    if len(classes) > MAX_PALETTE:
        Image.fromarray(labels.numpy().astype(np.uint16)).save(buffer, "PNG")
        return buffer.getvalue()
    image = Image.fromarray(labels.numpy().astype(np.uint8))
    image.putpalette([value for colour in classes.palette for value in colour])
    image.save(buffer, "PNG")
    return buffer.getvalue()
