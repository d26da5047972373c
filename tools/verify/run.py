"""`rcmae verify`: every component beside its reference, as a table."""

import importlib
import importlib.metadata
import importlib.util
import json
import time
import warnings
from functools import cache
from pathlib import Path

from core.errors import DataError, shown
from core.files import replace_file
from tools.reference_corruptions import load_package
from tools.verify.components import (
    COMPONENTS,
    CORRUPTIONS,
    DETECTRON2,
    MMSEG,
    PYCOCOTOOLS,
    STORED,
    TIMM,
    Component,
)
from tools.verify.golden import FOLDER
from tools.verify.measure import Measure, NotHere
from tools.verify.table import Row, Verdict, as_json, print_rows
from transfer.segmentation.mmseg_engine.operators import stand_in

MODULES = {  # to import, by the name of the package
    TIMM: "timm",
    PYCOCOTOOLS: "pycocotools.cocoeval",
    DETECTRON2: "detectron2.modeling",
    MMSEG: "mmseg.models",
}


def verify(json_file: Path | None = None) -> int:
    """Compare everything, print the table. Returns: the exit code, 1 if a component fails.

    Args:
        json_file: the rows as JSON besides.
    """
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages, on names that they import; what matters is in the table
        rows = [row_of(component, FOLDER) for component in COMPONENTS]
    print_rows(rows)
    for package in unusable():
        print(f"{package} is here and cannot be imported: its stored results were compared")
    failed = [row.component for row in rows if row.verdict == "fails"]
    comparisons = sum(row.count for row in rows)
    not_run = sum(row.verdict == "not run" for row in rows)
    said = f"fail: {', '.join(failed)}" if failed else f"all pass but {not_run} not run" if not_run else "all pass"
    print(f"{len(rows)} components, {comparisons} comparisons, {time.perf_counter() - started:.0f} s: {said}")
    if json_file:
        replace_file(json_file, (json.dumps([as_json(row) for row in rows], indent=1) + "\n").encode())
    return 1 if failed else 0


def row_of(component: Component, folder: Path) -> Row:
    """Compare one component: with the package where it can be imported, with stored results where not.

    Args:
        folder: of the golden files.
    """
    version = installed(component.against) if component.live else None
    live = version is not None
    check = component.live if live else component.stored
    assert check is not None, "packages without stored results are dependencies of this suite"
    measures: list[Measure] = []
    fault, missing = None, False
    try:
        for measure in check(folder):  # kept one by one: what was compared before a fault counts
            measures.append(measure)
    except NotHere as reason:
        fault, missing = str(reason), True
    except DataError as error:
        fault = str(error)
    except Exception as error:  # a component that breaks is a row that fails, and the others are still compared
        fault = f"{type(error).__name__}: {shown(str(error))}"
    worst = max(measures, key=lambda m: m.closeness, default=None)
    passes = fault is None and worst is not None and all(m.passes for m in measures)
    verdict: Verdict = "not run" if missing else "passes" if passes else "fails"
    number = version if live else STORED.get(component.against)
    against = f"{component.against} {number}" if number else component.against
    return Row(component.name, against, "live" if live else "stored", len(measures), worst, fault, verdict)


@cache
def installed(package: str) -> str | None:
    """Version of a package that can be imported; None where it cannot."""
    try:
        if package == CORRUPTIONS:
            load_package()
            return importlib.metadata.version(package)
        if package == MMSEG:
            stand_in()
        importlib.import_module(MODULES[package])
        return importlib.metadata.version(package)
    except Exception:  # whatever keeps a package from being imported; its stored results are at hand
        return None


def unusable() -> list[str]:
    """Reference engines that are here, and cannot be imported."""
    here = [one for one in (DETECTRON2, MMSEG) if importlib.util.find_spec(MODULES[one].partition(".")[0])]
    return [one for one in here if installed(one) is None]
