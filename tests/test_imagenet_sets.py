"""ImageNet's robustness sets in fabricated trees: labels by name, never by order; and one line for what is wrong."""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from core.datasets import open_images
from core.errors import ConfigError, DataError
from robustness.imagenet_sets import (
    OfficialTransform,
    ReleasedTransform,
    at_size,
    columns_of,
    evenly,
    image_number,
    imagenet_synsets,
    open_imagenet_set,
    open_labelled,
    open_released,
    real_labels,
    real_targets,
    released_folders,
    subset_synsets,
)

CLASSES = imagenet_synsets()
CACHE = Path("unused")

# Of the newline-joined wnids; spec robustness sections 3 and 4.
DIGESTS = {
    "imagenet": "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd",
    "imagenet_a": "f6aa4b23244554d9b864fd715ae20048f6a9686388911b2dfbf1ada01bf0f520",
    "imagenet_r": "e19a59d84e3746fafd34d2ccf6ae604a44e9a0500a596f343c878a89e30ce624",
}


def make_tree(root: Path, names: Sequence[str], image: Callable[[int], str] = lambda i: f"{i}.JPEG") -> Path:
    """One file, not an image, per class folder: opening a set reads names alone."""
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        (root / name / image(i)).touch()
    return root


def val_name(i: int) -> str:
    return f"ILSVRC2012_val_{i + 1:08d}.JPEG"


def labels_by_folder(source: object) -> dict[str, int]:
    return {source.name(i).split("/")[-2]: int(source.labels[i]) for i in range(len(source))}


def fault(call: Callable[[], object], kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("sets") / "val", CLASSES, val_name)


# --- class lists ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIGESTS)
def test_class_lists_are_the_published_ones(name: str) -> None:
    wnids = CLASSES if name == "imagenet" else subset_synsets(name)
    assert len(wnids) == (1000 if name == "imagenet" else 200) and list(wnids) == sorted(wnids)
    assert hashlib.sha256("\n".join(wnids).encode()).hexdigest() == DIGESTS[name]


def test_columns_of_the_subsets() -> None:
    a, r = (columns_of(subset_synsets(name), CLASSES) for name in ("imagenet_a", "imagenet_r"))
    assert a[:6].tolist() == [6, 11, 13, 15, 17, 22] and a[-3:].tolist() == [986, 987, 988]
    assert r[:6].tolist() == [1, 2, 4, 6, 8, 9] and r[-3:].tolist() == [981, 983, 988]
    assert len(set(a) & set(r)) == 86
    reversed_classes = CLASSES[::-1]
    assert columns_of(subset_synsets("imagenet_a"), reversed_classes).tolist() == (999 - a).tolist()


def test_real_labels() -> None:
    labels = real_labels()
    assert len(labels) == 50000 and labels[0] == [] and labels[1] == [970, 795]
    assert sum(not row for row in labels) == 3163
    assert all(0 <= label < 1000 for row in labels for label in row)


# --- sets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_subsets_get_the_columns_of_their_wnids(tmp_path: Path, name: str) -> None:
    tree = make_tree(tmp_path / "set", subset_synsets(name))
    assert labels_by_folder(open_imagenet_set(name, str(tree), CLASSES, CACHE)) == {
        wnid: CLASSES.index(wnid) for wnid in subset_synsets(name)
    }


@pytest.mark.parametrize("pad", ["{}", "{:03d}"])
def test_v2_folders_are_numbers_and_not_sorted_as_text(tmp_path: Path, pad: str) -> None:
    tree = make_tree(tmp_path / "v2", [pad.format(i) for i in range(1000)])
    source = open_imagenet_set("imagenet_v2", str(tree), CLASSES, CACHE)
    assert all(int(folder) == label for folder, label in labels_by_folder(source).items())
    as_text = open_images(str(tree), CACHE)  # what an ImageFolder makes of them
    if pad == "{}":
        assert labels_by_folder(as_text)["10"] == 2


