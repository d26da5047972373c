"""Figures of robustness benchmarks as pure functions: mCE, calibration, AURRA, mPC and rPC, degradation of mIoU.

Errors, confidences and performances are fractions in 0..1 unless a name ends in `_pct`. A grid of errors is a mapping
{corruption: {severity: top-1 error}}.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from robustness.corruptions.apply import BENCHMARK, GROUPS, SEVERITIES

Grid = Mapping[str, Mapping[int, float]]

CALIBRATION_BIN = 100  # samples

# Top-1 errors of AlexNet on the released ImageNet-C files, severities 1 to 5, and on clean images (torchvision's
# weights, 56.522 % top-1). Source: spec robustness section 1.2; the means are those of AugMix's evaluation.
ALEXNET_CLEAN_ERROR = 0.43478
ALEXNET_ERRORS = {
    "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
    "shot_noise": (0.71224, 0.85108, 0.93574, 0.98182, 0.99146),
    "impulse_noise": (0.78374, 0.89808, 0.94870, 0.98720, 0.99548),
    "defocus_blur": (0.65624, 0.73202, 0.85036, 0.91364, 0.94714),
    "glass_blur": (0.64308, 0.75054, 0.88806, 0.91622, 0.93344),
    "motion_blur": (0.58430, 0.70048, 0.82108, 0.89750, 0.92638),
    "zoom_blur": (0.70008, 0.76992, 0.80784, 0.84198, 0.87198),
    "snow": (0.71726, 0.88392, 0.86468, 0.91870, 0.94952),
    "frost": (0.61390, 0.79734, 0.88790, 0.89942, 0.93430),
    "fog": (0.67474, 0.76050, 0.84378, 0.87260, 0.94500),
    "brightness": (0.45140, 0.48502, 0.54048, 0.62166, 0.72440),
    "contrast": (0.64548, 0.76150, 0.88874, 0.97760, 0.99270),
    "elastic_transform": (0.52596, 0.70116, 0.55686, 0.64076, 0.80554),
    "pixelate": (0.52218, 0.54620, 0.73728, 0.87092, 0.91262),
    "jpeg_compression": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
    "speckle_noise": (0.66192, 0.74440, 0.90246, 0.94548, 0.97268),
    "gaussian_blur": (0.54732, 0.70444, 0.82574, 0.89864, 0.95940),
    "spatter": (0.47196, 0.62194, 0.75052, 0.84132, 0.90182),
    "saturate": (0.59342, 0.65514, 0.51174, 0.70834, 0.82260),
}


def mce(errors: Grid, *, classes: Sequence[str], img_size: tuple[int, int]) -> float:
    """Mean corruption error in percent: errors over AlexNet's, averaged over the 15 benchmark corruptions.

    Args:
        errors: all 15 corruptions at all 5 severities; more are not looked at.
        classes: class names of the classifier, img_size: (height, width) of its input: AlexNet's errors are those of
            ImageNet at 224 px.
    Returns: 100 * mean over c of CE_c; 100 is AlexNet, lower is better.
    Raises: ValueError if part of the grid is missing, or the classes or the size are others.
    Source: Hendrycks and Dietterich, ICLR 2019 (arXiv:1903.12261); spec robustness section 1.1.
    """
    require_imagenet_224(classes, img_size)
    require_benchmark(errors)
    return 100 * float(np.mean([corruption_error(name, errors[name]) for name in BENCHMARK]))


def relative_mce(errors: Grid, clean_error: float, *, classes: Sequence[str], img_size: tuple[int, int]) -> float:
    """As `mce`, of what corruption adds to the clean error: 100 * mean over c of relative CE_c."""
    require_imagenet_224(classes, img_size)
    require_benchmark(errors)
    return 100 * float(np.mean([relative_corruption_error(name, errors[name], clean_error) for name in BENCHMARK]))


def corruption_error(name: str, errors: Mapping[int, float]) -> float:
    """CE_c: sum of a corruption's errors over the severities, over AlexNet's sum (a ratio of sums)."""
    return sum(errors[severity] for severity in SEVERITIES) / sum(ALEXNET_ERRORS[name])


def relative_corruption_error(name: str, errors: Mapping[int, float], clean_error: float) -> float:
    """Relative CE_c: the same with the clean error taken off each term, above and below."""
    added = sum(errors[severity] - clean_error for severity in SEVERITIES)
    return added / sum(error - ALEXNET_CLEAN_ERROR for error in ALEXNET_ERRORS[name])


def require_benchmark(errors: Grid) -> None:
    """Raise ValueError unless all 15 corruptions are there at all 5 severities: means over fewer are other figures."""
    missing = [f"{name} {s}" for name in BENCHMARK for s in SEVERITIES if s not in errors.get(name, {})]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"needs all 15 corruptions at severities 1 to 5; missing {', '.join(missing[:3])}{more}")


def require_imagenet_224(classes: Sequence[str], img_size: tuple[int, int]) -> None:
    """Raise ValueError where AlexNet's errors are no yardstick."""
    if len(classes) != 1000 or not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        raise ValueError(f"AlexNet's errors are those of ImageNet's 1000 classes; the classifier has {len(classes)}")
    if tuple(img_size) != (224, 224):
        raise ValueError(
            f"AlexNet's errors are those at 224 x 224 px; the classifier takes {img_size[0]}x{img_size[1]}"
        )


def group_means(values: Grid) -> dict[str, float]:
    """Mean over corruptions and severities of each group of which every corruption is there."""
    whole = {group: names for group, names in GROUPS.items() if set(names) <= set(values)}
    return {group: float(np.mean([v for c in names for v in values[c].values()])) for group, names in whole.items()}


