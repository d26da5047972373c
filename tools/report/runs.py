"""Run directories as plain data: which there are, what each holds, and what its figures must be read with."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, Literal

from core.errors import ConfigError, shown
from tools.report.formats import number, several, text
from tools.report.reading import (
    NOT_THERE,
    Json,
    LogFacts,
    exported_config,
    newest_manifest,
    read_cells,
    read_config,
    read_json,
    read_list,
    read_log,
    read_pictures,
    read_rows,
)

Kind = Literal["pretrain", "classify", "detect", "segment", "robust", "unknown"]

# Of each kind: the key of its configuration that no other kind has, and the files that a finished run leaves.
_MARKS: dict[str, Kind] = {
    "benchmarks": "robust", "protocol": "classify", "detector": "detect", "segmentor": "segment", "method": "pretrain",
}  # fmt: skip
_FOLDERS: dict[str, Kind] = {
    "cells": "robust", "classifier": "classify", "detector": "detect", "segmentor": "segment", "backbone": "pretrain",
}  # fmt: skip
_FILES: dict[Kind, tuple[str, ...]] = {
    "pretrain": ("config.yaml", "env.json", "metrics.jsonl", "summary.json"),
    "classify": ("config.yaml", "env.json", "metrics.jsonl", "summary.json", "results.json"),
    "detect": ("config.yaml", "env.json", "metrics.jsonl", "summary.json", "results.json"),
    "segment": ("config.yaml", "env.json", "metrics.jsonl", "summary.json", "results.json"),
    "robust": ("config.yaml", "env.json", "summary.json", "results.json"),
    "unknown": ("config.yaml", "env.json", "summary.json"),
}
_SIGNS = ("config.yaml", "summary.json", "results.json", "metrics.jsonl")  # a folder with one of them is a run
COMPARISON = "comparison.json"  # left by `rcmae compare` beside its runs
STAGES: dict[Kind, str] = {
    "pretrain": "pretraining", "classify": "classification", "detect": "detection", "segment": "segmentation",
    "robust": "robustness", "unknown": "unknown",
}  # fmt: skip
MAX_NAME = 64  # characters of a run's name, which stands in every table; its folder is named in full once
ORDER: tuple[Kind, ...] = ("pretrain", "classify", "detect", "segment", "robust", "unknown")
METHODS = {"mae": "MAE", "rc_mae": "RC-MAE", "rc_mae_own_mask": "RC-MAE, the teacher with a mask of its own"}


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        name: of the folder, shortened, unlike that of any other run of the report; foreign text.
        config, env, summary, results, manifest, exported: contents of its JSON and YAML, {} where there is none.
        rows: of metrics.jsonl. cells: of a sweep. pictures: by name, each (step, path).
        faults: by file name, why it could not be read, or only in part.
    """

    path: Path
    name: str
    kind: Kind
    config: Json
    env: Json
    summary: Json
    results: Json
    rows: Sequence[Json]
    log: LogFacts
    manifest: Json
    exported: Json
    cells: Sequence[Json] = ()
    pictures: Mapping[str, Sequence[tuple[int, Path]]] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)

    def given(self, key: str) -> Any:
        """A value of the configuration by its dotted key; None where there is none."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @property
    def done(self) -> bool:
        """Whether the run came to its end."""
        return self.summary.get("status") == "done"

    @cached_property
    def last_step(self) -> int | None:
        """The last optimizer step that was logged."""
        steps = [int(row["step"]) for row in self.rows[-1:]]
        if self.log.unit == "step" and self.log.done is not None:
            steps.append(self.log.done)
        return max(steps, default=None)

    @property
    def state(self) -> str:
        """Done, or how far it came."""
        if self.done:
            return "done"
        if self.kind == "robust":
            return f"unfinished: {several(len(self.cells), 'cell')} so far"
        if self.last_step is None:
            return "unfinished: nothing logged yet"
        total = f" of {self.log.total:,}" if self.log.total and self.log.unit == "step" else ""
        return f"unfinished: step {self.last_step:,}{total}"

    @cached_property
    def figures(self) -> dict[str, float | None]:
        """Final figures by name without `eval/`; of an unfinished run the last that were logged."""
        stored = self.summary.get("figures")
        found: dict[str, Any] = {}
        if isinstance(stored, dict) and stored:
            found = stored
        else:
            for row in self.rows:
                found |= {key: value for key, value in row.items() if value is not None}
        return {str(key).removeprefix("eval/"): number(value) for key, value in found.items()}

    @property
    def batch_size(self) -> float | None:
        """Images per optimizer step."""
        return number(self.config.get("batch_size")) or None

    @property
    def images_seen(self) -> float | None:
        """Images that were trained on, one counted as often as it was seen."""
        seen = number(self.summary.get("images_seen"))
        if seen is None and self.batch_size and self.last_step is not None:
            return self.batch_size * self.last_step
        return seen

    @property
    def train_images(self) -> float | None:
        """Images of the training set."""
        stored = self.summary.get("images")
        return number(stored if stored is not None else inside(self.manifest, "info", "data", "images"))

    @property
    def eval_images(self) -> float | None:
        """Images that the final figures are of."""
        return number(self.summary.get("test_images"))

    @property
    def fingerprint(self) -> Any:
        """Identifies the training images wherever they lie; None where no checkpoint tells."""
        return inside(self.manifest, "info", "data", "fingerprint")

    @property
    def model(self) -> Json:
        """Sizes of the exported ViT; {} where nothing was exported."""
        sizes = inside(self.exported, "rcmae", "vit")
        return sizes if isinstance(sizes, dict) else {}

    @property
    def source(self) -> str:
        """The path of the weights that the run started from, "" for none."""
        model = self.config.get("model") if self.kind == "robust" else None
        path = model or self.config.get("backbone")
        return path if isinstance(path, str) else ""

    @property
    def only_evaluated(self) -> bool:
        """Whether the run trained nothing: `--eval` of a finished model, or k-NN."""
        return self.kind in {"classify", "detect", "segment"} and self.done and "images_seen" not in self.summary

    @property
    def stage(self) -> str:
        """What was done, in a few words."""
        named = {
            "pretrain": METHODS.get(method_of(self), "pretraining"),
            "classify": {"finetune": "fine-tuning", "linprobe": "linear probe", "knn": "k-NN"}.get(
                str(self.config.get("protocol")), "classification"
            ),
            "detect": "Cascade Mask R-CNN" if self.given("detector.cascade") is True else "Mask R-CNN",
            "segment": {"upernet": "UperNet", "linear": "linear head"}.get(
                str(self.config.get("head")), "segmentation"
            ),
            "robust": "robustness",
        }.get(self.kind, "no stage that is known")
        return f"{named}, evaluation only" if self.only_evaluated and self.config.get("protocol") != "knn" else named

    @property
    def flags(self) -> list[str]:
        """What the run itself says that its figures must be read with."""
        stored = self.summary.get("flags")
        return [text(flag) for flag in stored if isinstance(flag, str)][:20] if isinstance(stored, list) else []

    @cached_property
    def warnings(self) -> list[str]:
        """What is missing, damaged or odd, in words; the most telling first."""
        found = [] if self.done else [f"{self.state}; figures are the last that were logged, not final ones"]
        for file, fault in self.faults.items():
            if not (fault == NOT_THERE and file in {"summary.json", "results.json"} and not self.done and self.rows):
                found.append(f"{file}: {fault}")
        skipped = number(self.summary.get("non_finite_steps"))
        if skipped:
            found.append(
                f"{several(int(skipped), 'step')} had a loss or gradient that was not finite and changed nothing"
            )
        found += self._strange_figures()
        broken = self.summary.get("broken_images")
        if isinstance(broken, dict) and broken:
            some = "; ".join(f"{text(name, 80)}: {text(why, 80)}" for name, why in list(broken.items())[:3])
            found.append(f"{several(len(broken), 'broken image')} replaced by others: {some}")
        dropped = self.summary.get("dropped_annotations")
        if isinstance(dropped, list):
            found += [text(line) for line in dropped[:5]]
        commit = self.summary.get("git_commit") or self.env.get("git_commit")
        if isinstance(commit, str) and commit.endswith("+"):
            found.append("the code had changes that were not committed")
        return found

    def _strange_figures(self) -> Iterator[str]:
        stored = self.summary.get("figures")
        if stored is not None and not isinstance(stored, dict):
            yield "summary.json: figures: expected figures by name"
            return
        strange = [key for key, value in (stored or {}).items() if value is not None and number(value) is None]
        if strange:
            some = ", ".join(text(key, 60) for key in strange[:5])
            yield f"summary.json: not a finite number, and shown as undefined: {some}"


def in_order(runs: Sequence[Run]) -> list[Run]:
    """Runs by stage, within a stage as they were given."""
    return sorted(runs, key=lambda run: ORDER.index(run.kind))


def maker_of(run: Run, runs: Sequence[Run]) -> Run | None:
    """Of these the run whose exported weights `run` started from, by the paths that both were given."""
    source = PurePath(run.source)
    for maker in runs:
        out = maker.config.get("out")
        if not run.source or maker is run or maker.kind == "robust":
            continue
        if isinstance(out, str) and source.parent == PurePath(out):
            return maker
        if source.is_absolute() and source.parent == PurePath(maker.path.resolve()):
            return maker
    return None


def method_of(run: Run) -> str:
    """The method of a pretraining run as `rcmae compare` names it."""
    method = str(run.config.get("method"))
    return "rc_mae_own_mask" if method == "rc_mae" and run.given("teacher.mask") == "own" else method


@dataclass(frozen=True)
class Inputs:
    """What a report is made of; `notes` say what was given and is not in it."""

    runs: Sequence[Run]
    comparisons: Sequence[Sequence[Json]] = ()  # curves of `rcmae compare` whose runs are no longer there
    notes: Sequence[str] = ()


def find_runs(paths: Sequence[Path], most: int) -> Inputs:
    """The runs of the folders that a user named: run directories, or folders directly above some.

    Args:
        most: further runs are left out, and named in the notes.
    Raises: ConfigError where a folder is not there or holds no run.
    """
    folders: list[Path] = []
    comparisons: list[list[Json]] = []
    for path in paths:
        found = _runs_at(path)
        curves = [] if found else _comparison_at(path)
        if not found and not curves:
            raise ConfigError(f"{shown(path)}: holds no run; give run directories, or a folder directly above some")
        folders += found
        comparisons += [curves] if curves else []
    where = [folder.resolve() for folder in folders]
    unlike = [folder for i, folder in enumerate(folders) if where[i] not in where[:i]]
    notes = []
    if len(unlike) > most:
        left = ", ".join(text(folder.name, 60) for folder in unlike[most : most + 20])
        notes.append(f"{several(len(unlike) - most, 'run')} left out, more than a report of {most} holds: {left}")
    return Inputs(_named([read_run(folder) for folder in unlike[:most]]), comparisons, notes)


def _runs_at(path: Path) -> list[Path]:
    try:
        if not path.is_dir():
            raise ConfigError(f"{shown(path)}: no such folder; give run directories")
        if any((path / sign).is_file() for sign in _SIGNS):
            return [path]
        inside = [entry for entry in sorted(path.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as error:
        raise ConfigError(f"{shown(path)}: {error.strerror}; give run directories") from None
    return [entry for entry in inside if any((entry / sign).is_file() for sign in _SIGNS)]


def _comparison_at(path: Path) -> list[Json]:
    return read_list(path / COMPARISON)[0]


def read_run(path: Path) -> Run:
    """Everything that a run directory holds, as far as it can be read. Never raises for what it holds."""
    read: dict[str, tuple[Json, str]] = {
        "config.yaml": read_config(path / "config.yaml"),
        **{name: read_json(path / name) for name in ("env.json", "summary.json", "results.json")},
    }
    config = read["config.yaml"][0]
    rows, row_fault = read_rows(path / "metrics.jsonl")
    kind = _kind_of(path, config)
    faults = {name: fault for name, (_, fault) in read.items()} | {"metrics.jsonl": row_fault}
    expected = _FILES[kind]
    if kind == "classify" and config.get("protocol") == "knn":
        expected = ("config.yaml", "env.json", "summary.json")
    summary = read["summary.json"][0]
    if summary.get("status") == "done" and kind in {"classify", "detect", "segment"} and "images_seen" not in summary:
        expected = tuple(name for name in expected if name != "metrics.jsonl")  # nothing was trained
    cells: list[Json] = []
    if kind == "robust" and read["results.json"][1]:
        cells, faults["cells/"] = read_cells(path / "cells")
        expected = (*expected, "cells/")
    return Run(
        path=path,
        name=shown(_name(path), MAX_NAME),
        kind=kind,
        config=config,
        env=read["env.json"][0],
        summary=read["summary.json"][0],
        results=read["results.json"][0],
        rows=rows,
        log=read_log(path / ("robust.log" if kind == "robust" else "train.log")),
        manifest=newest_manifest(path),
        exported=exported_config(path),
        cells=cells,
        pictures=read_pictures(path / "pictures"),
        faults={name: faults[name] for name in expected if faults[name]},
    )


def _name(path: Path) -> str:
    return path.name if path.name not in {"", ".."} else path.resolve().name


def _kind_of(path: Path, config: Json) -> Kind:
    for key, kind in _MARKS.items():
        if key in config:
            return kind
    for folder, kind in _FOLDERS.items():  # the configuration is damaged
        if (path / folder).is_dir():
            return kind
    return "unknown"


def _named(runs: Sequence[Run]) -> list[Run]:
    """The runs with names that tell them apart: with the folder above where two are called the same."""
    names = [run.name for run in runs]
    doubled = {name for name in names if names.count(name) > 1}
    named: list[Run] = []
    used: set[str] = set()
    for run in runs:
        name = run.name
        if name in doubled:
            name = f"{shown(run.path.resolve().parent.name, MAX_NAME // 2)}/{run.name}"
        tries = 2
        while name in used:
            name = f"{run.name} ({tries})"
            tries += 1
        used.add(name)
        named.append(replace(run, name=name))
    return named


def inside(tree: Any, *keys: str) -> Any:
    """A value inside nested tables; None where any of them is missing or something else."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