def test_v2_repacked_by_wnid(val: Path) -> None:
    source = open_imagenet_set("imagenet_v2", str(val), CLASSES, CACHE)
    assert labels_by_folder(source) == {wnid: i for i, wnid in enumerate(CLASSES)}


def test_labels_follow_the_order_of_the_classifier(val: Path) -> None:
    shuffled = tuple(np.random.default_rng(0).permutation(CLASSES).tolist())
    found = labels_by_folder(open_imagenet_set("imagenet_val", str(val), shuffled, CACHE))
    assert found == {wnid: i for i, wnid in enumerate(shuffled)}


def test_val_is_found_beside_train(tmp_path: Path, val: Path) -> None:
    (tmp_path / "val").symlink_to(val)
    make_tree(tmp_path / "train", CLASSES[:3])
    assert len(open_imagenet_set("imagenet_val", str(tmp_path), CLASSES, CACHE)) == 1000


def test_a_flat_val_with_a_label_file(tmp_path: Path) -> None:
    order = np.random.default_rng(1).permutation(1000)
    (tmp_path / "val").mkdir()
    for i in range(1000):
        (tmp_path / "val" / val_name(i)).touch()
    for name, label in (("wnids", lambda k: CLASSES[k]), ("numbers", str)):
        labels = tmp_path / name
        labels.write_text("".join(f"{val_name(i)} {label(k)}\n" for i, k in enumerate(order)))
        source = open_imagenet_set("imagenet_val", str(tmp_path / "val"), CLASSES, CACHE, labels)
        assert source.labels.tolist() == order.tolist()
        shuffled = CLASSES[::-1]
        source = open_imagenet_set("imagenet_val", str(tmp_path / "val"), shuffled, CACHE, labels)
        assert source.labels.tolist() == (999 - order).tolist()
    (tmp_path / "bare").write_text("".join(f"{k}\n" for k in order))
    text = fault(lambda: open_imagenet_set("imagenet_val", str(tmp_path / "val"), CLASSES, CACHE, tmp_path / "bare"))
    assert "a number alone" in text


def test_any_labelled_set_is_matched_by_name(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "mine", ["cat", "dog", "zebra"])
    found = labels_by_folder(open_labelled(str(tree), ("zebra", "yak", "dog", "cat"), CACHE))
    assert found == {"cat": 3, "dog": 2, "zebra": 0}


# --- what is wrong --------------------------------------------------------------------------------------------------


def rename(tree: Path, old: str, new: str) -> None:
    (tree / old).rename(tree / new)


def broken(name: str, tmp_path: Path, change: Callable[[Path], object], classes: Sequence[str] | None = None) -> str:
    wnids = subset_synsets(name) if name in {"imagenet_a", "imagenet_r"} else CLASSES
    tree = make_tree(tmp_path / "set", wnids)
    change(tree)
    return fault(lambda: open_imagenet_set(name, str(tree), classes or CLASSES, CACHE)).replace(str(tree), "SET")


def test_a_missing_class(tmp_path: Path) -> None:
    text = broken("imagenet_a", tmp_path, lambda tree: shutil.rmtree(tree / "n01498041"))
    assert text == "SET: 199 of the 200 classes of imagenet_a have images; missing: n01498041"


def test_999_classes(tmp_path: Path) -> None:
    text = broken("imagenet_sketch", tmp_path, lambda tree: shutil.rmtree(tree / CLASSES[500]))
    assert text == f"SET: 999 of the 1000 classes of imagenet_sketch have images; missing: {CLASSES[500]}"


def test_an_empty_class(tmp_path: Path) -> None:
    text = broken("imagenet_r", tmp_path, lambda tree: next((tree / "n01443537").iterdir()).unlink())
    assert "199 of the 200 classes of imagenet_r have images; missing: n01443537" in text