def severity_means(values: Grid) -> dict[int, float]:
    """Mean over the corruptions at each severity."""
    severities = sorted({severity for row in values.values() for severity in row})
    return {s: float(np.mean([row[s] for row in values.values() if s in row])) for s in severities}


def rms_calibration_error(confidence: np.ndarray, correct: np.ndarray, *, official: bool) -> float:
    """Root mean square difference of confidence and accuracy over bins of 100 samples of similar confidence.

    Args:
        confidence: [N] in 0..1, of the predicted class; correct: [N] 0 or 1.
        official: as the published code, whose loop leaves the last, most confident bin out of the sum though not out
            of N; False is what was meant.
    Returns: 0..1.
    Raises: ValueError without samples, or with `official` where there is but one bin.
    Source: hendrycks/natural-adv-examples, calibration_tools.py; ties are sorted stably here.
    """
    shares, gaps = _calibration_gaps(confidence, correct, official)
    return float(np.sqrt(np.sum(shares * gaps**2)))


def mad_calibration_error(confidence: np.ndarray, correct: np.ndarray, *, official: bool) -> float:
    """As `rms_calibration_error`, the mean absolute difference."""
    shares, gaps = _calibration_gaps(confidence, correct, official)
    return float(np.sum(shares * np.abs(gaps)))


def _calibration_gaps(confidence: np.ndarray, correct: np.ndarray, official: bool) -> tuple[np.ndarray, np.ndarray]:
    """Share of the samples and mean confidence minus accuracy of each bin, by ascending confidence."""
    confidence, correct = _checked(confidence, correct)
    total = len(confidence)
    edges = [*range(0, total - CALIBRATION_BIN + 1, CALIBRATION_BIN), total]  # the last bin takes what is left over
    edges = edges if len(edges) > 1 else [0, total]
    bins = list(pairwise(edges))
    if official:
        bins = bins[:-1]
        if not bins:
            raise ValueError(f"the official calibration error skips the last of its bins, and {total} samples fill one")
    order = np.argsort(confidence, kind="stable")
    gaps = [np.mean(confidence[order[a:b]]) - np.mean(correct[order[a:b]]) for a, b in bins]
    return np.array([(b - a) / total for a, b in bins]), np.array(gaps)


def aurra(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Area under the curve of accuracy over response rate, the most confident samples answering first.

    Args: as `rms_calibration_error`. Returns: 0..1, higher is better.
    Source: Hendrycks et al., CVPR 2021 (arXiv:1907.07174); spec robustness section 3.
    """
    confidence, correct = _checked(confidence, correct)
    ranked = correct[np.argsort(-confidence, kind="stable")]
    return float(np.mean(np.cumsum(ranked) / np.arange(1, len(ranked) + 1)))


def soft_f1(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Soft F1 score of finding wrong answers by low confidence: 2 sum(uw) / sum(u + w), u = 1 - confidence, w wrong.

    Source: hendrycks/natural-adv-examples, calibration_tools.py.
    """
    confidence, correct = _checked(confidence, correct)
    unsure, wrong = 1 - confidence, 1 - correct
    return float(2 * np.sum(unsure * wrong) / np.sum(unsure + wrong))


def _checked(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if confidence.shape != correct.shape or confidence.ndim != 1 or not len(confidence):
        raise ValueError(f"confidence {confidence.shape} and correct {correct.shape} must be [N], N > 0")
    return confidence.astype(np.float64), correct.astype(np.float64)


def mpc(performance: Grid) -> float:
    """Mean performance under corruption: over the 15 benchmark corruptions and 5 severities, in the metric's unit.

    Raises: ValueError if part of the grid is missing.
    Source: Michaelis et al. 2019 (arXiv:1907.07484); spec robustness section 6.
    """
    require_benchmark(performance)
    return float(np.mean([performance[name][severity] for name in BENCHMARK for severity in SEVERITIES]))


def rpc_pct(performance: Grid, clean: float) -> float:
    """Relative performance under corruption, mPC over the clean performance, in percent. Source: as `mpc`."""
    if clean <= 0:
        raise ValueError(f"rPC is relative to the clean performance, which is {clean:g}")
    return 100 * mpc(performance) / clean


def corruption_degradation(miou: Mapping[int, float], reference: Mapping[int, float]) -> float:
    """CD_c of segmentation: sum over severities of 1 - mIoU, over that of a reference model.

    Args: miou, reference: {severity: mIoU in 0..1} of one corruption, the same severities.
    Raises: ValueError for other severities, or a reference without any loss.
    Source: Kamann and Rother, CVPR 2020 (arXiv:1908.05005); spec robustness section 6.
    """
    return _ratio_of_losses(miou, reference, 1.0, 1.0)


def relative_corruption_degradation(
    miou: Mapping[int, float], clean: float, reference: Mapping[int, float], reference_clean: float
) -> float:
    """rCD_c: as CD_c, of what each model loses against its own clean mIoU."""
    return _ratio_of_losses(miou, reference, clean, reference_clean)


def _ratio_of_losses(
    miou: Mapping[int, float], reference: Mapping[int, float], top: float, reference_top: float
) -> float:
    if not miou or miou.keys() != reference.keys():
        raise ValueError(f"severities {sorted(miou)} and those of the reference {sorted(reference)} must be the same")
    lost = sum(reference_top - value for value in reference.values())
    if lost <= 0:
        raise ValueError("the reference loses nothing, so that nothing can be relative to it")
    return sum(top - value for value in miou.values()) / lost
