"""The demo's small world: textured shapes on textured grounds, written as ImageFolder, COCO and ADE20K trees."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from core.files import beside

KINDS = ("circle", "square", "triangle", "star", "cross", "ring", "hexagon", "crescent", "arrow", "diamond")

DRAWING = (
    2  # raise it when the same arguments would draw another world, so that an old world is not taken for a new one
)
EMPTY_EVERY = 20  # training scenes 1, 21, 41, ... hold no shape: loaders must survive images without annotations
MIN_CONTRAST = 0.45  # RGB distance (0..1 per channel) of a shape's tones to the ground's; less hides shapes
MIN_GAP_RATIO = 0.9  # centre distance over the sum of two shapes' radii; below 1 neighbours may overlap a little
LEAST = {"num_train": 10, "num_val": 10, "seed": 0, "object_size_px": 16, "scene_size_px": 32}  # smaller is refused
NOISE_STD = 0.015  # of the sensor noise, in 0..1 intensities

Field = npt.NDArray[np.floating]  # float32 throughout; numpy's stubs lose the width in arithmetic
InstanceMap = npt.NDArray[np.uint8]
Coordinates = tuple[Field, Field]  # x, y, each [H, W]


@dataclass(frozen=True)
class Split:
    """What one split is called in each layout, and what keeps its pictures apart from the other split's."""

    folder: str
    coco_folder: str
    ade20k_folder: str
    stream: int  # second word of every seed
    first_id: int  # COCO image ids; disjoint between splits, as in COCO


TRAIN = Split("train", "train2017", "training", 0, 1)
VAL = Split("val", "val2017", "validation", 1, 500_001)


@dataclass(frozen=True)
class Shape:
    """One shape in a picture; it lies within `radius_px` of its centre."""

    kind: int  # index in KINDS
    x_px: float
    y_px: float
    radius_px: float
    angle: float  # radians