def test_a_misspelt_wnid(tmp_path: Path) -> None:
    text = broken("imagenet_a", tmp_path, lambda tree: rename(tree, "n01498041", "n0149804"))
    assert "n0149804" in text and text.endswith("did you mean n01498041?")


def test_a_class_of_imagenet_that_is_not_in_the_subset(tmp_path: Path) -> None:
    text = broken("imagenet_a", tmp_path, lambda tree: rename(tree, "n01498041", CLASSES[0]))
    assert CLASSES[0] in text and "imagenet_a" in text


def test_folders_that_are_no_classes(tmp_path: Path) -> None:
    text = broken("imagenet_r", tmp_path, lambda tree: make_tree(tree, ["__MACOSX"]))
    assert "__MACOSX" in text and "imagenet_r" in text


def test_v2_given_as_another_set(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "v2", [str(i) for i in range(1000)])
    text = fault(lambda: open_imagenet_set("imagenet_sketch", str(tree), CLASSES, CACHE))
    assert "class folders are numbers, as those of ImageNet-V2" in text and "paths.imagenet_v2" in text


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([str(i) for i in range(1, 1001)], "class folder 1000; those of ImageNet-V2 are called 0 to 999"),
        ([str(i) for i in range(999)], "999 of the 1000 classes of imagenet_v2 have images; missing: n15075141"),
        ([*map(str, range(1000)), "01"], "two class folders stand for the same number"),
        ([*map(str, range(999)), "n15075141"], "class folder n15075141; those of ImageNet-V2 are called 0 to 999"),
    ],
)
def test_other_v2_folders(tmp_path: Path, names: list[str], reason: str) -> None:
    tree = make_tree(tmp_path / "v2", names)
    assert reason in fault(lambda: open_imagenet_set("imagenet_v2", str(tree), CLASSES, CACHE))


def test_a_flat_val_is_answered_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    for i in range(3):
        (tmp_path / "val" / val_name(i)).touch()
    text = fault(lambda: open_imagenet_set("imagenet_val", str(tmp_path / "val"), CLASSES, CACHE))
    assert "a flat val/" in text and "give labels=val.txt" in text and "ILSVRC2012_val_00000001.JPEG WNID" in text


def test_images_beside_the_class_folders(tmp_path: Path) -> None:
    text = broken("imagenet_a", tmp_path, lambda tree: (tree / "stray.jpg").touch())
    assert "images lie beside class folders" in text


@pytest.mark.parametrize(
    ("classes", "reason"),
    [
        (("airplane", "bird", "cat", "dog"), "this one has 4 classes: airplane, bird, cat, ..."),
        (CLASSES[:999], f"has 999 classes: {', '.join(CLASSES[:3])}, ..., without {CLASSES[999]}"),
        ((*CLASSES[:999], "cat"), f"has 1000 classes: {', '.join(CLASSES[:3])}, ..., without {CLASSES[999]}"),
    ],
)
def test_another_classifier(val: Path, classes: tuple[str, ...], reason: str) -> None:
    assert reason in fault(lambda: open_imagenet_set("imagenet_val", str(val), classes, CACHE), ConfigError)


def test_a_folder_that_the_classifier_does_not_know(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "mine", ["cat", "dgo"])
    text = fault(lambda: open_labelled(str(tree), ("cat", "dog"), CACHE))
    assert "dgo" in text and text.endswith("did you mean dog?")


def test_what_a_folder_is_called_is_shown_safely(tmp_path: Path) -> None:
    text = broken("imagenet_a", tmp_path, lambda tree: rename(tree, "n01498041", "a\x1b[31m\nb"))
    assert "\x1b" not in text and "a\\x1b[31m\\nb" in text


