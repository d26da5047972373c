"""The imagecorruptions package as a clock: run by `rcmae bench corruptions` in an environment of the package's own.

    python reference_corruptions.py PHOTOGRAPHS.npy

Reads lines `NAME` and answers each with a JSON list: ms of CPU time per photograph at severities 1 to 5, the median of
the photographs. What the package needs on current NumPy, SciPy and skimage is supplied here (spec section 2.1).
"""

import importlib.util
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np


@cache
def load_package() -> Callable[..., np.ndarray]:
    """imagecorruptions.corrupt, after the names are supplied that have gone since it was written."""
    import cv2
    import scipy.ndimage
    import skimage.filters

    cv2.setNumThreads(1)
    gaussian = skimage.filters.gaussian

    def old_gaussian(image: np.ndarray, sigma: Any = 1, *, multichannel: bool = False, **options: Any) -> np.ndarray:
        return gaussian(image, sigma, channel_axis=-1 if multichannel else None, **options)

    found = importlib.util.find_spec("imagecorruptions")
    assert found is not None and found.origin is not None, "the environment was made with the package"
    root = Path(found.origin).parent
    resources, interpolation = types.ModuleType("pkg_resources"), types.ModuleType("scipy.ndimage.interpolation")
    setattr(resources, "resource_filename", lambda package, path: str(root / path))  # noqa: B010  mypy knows no such name
    setattr(interpolation, "map_coordinates", scipy.ndimage.map_coordinates)  # noqa: B010
    sys.modules |= {"pkg_resources": resources, "scipy.ndimage.interpolation": interpolation}
    skimage.filters.gaussian = old_gaussian
    np.float_ = np.float64  # type: ignore[attr-defined]
    import imagecorruptions

    return imagecorruptions.corrupt


def main() -> None:
    """Answer until the input ends."""
    corrupt, photographs = load_package(), np.load(sys.argv[1])
    for line in sys.stdin:
        name = line.strip()
        used = photographs[:1] if name == "glass_blur" else photographs  # a second each
        medians = []
        for severity in range(1, 6):
            seconds = []
            for photograph in used:
                begun = time.process_time()
                corrupt(photograph, severity=severity, corruption_name=name)
                seconds.append(time.process_time() - begun)
            medians.append(1000 * statistics.median(seconds))
        print(json.dumps(medians), flush=True)


if __name__ == "__main__":
    main()