def draw_world(
    root: Path, *, num_train: int, num_val: int, seed: int = 0, object_size_px: int = 64, scene_size_px: int = 128
) -> None:
    """Draw the world into `root`; return at once if `root` already holds the same one.

    Writes `imagefolder/{train,val}/<kind>/NNNN.png` (one shape each, classes balanced); a COCO tree `coco/` of scenes
    with 0 to 4 shapes, whose `instances_*.json` name the kinds and whose `shapes_*.json` call each a shape; and
    `ade20k/`, the same scenes with label PNGs: 0 = other, k = KINDS[k - 1], named in `classes.txt`, and in `shapes.txt`
    for those who only tell shapes from ground. Every picture depends on (seed, split, its number) alone, so a larger
    world begins with the smaller one.

    Args:
        root: a folder to make; absent, empty, or a world drawn with the same arguments.
        num_train: training objects, >= 10, of which each kind gets num_train // 10; max(2, num_train // 4) scenes.
        num_val: the same for validation.
        seed: >= 0.
        object_size_px: side of an object picture, >= 16.
        scene_size_px: height of a scene, >= 32; its width is 1 to 1.25 times that.
    Raises: ValueError if an argument is out of range, or if `root` holds something else.
    """
    arguments = {"num_train": num_train, "num_val": num_val, "seed": seed}
    arguments |= {"object_size_px": object_size_px, "scene_size_px": scene_size_px}
    for name, least in LEAST.items():
        if arguments[name] < least:
            raise ValueError(f"draw_world: {name} must be at least {least}, got {arguments[name]}")
    world: dict[str, object] = {"drawing": DRAWING, **arguments, "kinds": list(KINDS)}
    if _is_drawn(root, world):
        return
    partial = beside(root.absolute(), "tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for split, num_images in ((TRAIN, num_train), (VAL, num_val)):
            _write_objects(partial / "imagefolder", split, num_images // len(KINDS), seed, object_size_px)
            _write_scenes(partial, split, max(2, num_images // 4), seed, scene_size_px)
        (partial / "ade20k" / "classes.txt").write_text("".join(f"{kind}\n" for kind in KINDS))
        (partial / "ade20k" / "shapes.txt").write_text("ground #30607a\nshape #ffb000\n")
        (partial / "world.json").write_text(json.dumps(world, indent=1))
        try:
            partial.rename(root)
        except OSError:
            if not _is_drawn(root, world):  # otherwise another process was faster and drew the same
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_drawn(root: Path, world: dict[str, object]) -> bool:
    """Whether `root` holds this world; False where there is room to draw it, ValueError where there is not."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    if not (root / "world.json").is_file():
        raise ValueError(f"draw_world: {root} exists and is no world (it has no world.json); choose another folder")
    there = json.loads((root / "world.json").read_text())
    if there != world:
        raise ValueError(f"draw_world: {root} holds the world {there}, asked for {world}; choose another folder")
    return True


def _write_objects(imagefolder: Path, split: Split, num_per_kind: int, seed: int, size_px: int) -> None:
    for kind, name in enumerate(KINDS):
        folder = imagefolder / split.folder / name
        folder.mkdir(parents=True)
        for number in range(num_per_kind):
            rng = np.random.default_rng([seed, split.stream, 1 + kind, number])
            shape = _random_shape(rng, kind, rng.uniform(0.24, 0.43) * size_px, size_px, size_px)
            image, _ = _paint(rng, [shape], size_px, size_px)
            image.save(folder / f"{number:04d}.png", compress_level=1)


def _write_scenes(root: Path, split: Split, num_scenes: int, seed: int, height: int) -> None:
    """Write a split's scenes with COCO annotations, and again with ADE20K label PNGs."""
    coco_images = root / "coco" / split.coco_folder
    ade_images = root / "ade20k" / "images" / split.ade20k_folder
    ade_labels = root / "ade20k" / "annotations" / split.ade20k_folder
    for folder in (coco_images, ade_images, ade_labels):
        folder.mkdir(parents=True)
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for number in range(num_scenes):
        rng = np.random.default_rng([seed, split.stream, 0, number])
        width = round(height * rng.uniform(1.0, 1.25))
        empty = split is TRAIN and number % EMPTY_EVERY == 1
        shapes = [] if empty else _arrange(rng, number % len(KINDS), height, width)
        image, instance_map = _paint(rng, shapes, height, width)

        image_id = split.first_id + number
        stem = f"{image_id:012d}"
        image.save(coco_images / f"{stem}.jpg", quality=95)
        shutil.copyfile(coco_images / f"{stem}.jpg", ade_images / f"{stem}.jpg")
        labels = np.array([0, *(1 + shape.kind for shape in shapes)], np.uint8)[instance_map]
        Image.fromarray(labels).save(ade_labels / f"{stem}.png")
        images.append({"id": image_id, "file_name": f"{stem}.jpg", "width": width, "height": height})
        for instance, shape in enumerate(shapes, start=1):
            ids = {"id": split.first_id + len(annotations), "image_id": image_id, "category_id": 1 + shape.kind}
            annotations.append(ids | _coco_mask(instance_map == instance))
    folder = root / "coco" / "annotations"
    _write_coco_json(folder / f"instances_{split.coco_folder}.json", images, annotations, KINDS)
    alike = [annotation | {"category_id": 1} for annotation in annotations]
    _write_coco_json(folder / f"shapes_{split.coco_folder}.json", images, alike, ("shape",))


def _write_coco_json(
    path: Path, images: list[dict[str, object]], annotations: list[dict[str, object]], names: Sequence[str]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    info = {"description": "drawn by tools/world.py"}
    path.write_text(json.dumps({"info": info, "images": images, "annotations": annotations, "categories": categories}))


def _coco_mask(mask: npt.NDArray[np.bool_]) -> dict[str, object]:
    """Box xywh, area and uncompressed RLE of a [H, W] mask with at least one pixel, as COCO writes them."""
    ys, xs = np.nonzero(mask)
    left, top = int(xs.min()), int(ys.min())
    flat = mask.ravel(order="F")  # [W*H]; COCO counts down the columns
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(changes, prepend=0, append=flat.size).tolist()
    return {
        "bbox": [left, top, int(xs.max()) + 1 - left, int(ys.max()) + 1 - top],
        "area": int(xs.size),
        "iscrowd": 0,
        "segmentation": {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts},
    }


def _arrange(rng: np.random.Generator, first_kind: int, height: int, width: int) -> list[Shape]:
    """One to four shapes that overlap slightly at most; the first is of `first_kind`, so that every kind occurs."""
    num_shapes = rng.integers(1, 5)
    shapes: list[Shape] = []
    for _ in range(40):  # a full scene may have no room for the last shape
        kind = int(rng.integers(len(KINDS))) if shapes else first_kind
        new = _random_shape(rng, kind, rng.uniform(0.13, 0.27) * height, height, width)
        if all(
            math.hypot(new.x_px - old.x_px, new.y_px - old.y_px) > MIN_GAP_RATIO * (new.radius_px + old.radius_px)
            for old in shapes
        ):
            shapes.append(new)
        if len(shapes) == num_shapes:
            break
    return shapes


def _random_shape(rng: np.random.Generator, kind: int, radius_px: float, height: int, width: int) -> Shape:
    """A shape anywhere in the picture where none of it is cut off."""
    margin = radius_px + 1.0
    x_px, y_px = rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)
    return Shape(kind, x_px, y_px, radius_px, rng.uniform(0.0, 2.0 * math.pi))


def _paint(rng: np.random.Generator, shapes: list[Shape], height: int, width: int) -> tuple[Image.Image, InstanceMap]:
    """Paint shapes in order, later over earlier.

    Returns: the RGB picture, and its [H, W] instance map: 0 = ground, i = shapes[i - 1] is what one sees there.
    """
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) + np.float32(0.5)  # pixel centres
    ground = rng.uniform(0.1, 0.9, 3)
    ground_tones = np.clip(np.stack([ground, ground + rng.uniform(-0.18, 0.18, 3)]), 0.0, 1.0)  # [2, 3]
    canvas = _texture(rng, (x, y), height * rng.uniform(0.08, 0.3), ground_tones)  # [3, H, W]
    instance_map = np.zeros((height, width), np.uint8)
    for instance, shape in enumerate(shapes, start=1):
        distance = _signed_distance_px(shape, x, y)
        # A soft dark halo, as where a thing lies on a ground, keeps outlines readable on a busy texture.
        canvas *= 1.0 - 0.3 * np.exp(-np.maximum(distance, 0.0) / (0.12 * shape.radius_px))
        skin = _texture(rng, (x, y), shape.radius_px * rng.uniform(0.3, 0.7), _contrasting_tones(rng, ground_tones))
        cover = np.clip(0.5 - distance, 0.0, 1.0)  # a one-pixel ramp: anti-aliasing
        canvas += cover * (skin - canvas)
        instance_map[distance < 0.0] = instance
    slope_x, slope_y = rng.uniform(-0.25, 0.25, 2).tolist()  # light falls off across the picture
    canvas *= 1.0 + slope_x * (x / width - 0.5) + slope_y * (y / height - 0.5)
    canvas += NOISE_STD * rng.standard_normal(canvas.shape, dtype=np.float32)
    pixels = np.rint(255.0 * np.clip(canvas, 0.0, 1.0)).astype(np.uint8).transpose(1, 2, 0)  # [H, W, 3]
    return Image.fromarray(np.ascontiguousarray(pixels)), instance_map


def _contrasting_tones(rng: np.random.Generator, ground_tones: Field) -> Field:
    """Two RGB colours in 0..1, [2, 3], each at least MIN_CONTRAST from both of the ground's."""
    while True:  # one draw in eight passes at the worst ground, mid-grey
        tones = rng.uniform(0.05, 0.95, (2, 3))
        gaps = np.linalg.norm(tones[:, None] - ground_tones[None], axis=-1)  # [2, 2]
        if gaps.min() >= MIN_CONTRAST:
            return tones


def _texture(rng: np.random.Generator, at: Coordinates, period_px: float, tones: Field) -> Field:
    """A random one of TEXTURES at a random angle, blended from two tones. Returns: [3, H, W] in 0..1."""
    period_px = max(period_px, 4.0)  # finer patterns alias
    u, v = _turn(at, rng.uniform(0.0, 2.0 * math.pi), period_px)
    pattern = TEXTURES[int(rng.integers(len(TEXTURES)))]
    blend = pattern(rng, u + rng.uniform(), v + rng.uniform())  # [H, W]
    low, high = tones.astype(np.float32)[..., None, None]  # each [3, 1, 1]
    return low + blend * (high - low)


def _turn(at: Coordinates, angle: float, unit_px: float) -> Coordinates:
    """Coordinates in a frame turned by `angle` (radians), in units of `unit_px`."""
    x, y = at
    cos, sin = math.cos(angle) / unit_px, math.sin(angle) / unit_px
    return cos * x + sin * y, cos * y - sin * x


def _stripes(rng: np.random.Generator, u: Field, v: Field) -> Field:
    return 0.5 + 0.5 * np.clip(3.0 * np.sin(2.0 * math.pi * u), -1.0, 1.0)


def _checks(rng: np.random.Generator, u: Field, v: Field) -> Field:
    return 0.5 + 0.5 * np.clip(6.0 * np.sin(math.pi * u) * np.sin(math.pi * v), -1.0, 1.0)


def _dots(rng: np.random.Generator, u: Field, v: Field) -> Field:
    return np.clip(6.0 * (0.34 - np.hypot(u - np.rint(u), v - np.rint(v))) + 0.5, 0.0, 1.0)


def _gradient(rng: np.random.Generator, u: Field, v: Field) -> Field:
    return 0.5 + 0.5 * np.sin(u)


def _value_noise(rng: np.random.Generator, u: Field, v: Field) -> Field:
    """Random values on a 32 x 32 lattice that wraps, smoothly interpolated."""
    lattice = rng.random((32, 32), dtype=np.float32)
    left, top = np.floor(u), np.floor(v)
    s, t = u - left, v - top
    s, t = s * s * (3.0 - 2.0 * s), t * t * (3.0 - 2.0 * t)
    i, j = left.astype(np.intp) % 32, top.astype(np.intp) % 32
    i1, j1 = (i + 1) % 32, (j + 1) % 32
    upper = lattice[j, i] + s * (lattice[j, i1] - lattice[j, i])
    lower = lattice[j1, i] + s * (lattice[j1, i1] - lattice[j1, i])
    return upper + t * (lower - upper)


Pattern = Callable[[np.random.Generator, Field, Field], Field]
TEXTURES: tuple[Pattern, ...] = (_stripes, _checks, _dots, _gradient, _value_noise)


def _signed_distance_px(shape: Shape, x: Field, y: Field) -> Field:
    """Distance of each point to the shape's outline in pixels, [H, W], negative inside."""
    u, v = _turn((x - shape.x_px, y - shape.y_px), shape.angle, shape.radius_px)  # the shape lies in the unit circle
    name = KINDS[shape.kind]
    if name == "circle":
        distance: Field = np.hypot(u, v) - 0.9
    elif name == "ring":
        distance = np.abs(np.hypot(u, v) - 0.72) - 0.2
    elif name == "crescent":
        distance = _crescent_distance(u, v)
    else:
        distance = _polygon_distance(u, v, CORNERS[name])
    return shape.radius_px * distance


def _crescent_distance(u: Field, v: Field) -> Field:
    """Signed distance to the unit disc without a disc of radius 0.8 around (0.5, 0), negative inside."""
    tip_u, tip_v = 0.61, math.sqrt(1.0 - 0.61**2)  # where the two circles meet
    v = np.abs(v)
    # Past the tip the nearest point is the tip itself: the two circles alone would cast a halo round the whole disc.
    past_tip = u * tip_v - v * tip_u > 0.5 * np.maximum(tip_v - v, 0.0)
    arcs = np.maximum(np.hypot(u, v) - 1.0, 0.8 - np.hypot(u - 0.5, v))
    return np.where(past_tip, np.hypot(u - tip_u, v - tip_v), arcs)


def _polygon_distance(u: Field, v: Field, corners: list[tuple[float, float]]) -> Field:
    """Signed distance to a polygon, negative inside: the nearest edge, and the parity of edges to the right."""
    nearest_squared = np.full_like(u, np.inf)
    inside = np.zeros(u.shape, bool)
    for (au, av), (bu, bv) in zip(corners, [*corners[1:], corners[0]], strict=True):
        eu, ev, pu, pv = bu - au, bv - av, u - au, v - av
        along = np.clip((pu * eu + pv * ev) / (eu * eu + ev * ev), 0.0, 1.0)
        nearest_squared = np.minimum(nearest_squared, (pu - along * eu) ** 2 + (pv - along * ev) ** 2)
        inside ^= ((av > v) != (bv > v)) & ((pu * ev < eu * pv) == (ev > 0.0))
    return np.where(inside, -1.0, 1.0).astype(np.float32) * np.sqrt(nearest_squared)


def _regular(*radii: float, num_corners: int) -> list[tuple[float, float]]:
    """Corners at equal angles, their radii taken in turn."""
    turns = [2.0 * math.pi * i / num_corners for i in range(num_corners)]
    return [(radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(turns)]


_CROSS = [(0.94, 0.3), (0.3, 0.3), (0.3, 0.94), (-0.3, 0.94), (-0.3, 0.3), (-0.94, 0.3)]
CORNERS = {  # each within the unit circle
    "square": _regular(1.0, num_corners=4),
    "triangle": _regular(1.0, num_corners=3),
    "star": _regular(1.0, 0.42, num_corners=10),
    "cross": [*_CROSS, *((-u, -v) for u, v in _CROSS)],
    "hexagon": _regular(1.0, num_corners=6),
    "arrow": [(1.0, 0.0), (0.1, 0.85), (0.1, 0.27), (-0.95, 0.27), (-0.95, -0.27), (0.1, -0.27), (0.1, -0.85)],
    "diamond": [(1.0, 0.0), (0.0, 0.5), (-1.0, 0.0), (0.0, -0.5)],  # narrow, or a turned square would be one
}
