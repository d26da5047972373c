"""Where images come from: a folder, an ImageFolder, tar files, a compressed tar; and in which order they are read.

Every source is a random-access list of encoded files with names and, where the layout has them, labels. Tars are
indexed once and then read like a folder; a compressed tar is unpacked once, to a plain tar in the cache: nothing in it
is ever written under a name of its own choosing. Shards behind URLs are in `core/streams.py`.
"""

import difflib
import gzip
import hashlib
import io
import logging
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import braceexpand
import numpy as np

from core.errors import DataError, MachineError, shown
from core.files import replace_file, require_space
from core.images import EXTENSIONS

TAR_ENDINGS = (".tar",)
COMPRESSED_ENDINGS = (".tgz", ".tar.gz")
TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "validation", "test")

logger = logging.getLogger("rcmae")


@dataclass(frozen=True)
class TarMembers:
    """Where each member lies in which tar."""

    tars: tuple[Path, ...]
    tar_of: np.ndarray  # [N] int32
    offsets: np.ndarray  # [N] int64, bytes
    sizes: np.ndarray  # [N] int64, bytes


@dataclass(frozen=True)
class ImageSource:
    """A list of encoded images. Names are compact byte arrays, so that forked workers share their memory.

    Attributes:
        origin: what was opened, for messages.
        names: [N] relative names, bytes.
        labels: [N] int64 class indices, or None where the layout has no classes.
        classes: class names, sorted.
        folder: root of the names, or None where `members` says where the bytes lie.
    """

    origin: str
    names: np.ndarray
    labels: np.ndarray | None
    classes: tuple[str, ...]
    folder: Path | None = None
    members: TarMembers | None = None

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Printable name of one image."""
        return shown(os.fsdecode(self.names[index]))

    def read(self, index: int) -> bytes:
        """Encoded bytes of one image. Raises: OSError where it cannot be read."""
        if self.members is None:
            assert self.folder is not None, "a source is a folder or has members"
            return (self.folder / os.fsdecode(self.names[index])).read_bytes()
        members = self.members
        with members.tars[members.tar_of[index]].open("rb") as file:
            file.seek(members.offsets[index])
            return file.read(members.sizes[index])

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of all names in order: the same data, wherever it lies."""
        return hashlib.sha256(b"\n".join(self.names.tolist())).hexdigest()[:12]

    def subset(self, keep: np.ndarray) -> "ImageSource":
        """The images at these indices, in this order."""
        members = self.members
        if members is not None:
            picked = (members.tar_of[keep], members.offsets[keep], members.sizes[keep])
            members = TarMembers(members.tars, *picked)
        labels = None if self.labels is None else self.labels[keep]
        return replace(self, names=self.names[keep], labels=labels, members=members)


def open_images(data: str, cache: Path) -> ImageSource:
    """Open a folder, tar, tar shards (`dir/{000..127}.tar` or a folder of tars) or compressed tar, all of it.

    Args:
        data: what the user gave as `data=`.
        cache: where compressed tars are unpacked and tar indexes are kept.
    Raises: DataError if it is missing or holds no images.
    """
    tars = _tar_paths(data, cache)
    source = _open_tars(data, tars, cache) if tars else open_folder(data)
    if not len(source):
        endings = " ".join(sorted(EXTENSIONS))
        raise DataError(f"{shown(data)}: no images found; expected files ending in {endings}, in folders or tars")
    return _with_classes(source)


