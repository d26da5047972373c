"""`rcmae predict` with a detector: COCO results as JSON, and pictures of what was found."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.io import encode_jpeg

from core.engine import autocast
from core.errors import shown
from core.files import replace_file
from core.transforms import normalized_images
from transfer.detection.coco_eval import detection_rows
from transfer.detection.data import padded
from transfer.detection.detector import load_detector
from transfer.detection.draw import draw_detections
from transfer.detection.inference import Detections
from transfer.detection.jitter import eval_size, resize_to_fit


class DetectorPredictions:
    """Writes detections.json: COCO results, from the detector's own score threshold on; images.json: ids of images and
    categories; pictures/: each photograph with what was found from `min_score` on.
    """  # fmt: skip

    def __init__(self, model: Path, out: Path, device: torch.device, precision: str, min_score: float) -> None:
        """Raises: CheckpointError."""
        self._loaded = load_detector(model)
        self._loaded.model.to(device)
        self._out, self._device, self._precision, self._min_score = out, device, precision, min_score
        self._results: list[dict[str, Any]] = []
        self._entries: list[dict[str, Any]] = []

    def add(self, stem: str, index: int, name: str, image: Tensor) -> None:
        """Detect in a photograph uint8 [3, H, W]."""
        found = self._detect(image)
        self._entries.append({"id": index, "file_name": name, "height": image.shape[1], "width": image.shape[2]})
        self._results += [
            {
                "image_id": index,
                "category_id": self._loaded.category_ids[row.label],
                "bbox": list(row.xywh),
                "score": row.score,
                "segmentation": {"size": list(found.size), "counts": row.mask},
            }
            for row in detection_rows(index, found)
        ]
        picture = draw_detections(image, found, self._loaded.names, self._min_score)
        target = self._out / "pictures" / f"{stem}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, encode_jpeg(picture.contiguous(), quality=92).numpy().tobytes())

    def finish(self) -> str:
        """Write the files about all photographs."""
        pairs = zip(self._loaded.category_ids, self._loaded.names, strict=True)
        described = {"images": self._entries, "categories": [{"id": id_, "name": name} for id_, name in pairs]}
        replace_file(self._out / "detections.json", json.dumps(self._results).encode())
        replace_file(self._out / "images.json", json.dumps(described, indent=1).encode())
        num_drawn = sum(result["score"] >= self._min_score for result in self._results)
        return (
            f"{len(self._results)} detections, {num_drawn} of them from score {self._min_score:g} on drawn; "
            f"{shown(self._out / 'pictures')}"
        )

    @torch.no_grad()
    def _detect(self, image: Tensor) -> Detections:
        loaded, original = self._loaded, (image.shape[1], image.shape[2])
        square = padded(resize_to_fit(image, loaded.side), loaded.side).unsqueeze(0).to(self._device)  # [1, 3, S, S]
        sizes = torch.tensor([eval_size(original, loaded.side)], device=self._device)
        with autocast(self._device, self._precision):
            (found,) = loaded.model.detect(normalized_images(square, sizes, torch.float32), sizes, [original])
        return found
