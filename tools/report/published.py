"""Published rows, and whether a run's protocol is the one that they were measured under.

Every row was read in the source that it names; what could not be read there is not in here. A row is shown where data
set, images, size, head and schedule are those of its source, and nowhere else; the reasons why not are told.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from robustness.published import COLUMNS, PUBLISHED, PUBLISHED_COCO, unlike_published, unlike_published_coco
from tools.report.blocks import DASH, Block, Cell, Notes, Row, Table
from tools.report.comparison import class_names
from tools.report.formats import number, percent, several, shown_by
from tools.report.runs import Run
from tools.report.sweep_results import SweptSet
from transfer.detection.coco_names import COCO_NAMES
from transfer.segmentation.classes import open_classes
from transfer.segmentation.labels import LabelKeys

GITHUB = "https://github.com/"
SOURCES = {  # the only addresses that a report links to, by the beginning of a source's name
    "MAE README": GITHUB + "facebookresearch/mae",
    "facebookresearch/mae": GITHUB + "facebookresearch/mae",
    "RC-MAE README": GITHUB + "youngwanLEE/rc-mae",
    "arXiv 2210.02077": "https://arxiv.org/abs/2210.02077",
    "detectron2": GITHUB + "facebookresearch/detectron2",
    "mmsegmentation": GITHUB + "open-mmlab/mmsegmentation",
    "mmdetection": GITHUB + "open-mmlab/mmdetection",
    "hendrycks/robustness": GITHUB + "hendrycks/robustness",
    "timm": GITHUB + "huggingface/pytorch-image-models",
}
SIZES = {(384, 12): "S", (768, 12): "B", (1024, 24): "L", (1280, 32): "H"}  # width and depth of the published ViTs
MULTI_SCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@dataclass(frozen=True)
class Published:
    """A row: whose, the size of its ViT, the epochs of its schedule, figures with the digits of the source."""

    model: str
    size: str
    epochs: tuple[int, ...]
    figures: tuple[str, ...]
    source: str


_MAE, _RC, _PAPER = "MAE README, FINETUNE.md", "RC-MAE README", "arXiv 2210.02077v1, table of mask types"
_VITDET = "detectron2 projects/ViTDet/README.md"
_TOP1 = {row.model: (str(row.val_top1),) for row in PUBLISHED}  # of the models that robustness is published of
FINETUNED = (
    Published("MAE ViT-B, released model", "B", (100,), _TOP1["MAE ViT-B"], _MAE),
    Published("MAE ViT-B, four seeds", "B", (100,), ("83.57 ± 0.08",), _MAE),
    Published("MAE ViT-L, released model", "L", (50,), _TOP1["MAE ViT-L"], _MAE),
    Published("MAE ViT-L, four seeds", "L", (50,), ("85.87 ± 0.07",), _MAE),
    Published("MAE ViT-H, released model", "H", (50,), _TOP1["MAE ViT-H"], _MAE),
    Published("MAE ViT-S, run again by RC-MAE's authors", "S", (200, 300), ("81.8",), _RC),
    Published("MAE ViT-B, run again by RC-MAE's authors", "B", (100,), ("83.4",), _RC),
    Published("MAE ViT-L, run again by RC-MAE's authors", "L", (50,), ("85.5",), _RC),
    Published("RC-MAE ViT-S", "S", (200, 300), _TOP1["RC-MAE ViT-S"], _RC),
    Published("RC-MAE ViT-B", "B", (100,), _TOP1["RC-MAE ViT-B"], _RC),
    Published("RC-MAE ViT-L", "L", (50,), _TOP1["RC-MAE ViT-L"], _RC),
)
PROBED = (
    Published("MAE ViT-B", "B", (90,), ("67.8",), _MAE),
    Published("MAE ViT-L", "L", (50,), ("76.0",), _MAE),
    Published("MAE ViT-H", "H", (50,), ("77.2",), _MAE),
    Published("MAE ViT-B, run again by RC-MAE's authors", "B", (90,), ("67.3",), _PAPER),
    Published("RC-MAE ViT-B, same mask", "B", (90,), ("68.4",), _PAPER),
    Published("RC-MAE ViT-B, different masks", "B", (90,), ("68.7",), _PAPER),
)
DETECTED = {
    False: (
        Published("ViTDet ViT-B, MAE", "B", (100,), ("51.6", "45.9"), _VITDET),
        Published("ViTDet ViT-L, MAE", "L", (100,), ("55.5", "49.2"), _VITDET),
        Published("ViTDet ViT-H, MAE", "H", (75,), ("56.7", "50.2"), _VITDET),
    ),
    True: (
        Published("ViTDet Cascade ViT-B, MAE", "B", (100,), ("54.0", "46.7"), _VITDET),
        Published("ViTDet Cascade ViT-L, MAE", "L", (100,), ("57.6", "50.0"), _VITDET),
        Published("ViTDet Cascade ViT-H, MAE", "H", (75,), ("58.7", "51.0"), _VITDET),
    ),
}
# UperNet, 160,000 steps of 16 crops of 512 px: one scale, and six scales with mirror images.
_MMSEG = "mmsegmentation configs/mae/metafile.yaml"
SEGMENTED = {
    False: (Published("MAE ViT-B, mmsegmentation", "B", (), ("48.13",), _MMSEG),),
    True: (Published("MAE ViT-B, mmsegmentation, six scales and mirrored", "B", (), ("48.7",), _MMSEG),),
}


def beside(runs: Sequence[Run]) -> list[Block]:
    """A table of published rows for every run whose protocol they have, and for the others why there is none."""
    return told([_beside(run) for run in runs])


def told(verdicts: Sequence[Table | str]) -> list[Block]:
    """Tables, and what stands in the place of those that there are not, together."""
    reasons = [verdict for verdict in verdicts if isinstance(verdict, str)]
    tables = [verdict for verdict in verdicts if isinstance(verdict, Table)]
    return [*tables, Notes("No published rows", reasons)] if reasons else [*tables]


def _beside(run: Run) -> Table | str:
    if not run.done:
        return f"{run.name}: the run is not finished."
    why_not, rows, own, note = _PROTOCOLS[run.kind](run)
    if why_not:
        return f"{run.name}: its protocol is another one: {'; '.join(why_not)}."
    fitting = [row for row in rows if row.size == size_of(run)]
    if not fitting:
        return f"{run.name}: the protocol is that of published rows, but none is of a ViT of this size and schedule."
    figures = [Cell(shown_by(percent, value)) for value in own.values()]
    table = [Row(run.name, [*figures, Cell("this run", words=True)], strong=True)]
    table += [Row(row.model, [*map(Cell, row.figures), cited(row.source)]) for row in fitting]
    return Table(f"Published rows beside {run.name}", [*own, "source"], table, [note])


def cited(source: str) -> Cell:
    """A source, with its address where it has one."""
    return Cell(source, words=True, href=next((url for name, url in SOURCES.items() if source.startswith(name)), ""))


def size_of(run: Run) -> str:
    """S, B, L or H for a ViT of a published size, else ""."""
    return SIZES.get((run.model.get("embed_dim"), run.model.get("depth")), "")  # type: ignore[arg-type]


# ---- protocols: why not, rows of the same schedule, own figures, a note ---------------------------------------------

_Found = tuple[list[str], Sequence[Published], dict[str, float | None], str]


def _classification(run: Run) -> _Found:
    protocol = run.config.get("protocol")
    if protocol not in {"finetune", "linprobe"}:
        return ["no row of MAE or RC-MAE is published for k-NN"], (), {}, ""
    why_not = list(_unlike_imagenet(run))
    epochs = number(run.given(f"{protocol}.epochs"))
    rows = [row for row in (FINETUNED if protocol == "finetune" else PROBED) if epochs in row.epochs]
    note = "ImageNet-1k, all 50,000 validation images, 224 px, crop 0.875, the same number of epochs and size of ViT."
    return why_not, rows, {"top-1, %": run.figures.get("top1_pct")}, note


def _unlike_imagenet(run: Run) -> Iterator[str]:
    names = class_names(run)
    if len(names) != 1000 or not all(re.fullmatch(r"n\d{8}", name) for name in names):
        yield _other_classes(names, "ImageNet-1k's thousand")
    yield from _other_count("evaluated on", run.eval_images, (50000,), "images")
    yield from _other_count("trained on", run.train_images, (1281167,), "images")
    size = run.exported.get("pretrained_cfg")
    size = size if isinstance(size, dict) else {}
    if size.get("input_size") != [3, 224, 224]:
        yield f"input {_size_text(size.get('input_size'))}, published 224 px"
    crop = number(size.get("crop_pct"))
    if crop is None or abs(crop - 0.875) > 1e-6:
        yield f"crop {shown_by(lambda value: f'{value:g}', crop)}, published 0.875"
    yield from _random(run)


def _detection(run: Run) -> _Found:
    why_not = list(_untrained(run))
    names = class_names(run)
    if names != COCO_NAMES:
        why_not.append(_other_classes(names, "COCO's eighty"))
    why_not += _other_count("evaluated on", run.eval_images, (5000,), "images")
    why_not += _other_count("trained on", run.train_images, (117266, 118287), "images")
    why_not += _other_count("images of", number(run.config.get("img_size")), (1024,), "px")
    why_not += _random(run)
    rows = [row for row in DETECTED[run.given("detector.cascade") is True] if _near(_epochs(run), row.epochs[0])]
    figures = {title: _pct(run, key) for title, key in (("box AP", "box_ap"), ("mask AP", "mask_ap"))}
    note = (
        "COCO val2017, 1024 px, ViTDet, the same number of epochs and size of ViT; box AP varies by about 0.10 from "
        "seed to seed. RC-MAE's own detection figures come from MIMDet's recipe, another protocol, and never stand "
        "here."
    )
    return why_not, rows, figures, note


def _segmentation(run: Run) -> _Found:
    why_not = list(_untrained(run))
    names = class_names(run)
    if names != open_classes(LabelKeys(classes="ade20k")).names:
        why_not.append(_other_classes(names, "ADE20K's 150"))
    why_not += _other_count("evaluated on", run.eval_images, (2000,), "images")
    why_not += _other_count("trained on", run.train_images, (20210,), "images")
    for key, published in {"img_size": 512, "batch_size": 16, "steps": 160000, "head": "upernet"}.items():
        if run.config.get(key) != published:
            why_not.append(f"{key} {_plain(run.config.get(key))}, published {_plain(published)}")
    scales, flip = run.config.get("scales"), run.config.get("flip")
    six = [number(scale) for scale in scales] == list(MULTI_SCALE) if isinstance(scales, list) else False
    if not (six and flip) and (scales not in ([1.0], [1]) or flip):
        why_not.append("other scales than one, or the published six with mirror images")
    why_not += _random(run)
    note = "ADE20K, all 2,000 validation images, UperNet, 160,000 steps of 16 crops of 512 px."
    return why_not, SEGMENTED[six], {"mIoU, %": run.figures.get("miou_pct")}, note


def _nothing(run: Run) -> _Found:
    return ["nothing of this kind is published"], (), {}, ""


_PROTOCOLS: dict[str, Callable[[Run], _Found]] = {
    "classify": _classification, "detect": _detection, "segment": _segmentation, "pretrain": _nothing,
    "robust": _nothing, "unknown": _nothing,
}  # fmt: skip


def _untrained(run: Run) -> Iterator[str]:
    if run.only_evaluated:
        yield "only evaluated here, so that its schedule is not known"


def _other_classes(names: Sequence[str], published: str) -> str:
    return f"{several(len(names), 'class', 'classes')}, not {published}" if names else "its classes are not known"


def _random(run: Run) -> Iterator[str]:
    if run.config.get("init") == "random":
        yield "it began from random weights, the published ones from pretrained ones"


def _other_count(what: str, found: float | None, published: tuple[int, ...], unit: str) -> Iterator[str]:
    if found not in published:
        amount = "an unknown number of" if found is None else f"{found:,.0f}"
        yield f"{what} {amount} {unit}, published {' or '.join(f'{one:,}' for one in published)}"


def _epochs(run: Run) -> float | None:
    steps, batch, images = number(run.config.get("steps")), run.batch_size, run.train_images
    return steps * batch / images if steps and batch and images else None


def _near(epochs: float | None, published: int) -> bool:
    return epochs is not None and abs(epochs - published) <= 0.02 * published


def _pct(run: Run, key: str) -> float | None:
    value = run.figures.get(key)
    return None if value is None else 100 * value


def _plain(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)[:40]


def _size_text(stored: object) -> str:
    if isinstance(stored, list) and len(stored) == 3 and all(number(side) is not None for side in stored):
        return f"{stored[1]} x {stored[2]} px"
    return "of unknown size"


# ---- robustness -----------------------------------------------------------------------------------------------------


def beside_sweep(name: str, sets: Mapping[str, SweptSet]) -> Table | str:
    """Published robustness of ImageNet classifiers beside a sweep: only columns of whole sets as published."""
    own: dict[str, float | None] = {}
    why_not = []
    for column, (set_name, key, title) in COLUMNS.items():
        found = sets.get(set_name)
        if found is None or key not in found.figures:
            continue
        reasons = list(unlike_published(set_name, found.flags))
        if reasons:
            why_not.append(f"{title}: {'; '.join(reasons)}")
        else:
            own[column] = found.figures[key]
    if not own:
        nothing = "it holds none of the sets on which figures of MAE or RC-MAE are published"
        return f"{name}: {'. '.join(why_not) or nothing}."
    rows = [row for row in PUBLISHED if any(getattr(row, column) is not None for column in own)]
    figures = [Cell(shown_by(percent, value)) for value in own.values()]
    table = [Row(name, [*figures, Cell("this sweep", words=True)], strong=True)]
    for row in rows:
        quoted = [getattr(row, column) for column in own]
        table.append(Row(row.model, [*(Cell(DASH if one is None else str(one)) for one in quoted), cited(row.source)]))
    note = "Whole sets at 224 px, each model under its own evaluation transform, mCE on the released files."
    titles = [*(f"{COLUMNS[column][2]}, %" for column in own), "source"]
    return Table(f"Published rows beside {name}", titles, table, [note, *why_not])


def beside_corrupted_coco(name: str, swept: SweptSet, detector: Run | None) -> Table | str:
    """mPC and rPC of published detectors beside a sweep over corrupted COCO, or why there are none.

    Args:
        detector: the run that made the model; a sweep does not tell its classes.
    """
    why_not = []
    if not swept.whole_benchmark:
        why_not.append("not all of the 15 corruptions at five severities")
    why_not += unlike_published_coco(swept.flags)
    if detector is None:
        why_not.append("that the detector is one of COCO's eighty classes is not known: its run is not in this report")
    elif (names := class_names(detector)) != COCO_NAMES:
        why_not.append("its detector: " + _other_classes(names, "COCO's eighty"))
    if why_not:
        return f"{name}: its protocol is another one: {'; '.join(why_not)}."
    own = (swept.clean, swept.mean, swept.kept)
    table = [Row(name, [*(Cell(shown_by(percent, one)) for one in own), Cell("this sweep", words=True)], strong=True)]
    source = PUBLISHED_COCO[0].source
    for row in PUBLISHED_COCO:
        quoted = row.box if swept.unit == "box_ap" else row.mask
        table.append(Row(row.model, [*(Cell(str(one)) for one in quoted), cited(source)]))
    note = "COCO val2017, 15 corruptions at five severities by imagecorruptions on the decoded image; other backbones."
    return Table(f"Published rows beside {name}", ["clean AP, %", "mPC, %", "rPC, %", "source"], table, [note])