def pick_split(source: ImageSource, names: tuple[str, ...]) -> ImageSource | None:
    """The images below a folder called by one of `names` (TRAIN_NAMES, VAL_NAMES) at the top; None if there is none."""
    parts = [os.fsdecode(name).split("/") for name in source.names]
    depth = 0  # a tar or folder may hold a single folder, which holds the splits
    while len({part[depth] if len(part) > depth + 1 else None for part in parts}) == 1 and len(parts[0]) > depth + 1:
        if parts[0][depth] in (*TRAIN_NAMES, *VAL_NAMES):
            break
        depth += 1
    folders = [part[depth] if len(part) > depth + 1 else "" for part in parts]
    found = next((name for name in names if name in folders), None)
    if found is None:
        return None
    split = source.subset(np.flatnonzero(np.array(folders) == found))
    if found in source.classes:  # without folders below, the splits themselves were taken for classes
        split = replace(split, labels=None, classes=())
    split = _with_classes(replace(split, origin=f"{source.origin} ({found})"))
    return replace(split, labels=None, classes=()) if split.classes == (found,) else split


def labelled_pair(
    data: str, cache: Path, test_data: str | None = None, test_labels: Path | None = None
) -> tuple[ImageSource, ImageSource]:
    """Two labelled sources, to learn from and to test on: train/ and val/, or 4/5 and 1/5 of one ImageFolder.

    Args:
        test_data: another place for the images to test on.
        test_labels: a file that labels them, where they lie flat: lines `NAME CLASS`, or `NAME NUMBER` with the number
            of the class in sorted order, from 0.
    Raises: DataError where there are no labels, or the two have other classes.
    """
    whole = open_images(data, cache)
    train, test = pick_split(whole, TRAIN_NAMES), pick_split(whole, VAL_NAMES)
    if test_data is not None:
        train, other = train or whole, open_images(test_data, cache)
        test = pick_split(other, VAL_NAMES) or other
    elif train is None or test is None:
        chosen = np.arange(len(whole)) % 5 == 0
        train, test = whole.subset(np.flatnonzero(~chosen)), whole.subset(np.flatnonzero(chosen))
    if train.labels is None or len(train.classes) < 2:
        layout = "train/CLASS/*.jpg and val/CLASS/*.jpg, or CLASS/*.jpg"
        raise DataError(f"{shown(data)}: no class folders; a labelled set is an ImageFolder, {layout}")
    if test_labels is not None:
        test = labelled_by_file(test, test_labels, train.classes)
    if test.labels is None:
        raise DataError(
            f"{shown(test.origin)}: images without class folders; give test_labels=FILE with lines `NAME CLASS`, or "
            "move each image into the folder of its class"
        )
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[:3]
        raise DataError(f"{shown(data)}: train and val have other classes: {', '.join(map(shown, odd))}")
    return train, test


def matched(source: ImageSource, classes: tuple[str, ...], whose: str) -> ImageSource:
    """A labelled source with its labels counted as another list of classes counts them, by name.

    Args:
        whose: what the list belongs to, for messages.
    Raises: DataError for images without labels, or a class that is not in the list.
    """
    if source.labels is None:
        raise DataError(f"{shown(source.origin)}: no class folders; expected CLASS/*.jpg with the classes of {whose}")
    numbers = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in source.classes if name not in numbers]
    if unknown:
        close = difflib.get_close_matches(unknown[0], classes, n=1)
        hint = f"; did you mean {shown(close[0])}?" if close else f", as {shown(classes[0])} is"
        raise DataError(
            f"{shown(source.origin)}: {len(unknown)} class folders, {shown(unknown[0])} first, are no classes of "
            f"{whose}{hint}"
        )
    table = np.array([numbers[name] for name in source.classes], dtype=np.int64)
    return replace(source, labels=table[source.labels], classes=classes)


