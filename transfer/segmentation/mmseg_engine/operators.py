"""A stand-in for mmcv's compiled operators, none of which UperNet on a ViT calls.

`import mmseg` imports `mmcv.ops`, and that asks for the extension `mmcv._ext`. mmcv-lite comes without it, and the
sources of 2.1.0 do not build against current PyTorch. So there is a module of that name whose operators exist, and say
when they are called that they do not. Where the real extension is installed it is left alone.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

from core.errors import ConfigError

EXTENSION = "mmcv._ext"


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*_: object, **__: object) -> NoReturn:
            raise ConfigError(
                f"{EXTENSION}.{name}: a compiled operator of mmcv, which is not installed here; install mmcv in place "
                "of mmcv-lite, or use a network without it"
            )

        return absent


def stand_in() -> None:
    """Give `mmcv` a module in place of its extension, unless it has one. Call this before mmseg is imported."""
    if EXTENSION not in sys.modules and importlib.util.find_spec(EXTENSION) is None:
        module = _StandIn(EXTENSION, "stand-in")
        module.__spec__ = ModuleSpec(EXTENSION, None)
        sys.modules[EXTENSION] = module
