"""Runs every command of docs/guide.md as it is written, on small real data: `python -m tests.guide FOLDER`.

Not part of `make test`: it takes half an hour. `my_photos`, `my_coco`, `my_labels` and `my_classes` are made in FOLDER from ../shared/data. Of a line for
several machines, both machines are this one.
"""

import re
import shlex
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
BIN = ROOT / ".venv" / "bin"
TRAIN_PER_CLASS, VAL_PER_CLASS = 40, 10


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The commands of the shell blocks, and the Python blocks as commands, in their order."""
    found: list[list[str]] = []
    for language, text in blocks(page):
        found += [["python", "-c", text]] if language == "python" else [shlex.split(line) for line in text.splitlines()]
    return found


def prepare(folder: Path) -> None:
    """The data of the guide, links to small real sets."""
    folder.mkdir(parents=True)
    (folder / "configs").symlink_to(ROOT / "configs")
    for name, target in (("my_photos", "imagenet-sample"), ("my_coco", "coco128")):
        (folder / name).symlink_to(SHARED / target)
    labels = folder / "my_labels"
    labels.mkdir()
    for name in ("images", "annotations"):
        (labels / name).symlink_to(SHARED / "camvid" / name)
    (labels / "classes.txt").write_text((ROOT / "transfer" / "segmentation" / "class_files" / "camvid.txt").read_text())
    taken: dict[str, int] = {}
    with tarfile.open(SHARED / "cifar10.tgz") as tar:
        for member in tar:
            parts = Path(member.name).parts  # cifar10/{train,val}/<class>/*.jpg
            if not member.isfile() or len(parts) != 4:
                continue
            place = "/".join(parts[1:3])
            taken[place] = taken.get(place, 0) + 1
            if taken[place] <= (TRAIN_PER_CLASS if parts[1] == "train" else VAL_PER_CLASS):
                target = folder / "my_classes" / Path(*parts[1:])
                target.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(member)
                assert content is not None
                target.write_bytes(content.read())


def run(command: list[str], folder: Path) -> int:
    """Give one command, twice at once where it is for two machines."""
    program = [str(BIN / command[0]), *(part.replace("node1:", "127.0.0.1:") for part in command[1:])]
    copies = 2 if "--nnodes" in command else 1
    return max(process.wait() for process in [subprocess.Popen(program, cwd=folder) for _ in range(copies)])


def main() -> int:
    folder = Path(sys.argv[1])
    prepare(folder)
    for command in commands((ROOT / "docs" / "guide.md").read_text()):
        if command[0] in {"make", "source"}:
            continue  # tests run in what they made
        print("$", shlex.join(command) if command[0] != "python" else command[2], flush=True)
        begun = time.monotonic()
        code = run(command, folder)
        print(f"-> code {code}, {time.monotonic() - begun:.0f} s\n", flush=True)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
