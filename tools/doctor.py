"""Looks at a data set before anything is trained on it: what is wrong, and what training will do with each fault.

Without a data set it looks at the installation: `tools/doctor_installation.py`.
"""

from collections.abc import Callable

from rich.console import Console
from rich.text import Text

from core.errors import ConfigError, DataError, shown
from tools.doctor_coco import examine_coco
from tools.doctor_installation import examine_installation
from tools.doctor_report import DoctorConfig, Report, print_report
from tools.doctor_segmentation import examine_segmentation
from transfer.detection.coco_file import LAYOUT, SPLITS, layout_text
from transfer.segmentation import pairs
from transfer.segmentation.labels import LabelKeys

EXAMINERS: dict[str, Callable[[DoctorConfig], list[Report]]] = {
    "coco": examine_coco,
    "segmentation": examine_segmentation,
}
OF_INSTALLATION = {"out", "cache", "loader"}  # keys of an examination without a data set
OF_LABELS = (*LabelKeys.model_fields, "train_labels", "val_labels", "out")  # keys that COCO's format has no use for


def doctor(config: DoctorConfig, console: Console | None = None) -> int:
    """Examine a data set, print what was found, and say whether it can be trained on; without one, the installation.

    Returns: 0 if it can, 3 if it cannot; of an installation see `examine_installation`.
    Raises: ConfigError or DataError where there is nothing to examine.
    """
    console = console or Console()
    if config.model_fields_set <= OF_INSTALLATION:
        return examine_installation(config, console)
    if "cache" in config.model_fields_set:
        raise ConfigError("cache: has no effect on the examination of a data set; leave it out")
    reports = EXAMINERS[_layout_of(config)](config)
    for report in reports:
        print_report(console, report)
    refused = any(report.refused for report in reports)
    verdict = (
        "training would refuse this data set; see the rows in red" if refused else "this data set can be trained on"
    )
    console.print(Text(verdict, style="bold red" if refused else "bold green"))
    return DataError.exit_code if refused else 0


def _layout_of(config: DoctorConfig) -> str:
    if config.train_json or config.val_json or _holds_coco(config):
        if odd := [key for key in OF_LABELS if key in config.model_fields_set]:
            raise ConfigError(f"{odd[0]}: has no effect on a set in COCO's format; leave it out")
        return "coco"
    if config.train_labels or config.val_labels:
        return "segmentation"
    if config.data is None:
        raise ConfigError("doctor: needs a data set for these keys, as in rcmae doctor data=ROOT")
    if pairs.layout_base(config.data):
        return "segmentation"
    raise DataError(
        f"{shown(config.data)}: no layout that doctor knows; expected {layout_text()}, or train_json=PATH; or "
        f"{pairs.LAYOUT}, or train_images=PATH train_labels=PATH"
    )


def _holds_coco(config: DoctorConfig) -> bool:
    return config.data is not None and any((config.data / LAYOUT[0].format(split=split)).is_file() for split in SPLITS)
