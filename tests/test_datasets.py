"""Image sources: folders, tars, compressed tars and shards give the same list, and hostile ones harm nothing."""

import gzip
import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

import core.datasets
from core.datasets import TRAIN_NAMES, VAL_NAMES, ImageSource, labelled_pair, open_images, pick_split
from core.errors import DataError, MachineError

LAYOUT = ("cat/1.jpg", "cat/2.PNG", "dog/1.jpg", "dog/deep.er/x.webp", "top.tif")


def content(name: str) -> bytes:
    return f"bytes of {name.removeprefix('./')}".encode("utf-8", "surrogateescape")


def make_folder(root: Path, names: Iterable[str]) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(name))
    return root


def make_tar(path: Path, names: Iterable[str], extra: Iterable[tuple[str, bytes]] = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in (*((name, content(name)) for name in names), *extra):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def make_tgz(path: Path, names: Iterable[str]) -> Path:
    plain = make_tar(path.with_suffix(".plain"), names)
    path.write_bytes(gzip.compress(plain.read_bytes(), 1))
    plain.unlink()
    return path


def open_at(path: Path | str, cache: Path) -> ImageSource:
    return open_images(str(path), cache)


def names_of(source: ImageSource) -> list[str]:
    return [os.fsdecode(name) for name in source.names]


def labelled(source: ImageSource) -> dict[str, str]:
    assert source.labels is not None
    return {name: source.classes[label] for name, label in zip(names_of(source), source.labels, strict=True)}


def require_readable(source: ImageSource) -> None:
    for index, name in enumerate(names_of(source)):
        assert source.read(index) == content(name)


def fault(path: Path | str, cache: Path) -> str:
    with pytest.raises(DataError) as caught:
        open_at(path, cache)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files_below(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "rcmae"


# --- folders --------------------------------------------------------------------------------------------------------


def test_a_flat_folder_is_listed_in_order_without_labels(tmp_path: Path, cache: Path) -> None:
    source = open_at(make_folder(tmp_path / "flat", ["b.jpg", "a.png", "C.JPEG", "notes.txt", "d"]), cache)
    assert names_of(source) == ["C.JPEG", "a.png", "b.jpg"]
    assert (source.labels, source.classes, len(source)) == (None, (), 3)
    require_readable(source)
    assert not cache.exists()


def test_a_nested_folder_is_listed_to_the_bottom(tmp_path: Path, cache: Path) -> None:
    source = open_at(make_folder(tmp_path / "nested", LAYOUT), cache)
    assert names_of(source) == sorted(LAYOUT)
    assert source.labels is None
    require_readable(source)


def test_class_folders_give_labels_in_the_order_of_their_names(tmp_path: Path, cache: Path) -> None:
    names = ["set/dog/1.jpg", "set/cat/1.jpg", "set/cat/2.jpg", "set/Ant/9.jpg"]
    source = open_at(make_folder(tmp_path / "classes", names), cache)
    assert source.classes == ("Ant", "cat", "dog")
    assert labelled(source) == {name: name.split("/")[1] for name in names}
    assert source.labels is not None and source.labels.dtype == np.int64


def test_images_above_or_beside_the_class_folders_mean_no_labels(tmp_path: Path, cache: Path) -> None:
    assert open_at(make_folder(tmp_path / "above", ["cat/1.jpg", "dog/1.jpg", "x.jpg"]), cache).labels is None
    assert open_at(make_folder(tmp_path / "uneven", ["cat/1.jpg", "a/dog/1.jpg"]), cache).labels is None


def test_hidden_files_and_folders_are_left_out(tmp_path: Path, cache: Path) -> None:
    root = make_folder(
        tmp_path / "hidden", ["a.jpg", ".b.jpg", "._a.jpg", ".thumbnails/c.jpg", "d/.e/f.jpg", "d/g.jpg"]
    )
    assert names_of(open_at(root, cache)) == ["a.jpg", "d/g.jpg"]


def test_links_are_followed_and_do_not_go_round(tmp_path: Path, cache: Path) -> None:
    elsewhere = make_folder(tmp_path / "elsewhere", ["y.jpg"])
    root = make_folder(tmp_path / "links", ["a/x.jpg"])
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "self").symlink_to(".")
    (root / "other").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    (root / "z.jpg").symlink_to(elsewhere / "y.jpg")
    assert names_of(open_at(root, cache)) == ["a/x.jpg", "other/y.jpg", "z.jpg"]


def test_of_two_links_to_a_folder_the_first_by_name_counts(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, elsewhere = make_folder(tmp_path / "twins", []), make_folder(tmp_path / "elsewhere", ["y.jpg"])
    root.mkdir()
    for name in ("b", "a", "c"):
        (root / name).symlink_to(elsewhere)
    walk = os.walk

    def backwards(*args: object, **options: object) -> Iterable[tuple[str, list[str], list[str]]]:
        for folder, subfolders, files in walk(*args, **options):
            subfolders.sort(reverse=True)  # an order that another file system might give
            yield folder, subfolders, files

    monkeypatch.setattr(os, "walk", backwards)
    assert names_of(open_at(root, cache)) == ["a/y.jpg"]


def test_a_folder_called_like_an_image_is_a_folder_and_a_dead_link_an_unreadable_file(
    tmp_path: Path, cache: Path
) -> None:
    root = make_folder(tmp_path / "odd", ["x.jpg/inner.jpg"])
    (root / "dead.jpg").symlink_to("nowhere")
    source = open_at(root, cache)
    assert names_of(source) == ["dead.jpg", "x.jpg/inner.jpg"]
    with pytest.raises(FileNotFoundError):
        source.read(0)


ODD_NAMES = [
    "a\nb.jpg", "a\x1b[31m.jpg", os.fsdecode(b"caf\xe9.jpg"), "n" * 251 + ".jpg", "\u202egpj.exe.jpg", " lead.jpg",
    "a\tb.jpg", "日本.jpg", "{0..3}.jpg", "-rf.jpg", "%s.jpg", "a'b\".jpg",
]  # fmt: skip
SHOWN = {
    "a\nb.jpg": "a\\nb.jpg",
    "a\x1b[31m.jpg": "a\\x1b[31m.jpg",
    os.fsdecode(b"caf\xe9.jpg"): "caf\\udce9.jpg",
    "\u202egpj.exe.jpg": "\\u202egpj.exe.jpg",
    "a\tb.jpg": "a\\tb.jpg",
}


@pytest.mark.parametrize("packed", [False, True])
def test_odd_names_are_shown_in_one_safe_line_and_read_back(tmp_path: Path, cache: Path, packed: bool) -> None:
    path = make_tar(tmp_path / "odd.tar", ODD_NAMES) if packed else make_folder(tmp_path / "odd", ODD_NAMES)
    source = open_at(path, cache)
    assert set(names_of(source)) == set(ODD_NAMES)
    require_readable(source)
    for index, name in enumerate(names_of(source)):
        assert source.name(index) == SHOWN.get(name, name)
        assert source.name(index).isprintable()


def test_odd_names_of_the_data_itself(tmp_path: Path, cache: Path) -> None:
    for name in ("a\nb", os.fsdecode(b"caf\xe9"), "n" * 255, "{a,b}", "it's"):
        assert len(open_at(make_folder(tmp_path / name, ["x.jpg"]), cache)) == 1
    for name in ("a\nb.tar", os.fsdecode(b"caf\xe9.tar"), "n" * 251 + ".tar", "{a,b}.tar"):
        assert len(open_at(make_tar(tmp_path / name, ["x.jpg"]), cache)) == 1
    for name in ("a\nb.tgz", "n" * 245 + ".tgz"):
        assert len(open_at(make_tgz(tmp_path / name, ["x.jpg"]), cache)) == 1


def test_a_folder_that_cannot_be_listed_is_not_silently_left_out(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path / "locked", ["a/1.jpg", "b/2.jpg"])
    scandir = os.scandir

    def refuse_b(path: str) -> object:
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse_b)
    assert fault(root, cache).startswith(f"{root}/b: cannot be listed: Permission denied")


# --- splits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("above", ["", "tiny-imagenet-200/", "data/v2/", "./"])
@pytest.mark.parametrize("packed", [False, True])
def test_train_and_val_are_picked_also_below_a_single_folder(
    tmp_path: Path, cache: Path, above: str, packed: bool
) -> None:
    names = [f"{above}{name}" for name in ("train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg", "val/dog/4.jpg")]
    path = make_tar(tmp_path / "set.tar", names) if packed else make_folder(tmp_path / "set", names)
    source = open_at(path, cache)
    train, val = pick_split(source, TRAIN_NAMES), pick_split(source, VAL_NAMES)
    assert train is not None and val is not None
    assert [name.rpartition("/")[2] for name in names_of(train)] == ["1.jpg", "2.jpg"]
    assert list(labelled(val).values()) == ["cat", "dog"]
    assert (train.origin, val.origin) == (f"{path} (train)", f"{path} (val)")
    require_readable(train)


@pytest.mark.parametrize("name", ["train", "training"])
def test_other_names_of_the_splits_are_known(tmp_path: Path, cache: Path, name: str) -> None:
    source = open_at(make_folder(tmp_path / "set", [f"{name}/1.jpg", "test/2.jpg"]), cache)
    train, test = pick_split(source, TRAIN_NAMES), pick_split(source, VAL_NAMES)
    assert train is not None and names_of(train) == [f"{name}/1.jpg"]
    assert test is not None and names_of(test) == ["test/2.jpg"]


def test_a_set_with_only_val_has_no_train(tmp_path: Path, cache: Path) -> None:
    names = [f"ILSVRC2012/val/{name}" for name in ("n01/1.jpg", "n01/2.jpg", "n02/3.jpg")]
    source = open_at(make_folder(tmp_path / "imagenet", names), cache)
    val = pick_split(source, VAL_NAMES)
    assert pick_split(source, TRAIN_NAMES) is None
    assert val is not None and names_of(val) == names
    assert val.classes == ("n01", "n02")


def test_a_set_without_splits_has_none(tmp_path: Path, cache: Path) -> None:
    source = open_at(make_folder(tmp_path / "set", ["cat/1.jpg", "dog/train/2.jpg"]), cache)
    assert pick_split(source, TRAIN_NAMES) is None


def test_a_split_keeps_the_labels_of_webdataset_members(tmp_path: Path, cache: Path) -> None:
    names = ("train/a.jpg", "train/b.jpg", "val/c.jpg")
    classes = [("train/a.cls", b"2"), ("train/b.cls", b"0"), ("val/c.cls", b"1\n")]
    source = open_at(make_tar(tmp_path / "set.tar", names, classes), cache)
    train = pick_split(source, TRAIN_NAMES)
    assert train is not None and train.labels is not None
    assert train.labels.tolist() == [2, 0]
    assert train.classes == ("0", "1", "2")


# --- tars -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["tar", "TAR", "tgz", "tar.gz"])
def test_a_tar_is_the_same_list_as_its_folder(tmp_path: Path, cache: Path, ending: str) -> None:
    names = [*LAYOUT, "cat/1.png", "cat/.hidden.jpg", "readme.txt", "long/" + "x" * 150 + ".jpg"]
    path = tmp_path / f"set.{ending}"
    packed = open_at(make_tgz(path, names) if "gz" in ending else make_tar(path, reversed(names)), cache)
    folder = open_at(make_folder(tmp_path / "set", names), cache)
    assert names_of(packed) == names_of(folder)
    assert packed.fingerprint() == folder.fingerprint()
    for index in np.random.default_rng(0).permutation(len(folder)):
        assert packed.read(int(index)) == folder.read(int(index))


def test_class_folders_in_a_tar_give_labels(tmp_path: Path, cache: Path) -> None:
    names = ("./set/cat/1.jpg", "./set/dog/1.jpg", "./set/dog/2.jpg")
    source = open_at(make_tar(tmp_path / "set.tar", names), cache)
    assert labelled(source) == {name: name.split("/")[2] for name in names}


def add_special(tar: tarfile.TarFile, name: str, kind: bytes, target: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    tar.addfile(member)


def test_a_hostile_tar_writes_nothing_outside_the_cache_and_its_links_are_skipped(tmp_path: Path, cache: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    names = ["../evil.jpg", "../../../../evil2.jpg", str(tmp_path / "absolute.jpg"), "fine.jpg"]
    path = make_tar(tmp_path / "in" / "hostile.tar", names)
    with tarfile.open(path, "a") as tar:
        add_special(tar, "soft.jpg", tarfile.SYMTYPE, str(secret))
        add_special(tar, "hard.jpg", tarfile.LNKTYPE, str(secret))
        add_special(tar, "device.jpg", tarfile.CHRTYPE)
        add_special(tar, "block.jpg", tarfile.BLKTYPE)
        add_special(tar, "pipe.jpg", tarfile.FIFOTYPE)
        add_special(tar, "folder.jpg", tarfile.DIRTYPE)
    packed = tmp_path / "in" / "hostile.tgz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    before = files_below(tmp_path)
    for data in (path, packed):
        source = open_at(data, cache)
        assert set(names_of(source)) == set(names)
        require_readable(source)
    assert {name.split("/")[0] for name in files_below(tmp_path) - before} == {"cache"}
    assert not any(os.path.lexists(tmp_path.joinpath(name)) for name in names)


def test_of_two_members_of_one_name_the_later_counts(tmp_path: Path, cache: Path) -> None:
    source = open_at(make_tar(tmp_path / "twice.tar", ["a.jpg", "b.jpg"], [("a.jpg", b"newer")]), cache)
    assert names_of(source) == ["a.jpg", "b.jpg"]
    assert source.read(0) == b"newer"


def test_a_truncated_tar_is_refused_at_every_cut(tmp_path: Path, cache: Path) -> None:
    whole = make_tar(tmp_path / "whole.tar", [f"{i}.jpg" for i in range(4)]).read_bytes()
    end = whole.rindex(b"bytes of 3.jpg") + 512  # after the last member and its padding, where the end mark starts
    path = tmp_path / "cut.tar"
    for cut in [*range(0, end, 64), 1, 511, 513, end - 500]:
        path.write_bytes(whole[:cut])
        assert fault(path, cache).startswith(f"{path}: not a whole tar file ("), cut
    assert files_below(tmp_path) == {"whole.tar", "cut.tar"}


def test_a_broken_header_in_the_middle_does_not_hide_what_follows(tmp_path: Path, cache: Path) -> None:
    path = make_tar(tmp_path / "broken.tar", [f"{i}.jpg" for i in range(4)])
    data = bytearray(path.read_bytes())
    data[data.index(b"2.jpg") + 150] ^= 0x55  # in the checksum of the third header
    path.write_bytes(data)
    assert "not a whole tar file" in fault(path, cache)


@pytest.mark.parametrize("data", [b"", b"no tar at all", b"<html>404</html>" * 100, os.urandom(5000)])
def test_what_is_no_tar_is_refused(tmp_path: Path, cache: Path, data: bytes) -> None:
    path = tmp_path / "odd.tar"
    path.write_bytes(data)
    assert fault(path, cache).startswith(f"{path}: not a whole tar file (")


def test_nonsense_in_an_extended_header_is_refused(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "pax.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("a.jpg")
        member.pax_headers = {"GNU.sparse.map": "a,b"}
        tar.addfile(member)
    assert "not a whole tar file" in fault(path, cache)


# --- compressed tars ------------------------------------------------------------------------------------------------


def test_a_tgz_is_unpacked_once(tmp_path: Path, cache: Path) -> None:
    path = make_tgz(tmp_path / "set.tgz", ["a.jpg", "b.jpg"])
    open_at(path, cache)
    (unpacked,) = cache.glob("*.tar")
    os.utime(unpacked, ns=(1, 1))
    require_readable(open_at(path, cache))
    assert list(cache.glob("*.tar")) == [unpacked]
    assert unpacked.stat().st_mtime_ns == 1
    assert not list(cache.glob(".tmp*"))


def test_a_tgz_that_changed_is_unpacked_again(tmp_path: Path, cache: Path) -> None:
    path = make_tgz(tmp_path / "set.tgz", ["a.jpg"])
    assert names_of(open_at(path, cache)) == ["a.jpg"]
    make_tgz(path, ["a.jpg", "c.jpg"])
    os.utime(path, (0, 0))  # the clock of files may not have moved on
    assert names_of(open_at(path, cache)) == ["a.jpg", "c.jpg"]


def test_a_truncated_or_damaged_tgz_leaves_nothing_in_the_cache(tmp_path: Path, cache: Path) -> None:
    noise = np.random.default_rng(0).bytes(5000)  # where a flipped byte always changes what is unpacked
    plain, path = make_tar(tmp_path / "plain.tar", ["a.jpg"], [("b.jpg", noise)]), tmp_path / "set.tgz"
    whole = gzip.compress(plain.read_bytes())
    damaged = [whole[:cut] for cut in (1, 9, 100, len(whole) // 2, len(whole) - 5)]
    for place in range(12, len(whole), len(whole) // 20):
        damaged.append(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
    for data in (*damaged, b"no gzip at all", b"<html>404</html>"):
        path.write_bytes(data)
        assert fault(path, cache).startswith(f"{path}: not a whole gzip file (")
        assert files_below(cache) == set()


@pytest.mark.parametrize(
    "data",
    [b"", gzip.compress(b""), gzip.compress(b"a text"), gzip.compress(gzip.compress(b"twice"))],
    ids=["no bytes", "nothing packed", "a text", "packed twice"],
)
def test_a_tgz_without_a_tar_inside_leaves_nothing_in_the_cache(tmp_path: Path, cache: Path, data: bytes) -> None:
    path = tmp_path / "set.tgz"
    path.write_bytes(data)
    assert fault(path, cache) == f"{path}: no tar inside; expected a compressed tar"
    assert files_below(cache) == set()


def test_an_unusable_cache_is_a_fault_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    path = make_tgz(tmp_path / "set.tgz", ["a.jpg"])
    with pytest.raises(MachineError, match="give a folder that can be written as cache="):
        open_at(path, tmp_path / "file" / "cache")


# --- shards and their index -----------------------------------------------------------------------------------------


def make_shards(root: Path) -> Path:
    for shard in range(3):
        keys = [f"{shard}{i:03d}" for i in range(4)]
        classes = [(f"{key}.cls", f"{(int(key) * 7) % 5}\n".encode()) for key in keys]
        make_tar(root / f"part-{shard:04d}.tar", [f"{key}.jpg" for key in keys], [*classes, ("info.json", b"{}")])
    return root


@pytest.mark.parametrize("pattern", ["part-{0000..0002}.tar", "part-{0000,0001,0002}.tar", ""])
def test_webdataset_shards_are_read_with_their_labels(tmp_path: Path, cache: Path, pattern: str) -> None:
    source = open_at(f"{make_shards(tmp_path / 'shards')}/{pattern}", cache)
    assert names_of(source) == [f"{shard}{i:03d}.jpg" for shard in range(3) for i in range(4)]
    require_readable(source)
    assert source.labels is not None
    assert source.labels.tolist() == [(int(name[:-4]) * 7) % 5 for name in names_of(source)]
    assert source.classes == tuple("01234")


def test_a_part_of_the_shards_and_a_missing_one(tmp_path: Path, cache: Path) -> None:
    root = make_shards(tmp_path / "shards")
    assert len(open_at(f"{root}/part-{{0001..0002}}.tar", cache)) == 8
    assert fault(f"{root}/part-{{0001..0003}}.tar", cache).startswith(f"{root}/part-0003.tar: no such file or folder")
    assert fault(f"{root}/part-{{0001..0003.tar", cache).startswith(f"{root}/part-{{0001..0003.tar: no such file")


def test_shards_may_be_compressed(tmp_path: Path, cache: Path) -> None:
    for shard in range(2):
        make_tgz(tmp_path / "shards" / f"{shard}.tgz", [f"{shard}a.jpg", f"{shard}b.jpg"])
    source = open_at(tmp_path / "shards", cache)
    assert names_of(source) == ["0a.jpg", "0b.jpg", "1a.jpg", "1b.jpg"]
    require_readable(source)


def test_a_folder_of_images_and_a_tar_is_a_folder_of_images(tmp_path: Path, cache: Path) -> None:
    root = make_folder(tmp_path / "mixed", ["a.jpg"])
    make_tar(root / "backup.tar", ["b.jpg", "c.jpg"])
    assert names_of(open_at(root, cache)) == ["a.jpg"]


@pytest.mark.parametrize("label", [b"x", b"-1", b"", b"1.5", b"99999999999999999999", b"12345678"])
def test_labels_that_are_no_class_number_mean_no_labels(tmp_path: Path, cache: Path, label: bytes) -> None:
    path = make_tar(tmp_path / "set.tar", ["a.jpg", "b.jpg"], [("a.cls", b"0"), ("b.cls", label)])
    assert open_at(path, cache).labels is None


def test_the_index_is_kept_and_made_again_when_a_tar_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tar(tmp_path / "set.tar", ["a.jpg", "b.jpg"])
    made: list[list[Path]] = []
    index = core.datasets._index_tars
    monkeypatch.setattr(core.datasets, "_index_tars", lambda tars: made.append(tars) or index(tars))
    first, second = open_at(path, cache), open_at(path, cache)
    assert len(made) == 1
    assert names_of(first) == names_of(second) == ["a.jpg", "b.jpg"]
    require_readable(second)
    make_tar(path, ["c.jpg", "d.jpg"])  # of the same size
    os.utime(path, (0, 0))
    assert names_of(open_at(path, cache)) == ["c.jpg", "d.jpg"]
    assert len(made) == 2


@pytest.mark.parametrize("damage", ["empty", "cut", "flip", "text", "other"])
def test_a_damaged_index_is_made_again(tmp_path: Path, cache: Path, damage: str) -> None:
    path = make_tar(tmp_path / "set.tar", ["a.jpg", "b.jpg"])
    open_at(path, cache)
    (index,) = cache.glob("index-*.npz")
    whole = index.read_bytes()
    buffer = io.BytesIO()
    np.savez(buffer, names=np.array([b"x"]))
    flipped = bytearray(whole)
    flipped[whole.index(b"a.jpg")] ^= 1
    index.write_bytes(
        {"empty": b"", "cut": whole[:-40], "flip": flipped, "text": b"hello", "other": buffer.getvalue()}[damage]
    )
    source = open_at(path, cache)
    assert names_of(source) == ["a.jpg", "b.jpg"]
    assert index.read_bytes() == whole


# --- refusals -------------------------------------------------------------------------------------------------------


def test_what_holds_no_images_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    single = make_folder(tmp_path / "single", ["x.jpg"]) / "x.jpg"
    assert fault(tmp_path / "typo", cache).startswith(f"{tmp_path}/typo: no such file or folder; give data=PATH")
    assert fault(tmp_path / "empty", cache).startswith(
        f"{tmp_path}/empty: no images found; expected files ending in .bmp"
    )
    assert "no images found" in fault(make_folder(tmp_path / "texts", ["a.txt", "b/c.csv"]), cache)
    assert "no images found" in fault(make_tar(tmp_path / "texts.tar", ["a.txt"]), cache)
    assert "no images found" in fault(make_tar(tmp_path / "empty.tar", []), cache)
    for path in (tmp_path / "file.txt", single):
        assert fault(path, cache) == f"{path}: expected a folder, a .tar, a .tgz or .tar.gz"


# --- labelled pairs -------------------------------------------------------------------------------------------------


def pair_fault(path: Path, cache: Path) -> str:
    with pytest.raises(DataError) as caught:
        labelled_pair(str(path), cache)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_labelled_pair_is_train_and_val_where_they_are(tmp_path: Path, cache: Path) -> None:
    names = ["s/train/cat/1.jpg", "s/train/dog/2.jpg", "s/train/dog/3.jpg", "s/val/cat/4.jpg", "s/val/dog/5.jpg"]
    train, test = labelled_pair(str(make_folder(tmp_path / "set", names)), cache)
    assert labelled(train) == {name: name.split("/")[2] for name in names[:3]}
    assert labelled(test) == {name: name.split("/")[2] for name in names[3:]}


def test_a_labelled_pair_without_splits_tests_on_every_fifth(tmp_path: Path, cache: Path) -> None:
    names = [f"{kind}/{i:02d}.jpg" for kind in ("cat", "dog") for i in range(10)]
    train, test = labelled_pair(str(make_folder(tmp_path / "set", names)), cache)
    assert names_of(test) == names[::5]
    assert sorted(names_of(train) + names_of(test)) == names
    assert train.classes == test.classes == ("cat", "dog")
    assert labelled(test) == {name: name.split("/")[0] for name in names[::5]}


@pytest.mark.parametrize(
    "names",
    [
        ["1.jpg", "2.jpg"],
        ["photos/1.jpg", "photos/2.jpg"],
        ["train/1.jpg", "train/2.jpg", "val/3.jpg"],
        ["s/train/1.jpg", "s/val/3.jpg"],
        ["train/cat/1.jpg", "train/2.jpg", "val/cat/3.jpg"],
        ["only/1.jpg", "only/2.jpg"],
    ],
)
def test_a_pair_without_class_folders_is_refused(tmp_path: Path, cache: Path, names: list[str]) -> None:
    assert "no class folders; a labelled set is an ImageFolder" in pair_fault(
        make_folder(tmp_path / "set", names), cache
    )


def test_a_pair_of_other_classes_is_refused(tmp_path: Path, cache: Path) -> None:
    names = ["train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg", "val/elk/4.jpg"]
    assert pair_fault(make_folder(tmp_path / "a", names), cache).endswith("train and val have other classes: dog, elk")
    assert pair_fault(make_folder(tmp_path / "b", names[:3]), cache).endswith("train and val have other classes: dog")


# --- subset and fingerprint -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_a_subset_is_these_images_in_this_order(tmp_path: Path, cache: Path, packed: bool) -> None:
    names = [f"{kind}/{i}.jpg" for kind in ("cat", "dog") for i in range(3)]
    path = make_tar(tmp_path / "set.tar", names) if packed else make_folder(tmp_path / "set", names)
    subset = open_at(path, cache).subset(np.array([4, 0, 4]))
    assert names_of(subset) == ["dog/1.jpg", "cat/0.jpg", "dog/1.jpg"]
    assert subset.labels is not None and subset.labels.tolist() == [1, 0, 1]
    require_readable(subset)


def test_the_fingerprint_is_of_the_names_in_order(tmp_path: Path, cache: Path) -> None:
    source = open_at(make_folder(tmp_path / "a", LAYOUT), cache)
    moved = open_at(make_folder(tmp_path / "b", LAYOUT), cache)
    other = open_at(make_folder(tmp_path / "c", [*LAYOUT, "one_more.jpg"]), cache)
    assert len(source.fingerprint()) == 12
    assert source.fingerprint() == moved.fingerprint() != other.fingerprint()
    assert source.subset(np.arange(len(source))[::-1]).fingerprint() != source.fingerprint()