def labelled_by_file(source: ImageSource, path: Path, classes: tuple[str, ...]) -> ImageSource:
    """The images with the labels of a file, `NAME CLASS` or `NAME NUMBER` per line; names without their folders.

    Raises: DataError for a line that is neither, an unknown class, an image without a line; and for ImageNet's own
        ground truth, numbers alone, which count the classes in another order.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"{shown(path)}: {reason}; expected lines `NAME CLASS`") from None
    numbers = {name: i for i, name in enumerate(classes)}
    labels: dict[str, int] = {}
    for place, line in enumerate(filter(str.strip, lines), 1):
        words = line.split()
        if len(words) == 1 and words[0].isdecimal():
            raise DataError(
                f"{shown(path)}:{place}: a number alone; the development kit of ImageNet counts classes in an order of "
                "its own: give lines `NAME CLASS` with the class's folder name (wnid)"
            )
        label = numbers.get(words[1]) if len(words) == 2 else None
        if label is None and len(words) == 2 and words[1].isdecimal() and int(words[1]) < len(classes):
            label = int(words[1])
        if label is None:
            raise DataError(
                f"{shown(path)}:{place}: {shown(line)[:80]}: expected `NAME CLASS` with one of the {len(classes)} "
                f"classes, as {shown(classes[0])}"
            )
        labels[words[0]] = label
    found = [labels.get(os.path.split(os.fsdecode(name))[1]) for name in source.names]
    missing = next((i for i, label in enumerate(found) if label is None), None)
    if missing is not None:
        raise DataError(f"{shown(path)}: no line for {source.name(missing)}; every image needs a label")
    return replace(source, labels=np.array(found, dtype=np.int64), classes=classes)


def _tar_paths(data: str, cache: Path) -> list[Path]:
    pattern = "{" in data and not Path(data).exists()
    try:
        paths = [Path(name) for name in braceexpand.braceexpand(data)] if pattern else [Path(data)]
    except ValueError:  # unbalanced braces
        paths = [Path(data)]
    for path in paths:
        if not path.exists():
            raise DataError(f"{shown(path)}: no such file or folder; give data=PATH of images, a tar, or shards")
    if len(paths) == 1 and paths[0].is_dir():
        entries = sorted(entry for entry in paths[0].iterdir() if not entry.name.startswith("."))
        paths = [entry for entry in entries if entry.name.lower().endswith((*TAR_ENDINGS, *COMPRESSED_ENDINGS))]
        if not paths or any(entry.is_dir() or entry.suffix.lower() in EXTENSIONS for entry in entries):
            return []
    for path in paths:
        if not path.name.lower().endswith((*TAR_ENDINGS, *COMPRESSED_ENDINGS)):
            raise DataError(f"{shown(path)}: expected a folder, a .tar, a .tgz or .tar.gz")
    return [unpacked(path, cache) if path.name.lower().endswith(COMPRESSED_ENDINGS) else path for path in paths]


def unpacked(path: Path, cache: Path) -> Path:
    """The plain tar of a compressed one, written into the cache on first use (whole or not at all)."""
    target = cache / f"{path.name.split('.')[0][:40]}-{_fingerprint([path])}.tar"
    if target.exists():
        return target
    _make_cache(cache)
    temporary = cache / f".tmp-{target.name}-{os.getpid()}"
    try:
        logger.info("unpacking %s into %s, once", shown(path.name), shown(target))
        require_space(cache, 2 * path.stat().st_size, f"unpacking {shown(path.name)}")
        with gzip.open(path) as packed, temporary.open("wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
            out.flush()
            os.fsync(out.fileno())
        if not tarfile.is_tarfile(temporary):
            raise DataError(f"{shown(path)}: no tar inside; expected a compressed tar")
        temporary.rename(target)
        logger.info("unpacked %s: %.1f MiB", shown(target.name), target.stat().st_size / 2**20)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{shown(path)}: not a whole gzip file ({error}); fetch it again") from None
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _make_cache(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"{shown(cache)}: {error.strerror}; give a folder that can be written as cache=") from None


def _fingerprint(paths: list[Path]) -> str:
    facts = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _open_tars(data: str, tars: list[Path], cache: Path) -> ImageSource:
    index_path = cache / f"index-{_fingerprint(tars)}.npz"
    try:
        with np.load(index_path, allow_pickle=False) as stored:
            index = {key: stored[key] for key in ("names", "tar_of", "offsets", "sizes", "labels")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        index = _index_tars(tars)
        _make_cache(cache)
        buffer = io.BytesIO()
        np.savez(buffer, **index)  # type: ignore[arg-type]
        replace_file(index_path, buffer.getvalue())
    labels = index["labels"] if len(index["labels"]) and index["labels"].min() >= 0 else None
    members = TarMembers(tuple(tars), index["tar_of"], index["offsets"], index["sizes"])
    classes = () if labels is None else tuple(str(i) for i in range(labels.max() + 1))
    return ImageSource(data, index["names"], labels, classes, members=members)


def _index_tars(tars: list[Path]) -> dict[str, np.ndarray]:
    names: list[bytes] = []
    rows: list[tuple[int, int, int, int]] = []
    for number, path in enumerate(tars):
        try:
            for name, offset, size, label in _tar_rows(path):
                names.append(name)
                rows.append((number, offset, size, label))
        except (tarfile.TarError, ValueError) as error:  # ValueError: nonsense in an extended header
            raise DataError(f"{shown(path)}: not a whole tar file ({shown(str(error))}); fetch it again") from None
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    fields = dict(zip(("tar_of", "offsets", "sizes", "labels"), table.T.copy(), strict=True))
    order = np.argsort(np.array(names, dtype=np.bytes_), kind="stable") if len(tars) == 1 else np.arange(len(names))
    return {"names": np.array(names, dtype=np.bytes_)[order], **{key: value[order] for key, value in fields.items()}}


def _tar_rows(path: Path) -> Iterator[tuple[bytes, int, int, int]]:
    """(name, offset, size, label) of every image in a tar; the label from webdataset's `.cls` beside it, else -1."""
    images: dict[str, tuple[int, int]] = {}  # by name: the later of two members of one name counts, as when unpacking
    labels: dict[str, int] = {}
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            key, extension = os.path.splitext(member.name)  # noqa: PTH122  a member is no path
            hidden = PurePosixPath(member.name).name.startswith(".")
            if not member.isreg() or hidden:
                continue
            if extension.lower() in EXTENSIONS:
                images[member.name] = (member.offset_data, member.size)
            elif extension == ".cls" and member.size < 8:
                content = tar.extractfile(member)
                text = content.read() if content else b""
                labels[key] = int(text) if text.strip().isdigit() else -1
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a cut or broken header for the end
            raise tarfile.ReadError("end mark missing")
    for name, (offset, size) in images.items():
        yield os.fsencode(name), offset, size, labels.get(os.path.splitext(name)[0], -1)  # noqa: PTH122