# --- ImageNet-C -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["noise/", ""])
def test_released_tree_with_and_without_groups(tmp_path: Path, group: str) -> None:
    for severity in (1, 3):
        make_tree(tmp_path / f"{group}shot_noise/{severity}", CLASSES[:2])
    found = released_folders(tmp_path, ["shot_noise"], [1, 3])
    assert found == {("shot_noise", s): tmp_path / f"{group}shot_noise/{s}" for s in (1, 3)}


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ("blur/glas_blur/1", "no folder blur/glass_blur or glass_blur; is it glas_blur?"),
        ("noise/shot_noise/1", "no folder blur/glass_blur or glass_blur; it comes in five tars"),
        ("blur/glass_blur/2", "no folder 1 of that severity in it, but 2"),
        ("blur/glass_blur", "no folder 1 of that severity in it, but nothing"),
    ],
)
def test_what_is_missing_in_a_released_tree(tmp_path: Path, made: str, reason: str) -> None:
    (tmp_path / made).mkdir(parents=True)
    assert reason in fault(lambda: released_folders(tmp_path, ["glass_blur"], [1]))


def test_a_tar_that_was_not_unpacked(tmp_path: Path) -> None:
    (tmp_path / "blur.tar").touch()
    assert "unpack blur.tar there" in fault(lambda: released_folders(tmp_path, ["glass_blur"], [1]))
    assert "no such folder" in fault(lambda: released_folders(tmp_path / "absent", ["glass_blur"], [1]))


def test_a_class_missing_in_one_cell(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "noise" / "shot_noise" / "1", CLASSES[:-1])
    text = fault(lambda: open_released(tree, CLASSES, CACHE))
    assert "999 of the 1000 classes of imagenet_c have images" in text and "shot_noise/1" in text


# --- ReaL -----------------------------------------------------------------------------------------------------------


def test_real_labels_go_by_the_number_in_the_file_name(tmp_path: Path, val: Path) -> None:
    source = open_imagenet_set("imagenet_val", str(val), CLASSES, CACHE)
    targets, labels = real_targets(source, CLASSES), real_labels()
    for row in range(0, 1000, 7):
        assert targets[row][targets[row] >= 0].tolist() == labels[image_number(source.name(row)) - 1]
    turned = real_targets(source, CLASSES[::-1])
    assert ((turned == 999 - targets) | (targets < 0)).all()


@pytest.mark.parametrize("name", ["a.JPEG", "ILSVRC2012_val_00050001.JPEG", "ILSVRC2012_val_00000000.JPEG"])
def test_real_needs_the_published_names(tmp_path: Path, name: str) -> None:
    source = open_images(str(make_tree(tmp_path / "val", CLASSES[:1], lambda i: name)), CACHE)
    assert f"{name}: real: its labels go by the number" in fault(lambda: real_targets(source, CLASSES))


# --- transforms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(300, 500), (500, 333), (256, 256), (100, 90), (257, 255), (224, 224)])
def test_official_transform_is_torchvisions(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    reference = v2.Compose([v2.Resize(256), v2.CenterCrop(224), v2.PILToTensor()])(Image.fromarray(pixels))
    assert torch.equal(OfficialTransform((224, 224))(torch.from_numpy(pixels).permute(2, 0, 1)), reference)


def test_a_strip_does_not_grow_without_limit() -> None:
    assert OfficialTransform((224, 224))(torch.zeros(3, 8, 60_000, dtype=torch.uint8)).shape == (3, 224, 224)


def test_released_files_are_taken_as_they_are() -> None:
    image = torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ReleasedTransform()(image), image)
    with pytest.raises(DataError, match="64x64 px; the released files have 224x224 px"):
        ReleasedTransform()(image[:, :64, :64])


def test_at_size_leaves_what_fits() -> None:
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert at_size(image, (32, 32)) is image
    assert at_size(image, (48, 40)).shape == (3, 48, 40)


def test_evenly_spread_subsets() -> None:
    assert evenly(5, None).tolist() == evenly(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert evenly(101, 5).tolist() == [0, 25, 50, 75, 100]
