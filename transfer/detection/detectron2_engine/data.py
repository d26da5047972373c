"""Images and annotations of a `CocoSet` through detectron2's mapper, samplers and loaders. Spec detection 1."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
from detectron2.data import DatasetMapper, build_detection_test_loader, build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.structures import BoxMode
from torch.utils.data import DataLoader, Dataset

from core.errors import DataError, shown
from core.loader import LoaderConfig
from transfer.detection.coco import Annotation, CocoSet
from transfer.detection.jitter import JitterConfig

Record = dict[str, Any]  # an image in detectron2's format


class CocoRecords(Dataset):
    """The images of a set as detectron2's records, made when they are asked for.

    What was refused or dropped when the set was read is not in them, so both engines see the same. `image_id` is the
    index of the image in the set, `category_id` the label.
    """

    def __init__(self, coco: CocoSet) -> None:
        self._coco = coco

    def __len__(self) -> int:
        return len(self._coco)

    def __getitem__(self, index: int) -> Record:
        height, width = self._coco.size(index)
        return {
            "file_name": str(self._coco.folder / os.fsdecode(self._coco.file_names[index])),
            "height": height,
            "width": width,
            "image_id": index,
            "annotations": [_annotation(each) for each in self._coco.objects(index)],
        }


def _annotation(each: Annotation) -> Record:
    segmentation = [part.reshape(-1).tolist() for part in each.polygons] if each.rle is None else each.rle.as_coco()
    return {
        "bbox": each.box.tolist(),
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": each.label,
        "iscrowd": int(each.crowd),
        "segmentation": segmentation,
    }


@dataclass(frozen=True)
class Mapped:
    """A mapper whose faults are one line each. A named class so that loader workers can receive it."""

    mapper: DatasetMapper
    origin: Path  # of the set

    def __call__(self, record: Record) -> Record:
        """A record to what the model takes. Raises: DataError naming the image that cannot be used."""
        try:
            return self.mapper(record)
        except Exception as error:  # decoders and transforms raise anything on broken images
            reason = shown((str(error) or type(error).__name__).splitlines()[0])
            raise DataError(
                f"{shown(self.origin)}: {shown(record['file_name'])}: {reason}; detectron2 replaces no image: mend it, "
                "remove it from the JSON, or leave framework=detectron2 out"
            ) from None


def mask_format(coco: CocoSet) -> str:
    """How detectron2 holds masks to learn from: as bitmaps if any object of the set has run lengths, else as polygons.

    Its polygons cannot stand beside bitmaps in one image.
    """
    rles = list(coco.annotations.rles)
    return "bitmask" if len(rles) and not coco.annotations.crowd[rles].all() else "polygon"


def train_mapper(coco: CocoSet, side: int, jitter: JitterConfig) -> Mapped:
    """Large-scale jitter as ViTDet configures it."""
    augmentations = [
        T.RandomFlip(prob=jitter.flip_ratio, horizontal=True),
        T.ResizeScale(jitter.min_scale, jitter.max_scale, target_height=side, target_width=side),
        T.FixedSizeCrop((side, side), pad=False),
    ]
    mapper = DatasetMapper(
        is_train=True,
        augmentations=augmentations,
        image_format="RGB",
        use_instance_mask=True,
        instance_mask_format=mask_format(coco),
        recompute_boxes=True,
    )
    return Mapped(mapper, coco.origin)


def train_loader(
    coco: CocoSet, side: int, jitter: JitterConfig, batch_size: int, loader: LoaderConfig, num_workers: int, seed: int
) -> DataLoader:
    """Jittered batches without end, each a list of records."""
    return build_detection_train_loader(
        CocoRecords(coco),
        mapper=train_mapper(coco, side, jitter),
        sampler=TrainingSampler(len(coco), seed=seed),
        total_batch_size=batch_size,
        # Published: one image per process, where grouping has no effect. Here it would choose who shares a batch.
        aspect_ratio_grouping=False,
        num_workers=num_workers,
        timeout=loader.timeout_s if num_workers else 0,
        seed=seed,
    )


def eval_loader(coco: CocoSet, side: int, num_workers: int) -> DataLoader:
    """Every image once, in order, one per batch, as published."""
    augmentations = [T.ResizeShortestEdge(side, max_size=side)]
    mapper = DatasetMapper(is_train=False, augmentations=augmentations, image_format="RGB")
    return build_detection_test_loader(CocoRecords(coco), mapper=Mapped(mapper, coco.origin), num_workers=num_workers)