def open_folder(data: str) -> ImageSource:
    """The images below a folder, sorted by relative path, without labels; perhaps none. Raises: DataError."""
    root = Path(data)
    if not root.is_dir():
        raise DataError(f"{shown(root)}: expected a folder, a .tar, a .tgz or .tar.gz")
    names = sorted(_walk(root))
    return ImageSource(data, np.array(names, dtype=np.bytes_), None, (), folder=root)


def _walk(root: Path) -> Iterator[bytes]:
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=_refuse_folder):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:  # a link back up: do not go round for ever
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        prefix = os.path.relpath(folder, root)
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS:  # noqa: PTH122
                yield os.fsencode(name if prefix == "." else f"{prefix}/{name}")


def _refuse_folder(error: OSError) -> None:
    raise DataError(f"{shown(str(error.filename))}: cannot be listed: {error.strerror}; allow it, or leave it out")


def _with_classes(source: ImageSource) -> ImageSource:
    """Labels from class folders, where every image lies in one; the folders above them are the same for all."""
    if source.labels is not None:
        return source
    folders = [os.path.split(os.fsdecode(name))[0] for name in source.names]
    parents = {os.path.split(folder)[0] for folder in folders}
    if len(parents) > 1 or "" in folders:
        return source
    paths, labels = np.unique(np.array(folders), return_inverse=True)
    classes = tuple(os.path.split(str(path))[1] for path in paths)
    return replace(source, labels=labels.astype(np.int64), classes=classes)
