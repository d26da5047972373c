"""What a robustness sweep is given: the model, the benchmarks, where their images lie, and how they are corrupted."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from core.config import Config
from core.errors import shown
from core.features import Feature
from core.loader import LoaderConfig
from robustness.corruptions.apply import BENCHMARK, NAMES, SEVERITIES
from robustness.corruptions.case import Definition

Benchmark = Literal[
    "imagenet_c", "imagenet_c_otf", "imagenet_a", "imagenet_r", "imagenet_sketch", "imagenet_v2", "real", "corruptions",
    "representation",
]  # fmt: skip
Severity = Annotated[int, Field(ge=1, le=5)]

Kind = Literal["classifier", "detector", "segmentor"]  # of what is tested; a backbone is tested as a classifier is

NEED_DATA = {"imagenet_c_otf", "real", "corruptions", "representation"}
OWN_CORRUPTIONS = {"corruptions", "representation"}  # those whose definition and order are settings
TRANSFORMED = {"imagenet_a", "imagenet_r", "imagenet_sketch", "imagenet_v2", "real", "imagenet_c", "imagenet_c_otf"}

# May differ when a sweep goes on. A cell is named by all that its figures depend on, so that no key can mix figures;
# the others stay as they were so that one directory holds one protocol.
HARMLESS_KEYS = (
    "data", "labels", "val_json", "val_images", "val_labels", "reference", "out", "cache", "paths", "benchmarks",
    "corruptions", "severities", "batch_size", "keep_gib", "device", "loader",
)  # fmt: skip
# Keys that mean something for some kinds of models alone.
KINDS_OF: dict[str, tuple[Kind, ...]] = {
    **dict.fromkeys(
        ("labels", "paths", "transform", "feature", "jpeg_step", "batch_size", "keep_gib"), ("classifier",)
    ),
    "val_json": ("detector",),
    "val_images": ("detector", "segmentor"),
    "val_labels": ("segmentor",),
    "reference": ("segmentor",),
}


class Paths(Config):
    """Where the sets beside `data` lie: a folder each, or a tar of one (but for ImageNet-C)."""

    imagenet_c: Path | None = None  # holds noise/, blur/, weather/, digital/ or the corruptions themselves
    imagenet_a: str | None = None
    imagenet_r: str | None = None
    imagenet_sketch: str | None = None
    imagenet_v2: str | None = None  # one of the three test beds; matched-frequency is the usual one

    def natural(self) -> dict[str, str | None]:
        """Those of natural images, by the name of the set."""
        return {
            "imagenet_a": self.imagenet_a,
            "imagenet_r": self.imagenet_r,
            "imagenet_sketch": self.imagenet_sketch,
            "imagenet_v2": self.imagenet_v2,
        }


class RobustConfig(Config):
    """Everything that `rcmae robust` reads."""

    model: Path | None = None  # classifier, detector or segmentor directory, of `rcmae classify`, detect or segment
    backbone: Path | None = None  # or a backbone directory or file, for benchmarks=[representation] alone
    branch: Literal["teacher", "student"] = "teacher"  # of an RC-MAE pretraining file
    num_heads: PositiveInt | None = None  # for backbone files of sizes that are not published ones
    data: str | None = None  # ImageNet's val/; for corruptions and representation any set; of a detector or segmentor
    # the root of its set, in COCO's or ADE20K's layout
    val_json: Path | None = None  # of a detector: the JSON, where it does not lie as COCO's
    val_images: Path | None = None  # of a detector or segmentor: the folder of images
    val_labels: Path | None = None  # of a segmentor: the folder of label PNGs
    reference: Path | None = None  # of a segmentor: results.json of the sweep of another one, for CD and rCD
    labels: Path | None = None  # for a flat val/: a line per image, `NAME WNID`
    out: Path
    cache: Path = Path("~/.cache/rcmae")
    benchmarks: tuple[Benchmark, ...] = ("corruptions",)
    paths: Paths = Paths()
    corruptions: Literal["benchmark", "all"] | tuple[str, ...] = "benchmark"  # the 15, all 19, or by name
    severities: tuple[Severity, ...] = SEVERITIES
    definition: Definition = "imagecorruptions"  # of corruptions and representation; imagenet_c_otf has imagenet_c
    corrupt: Literal["auto", "decoded", "input"] = "auto"  # of those: the decoded image, or the transformed one; auto:
    # input with definition=imagenet_c, decoded with imagecorruptions
    jpeg_step: bool = False  # of those: JPEG at quality 85 after the corruption; imagenet_c_otf always has it
    draws: Literal["cpu", "device"] = "cpu"  # cpu: the same everywhere; device: faster on a GPU, other draws
    frost_textures: Path | None = None  # folder of frost1.png ...; None: the files of the imagecorruptions package
    transform: Literal["model", "official"] = "model"  # of -A, -R, -Sketch, -V2 and val: the model's own (bicubic), or
    # the bilinear one of the sets' own code
    feature: Feature = "mean"  # of a backbone; of a classifier it is what its head sees
    num_images: PositiveInt | None = None  # of each set, evenly spread; fewer than it holds is flagged as a subset
    sample: PositiveInt | None = None  # for development: so many images of each set, drawn by the seed, and flagged
    seed: int = Field(0, ge=0, lt=2**32)
    batch_size: PositiveInt = 128  # images per forward pass of each process; of a classifier, others take one
    keep_gib: NonNegativeFloat = 2.0  # the decoded images of a set stay in memory where they take no more
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: fp32 on a CPU and, as published, for detectors and
    # segmentors; bf16 autocast for classifiers on a GPU
    loader: LoaderConfig = LoaderConfig()

    def contradictions(self) -> Iterator[str]:
        """Keys that cannot hold together."""
        if (self.model is None) == (self.backbone is None):
            yield "model and backbone: give one of them, a classifier directory or a backbone"
        if self.backbone is not None and set(self.benchmarks) != {"representation"}:
            yield "backbone: answers nothing; it needs benchmarks=[representation], the others need model="
        if not self.benchmarks:
            yield "benchmarks: give one or more of them"
        if self.sample is not None and self.num_images is not None:
            yield "sample and num_images: give one of them, images drawn by the seed or evenly spread ones"
        yield from self._missing_paths()
        yield from self._unknown_corruptions()
        yield from self._without_effect()

    def _missing_paths(self) -> Iterator[str]:
        for name in self.benchmarks:
            if name in NEED_DATA and self.data is None and self.val_images is None:
                yield f"{name}: needs data=, the images that it is about"
            if {"imagenet_c": self.paths.imagenet_c, **self.paths.natural()}.get(name, "") is None:
                yield f"{name}: needs paths.{name}=, its folder"

    def _unknown_corruptions(self) -> Iterator[str]:
        for name in self.corruptions if isinstance(self.corruptions, tuple) else ():
            if name not in NAMES:
                close = difflib.get_close_matches(name, NAMES, n=1)
                hint = f"did you mean {close[0]}?" if close else "the 19 are listed in docs/data.md"
                yield f"corruptions: {shown(name)} is none; {hint}"
        for key in ("benchmarks", "corruptions", "severities"):
            values = getattr(self, key)
            if not isinstance(values, str) and len(set(values)) < len(values):
                yield f"{key}: one is given twice"

    def _without_effect(self) -> Iterator[str]:
        changed = self.changed()
        if not OWN_CORRUPTIONS & set(self.benchmarks):
            for key in sorted(changed & {"definition", "corrupt", "jpeg_step"}):
                yield f"{key}: has no effect but on benchmarks corruptions and representation"
        if self.backbone is None:
            for key in sorted(changed & {"branch", "num_heads", "feature"}):
                yield f"{key}: has no effect on a classifier; its feature is what its head sees"
        if "transform" in changed and not TRANSFORMED & set(self.benchmarks):
            yield "transform: has no effect but on ImageNet's sets"
        for key in ("max_broken_share", "stream_images"):
            if getattr(self.loader, key) != LoaderConfig.model_fields[key].default:
                yield f"loader.{key}: has no effect; an evaluation counts every image of its files"

    def foreign_to(self, kind: Kind) -> Iterator[str]:
        """A line for each key that has no effect on a model of a kind, or another one than its benchmark allows."""
        for key in sorted(self.changed() & KINDS_OF.keys()):
            if kind not in KINDS_OF[key]:
                yield f"{key}: has no effect on a {kind}; it is about {' and '.join(KINDS_OF[key])}s"
        if kind != "classifier":
            if self.benchmarks != ("corruptions",):
                yield f"benchmarks: a {kind} has one, corruptions; leave the key out"
            if self.definition != "imagecorruptions" or self.corrupt == "input":
                yield f"definition, corrupt: those of a {kind} are imagecorruptions and decoded; leave both out"

    def corruption_names(self) -> tuple[str, ...]:
        """The corruptions of the grid, in the order of the tables."""
        if isinstance(self.corruptions, tuple):
            return tuple(name for name in NAMES if name in self.corruptions)
        return BENCHMARK if self.corruptions == "benchmark" else NAMES

    def corrupts_input(self) -> bool:
        """Whether `corruptions` and `representation` corrupt the transformed image rather than the decoded one."""
        return self.corrupt == "input" or (self.corrupt == "auto" and self.definition == "imagenet_c")
