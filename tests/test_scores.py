"""Scores of robustness benchmarks: formulas on hand-made tables, published vectors, and what is refused."""

import numpy as np
import pytest

from robustness.corruptions.apply import BENCHMARK, EXTRA, SEVERITIES
from robustness.scores import (
    ALEXNET_CLEAN_ERROR,
    ALEXNET_ERRORS,
    aurra,
    corruption_degradation,
    corruption_error,
    group_means,
    mad_calibration_error,
    mce,
    mpc,
    relative_corruption_degradation,
    relative_corruption_error,
    relative_mce,
    rms_calibration_error,
    rpc_pct,
    severity_means,
    soft_f1,
)

IMAGENET = {"classes": [f"n{i:08d}" for i in range(1000)], "img_size": (224, 224)}
ALEXNET = {name: dict(zip(SEVERITIES, row, strict=True)) for name, row in ALEXNET_ERRORS.items()}
# Means of the table as published, to six digits.
ALEXNET_MEANS = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500, "speckle_noise": 0.845388, "gaussian_blur": 0.787108,
    "spatter": 0.717512, "saturate": 0.658248,
}  # fmt: skip


def without(grid: dict[str, dict[int, float]], name: str, severity: int | None = None) -> dict[str, dict[int, float]]:
    return {
        c: {s: v for s, v in row.items() if (c, s) != (name, severity)}
        for c, row in grid.items()
        if severity is not None or c != name
    }


# --- mCE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALEXNET_MEANS)
def test_alexnet_means(name: str) -> None:
    assert np.mean(ALEXNET_ERRORS[name]) == pytest.approx(ALEXNET_MEANS[name], abs=1e-9)


def test_alexnet_mean_over_the_benchmark() -> None:
    assert len(BENCHMARK) == 15 and len(ALEXNET_ERRORS) == 19 and not set(BENCHMARK) & set(EXTRA)
    assert np.mean([ALEXNET_ERRORS[name] for name in BENCHMARK]) == pytest.approx(0.788993, abs=5e-7)


def test_alexnet_itself_has_100() -> None:
    assert mce(ALEXNET, **IMAGENET) == pytest.approx(100, abs=1e-12)
    assert relative_mce(ALEXNET, ALEXNET_CLEAN_ERROR, **IMAGENET) == pytest.approx(100, abs=1e-12)


def test_corruption_error_is_a_ratio_of_sums() -> None:
    errors = {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4, 5: 0.9}
    assert corruption_error("fog", errors) == pytest.approx(1.9 / (5 * 0.819324), abs=1e-12)
    of_ratios = np.mean([errors[s] / ALEXNET["fog"][s] for s in SEVERITIES])
    assert abs(corruption_error("fog", errors) - of_ratios) > 0.01
    assert relative_corruption_error("fog", errors, 0.1) == pytest.approx(1.4 / (5 * (0.819324 - 0.43478)), abs=1e-12)


def test_mce_of_a_table_made_by_hand() -> None:
    grid = {name: dict.fromkeys(SEVERITIES, 0.5) for name in (*BENCHMARK, *EXTRA)}
    grid["snow"] = {1: 0.0, 2: 0.1, 3: 0.2, 4: 0.3, 5: 0.4}
    others = [0.5 / ALEXNET_MEANS[name] for name in BENCHMARK if name != "snow"]
    assert mce(grid, **IMAGENET) == pytest.approx(100 * (sum(others) + 0.2 / 0.866816) / 15, abs=1e-9)
    others = [0.25 / (ALEXNET_MEANS[name] - 0.43478) for name in BENCHMARK if name != "snow"]
    expected = 100 * (sum(others) - 0.05 / (0.866816 - 0.43478)) / 15
    assert relative_mce(grid, 0.25, **IMAGENET) == pytest.approx(expected, abs=1e-9)


def test_the_four_extra_corruptions_do_not_count() -> None:
    worse = {**ALEXNET, **{name: dict.fromkeys(SEVERITIES, 1.0) for name in EXTRA}}
    assert mce(worse, **IMAGENET) == pytest.approx(100, abs=1e-12)


@pytest.mark.parametrize(
    ("grid", "missing"),
    [
        (without(ALEXNET, "frost"), "frost 1, frost 2, frost 3 and 2 more"),
        (without(ALEXNET, "fog", 4), "fog 4"),
        ({}, "gaussian_noise 1, gaussian_noise 2, gaussian_noise 3 and 72 more"),
    ],
)
def test_never_averaged_over_less(grid: dict[str, dict[int, float]], missing: str) -> None:
    for figure in (
        lambda: mce(grid, **IMAGENET),
        lambda: relative_mce(grid, 0.2, **IMAGENET),
        lambda: mpc(grid),
        lambda: rpc_pct(grid, 0.5),
    ):
        with pytest.raises(ValueError, match=f"needs all 15 corruptions at severities 1 to 5; missing {missing}$"):
            figure()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"classes": IMAGENET["classes"][:999]}, "the classifier has 999"),
        ({"classes": ["airplane", "automobile"]}, "the classifier has 2"),
        ({"img_size": (32, 32)}, "takes 32x32"),
        ({"img_size": (448, 448)}, "takes 448x448"),
    ],
)
def test_mce_is_refused_where_alexnet_is_no_yardstick(changed: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        mce(ALEXNET, **{**IMAGENET, **changed})
    with pytest.raises(ValueError, match=reason):
        relative_mce(ALEXNET, 0.2, **{**IMAGENET, **changed})


def test_means_over_groups_and_severities() -> None:
    grid = {name: {s: i + s / 10 for s in SEVERITIES} for i, name in enumerate((*BENCHMARK, *EXTRA))}
    expected = {"noise": 1.3, "blur": 4.8, "weather": 8.8, "digital": 12.8, "extra": 16.8}
    assert group_means(grid) == pytest.approx(expected)
    assert severity_means(grid) == pytest.approx({s: 9 + s / 10 for s in SEVERITIES})
    assert set(group_means(without(grid, "snow"))) == {"noise", "blur", "digital", "extra"}


# --- calibration ----------------------------------------------------------------------------------------------------


@pytest.fixture
def vector() -> tuple[np.ndarray, np.ndarray]:
    """Confidences and correctness of spec section 3."""
    i = np.arange(1050)
    confidence = ((617 * i % 1051) + 1) / 1052
    return confidence, ((389 * i % 1000) / 1000 < 0.6 * confidence).astype(np.int64)


def test_calibration_vector(vector: tuple[np.ndarray, np.ndarray]) -> None:
    assert vector[1].mean() == pytest.approx(0.305714285714, abs=1e-12)
    assert rms_calibration_error(*vector, official=True) == pytest.approx(0.176779353519016, abs=1e-12)
    assert rms_calibration_error(*vector, official=False) == pytest.approx(0.228144263880113, abs=1e-12)
    assert mad_calibration_error(*vector, official=True) == pytest.approx(0.140239000543183, abs=1e-12)
    assert mad_calibration_error(*vector, official=False) == pytest.approx(0.194748325185588, abs=1e-12)
    assert aurra(*vector) == pytest.approx(0.453568575978214, abs=1e-12)
    assert soft_f1(*vector) == pytest.approx(0.663333123597, abs=1e-12)


def test_the_order_of_the_samples_does_not_matter(vector: tuple[np.ndarray, np.ndarray]) -> None:
    shuffled = np.random.default_rng(0).permutation(len(vector[0]))
    for figure in (aurra, soft_f1, lambda a, b: rms_calibration_error(a, b, official=True)):
        assert figure(vector[0][shuffled], vector[1][shuffled]) == pytest.approx(figure(*vector), abs=1e-12)


def test_ties_are_taken_in_the_order_of_the_samples() -> None:
    confidence = np.full(4, 0.5)
    assert aurra(confidence, np.array([1, 0, 0, 0])) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert aurra(confidence, np.array([0, 0, 0, 1])) == pytest.approx(1 / 4 / 4)


@pytest.mark.parametrize(("total", "bins"), [(1, [1]), (99, [99]), (100, [100]), (199, [199]), (200, [100, 100])])
def test_what_fills_no_bin_goes_to_the_last(total: int, bins: list[int]) -> None:
    confidence = np.linspace(0.1, 0.9, total)
    starts = np.cumsum([0, *bins[:-1]])
    gaps = [confidence[a : a + n].mean() for a, n in zip(starts, bins, strict=True)]  # nothing is correct
    expected = sum(n / total * gap for n, gap in zip(bins, gaps, strict=True))
    assert mad_calibration_error(confidence, np.zeros(total), official=False) == pytest.approx(expected, abs=1e-12)
    if len(bins) == 1:
        with pytest.raises(ValueError, match=f"{total} samples fill one"):
            rms_calibration_error(confidence, np.zeros(total), official=True)


def test_calibration_of_nothing_is_refused() -> None:
    for figure in (aurra, soft_f1, lambda a, b: rms_calibration_error(a, b, official=False)):
        with pytest.raises(ValueError, match="must be"):
            figure(np.empty(0), np.empty(0))
        with pytest.raises(ValueError, match="must be"):
            figure(np.ones(3), np.ones(2))


# --- dense prediction -----------------------------------------------------------------------------------------------


def test_mpc_and_rpc() -> None:
    grid = {name: {s: 0.4 - s / 100 for s in SEVERITIES} for name in BENCHMARK}
    grid["fog"] = dict.fromkeys(SEVERITIES, 0.07)
    assert mpc(grid) == pytest.approx((14 * 0.37 + 0.07) / 15)
    assert mpc({**grid, "spatter": dict.fromkeys(SEVERITIES, 9.0)}) == mpc(grid)
    assert rpc_pct(grid, 0.5) == pytest.approx(200 * (14 * 0.37 + 0.07) / 15)
    with pytest.raises(ValueError, match="clean performance"):
        rpc_pct(grid, 0.0)


def test_corruption_degradation() -> None:
    ours, theirs = {1: 0.6, 2: 0.4}, {1: 0.5, 2: 0.1}
    assert corruption_degradation(ours, theirs) == pytest.approx(1.0 / 1.4)
    assert relative_corruption_degradation(ours, 0.7, theirs, 0.8) == pytest.approx(0.4 / 1.0)
    with pytest.raises(ValueError, match="severities"):
        corruption_degradation(ours, {1: 0.5})
    with pytest.raises(ValueError, match="loses nothing"):
        corruption_degradation(ours, {1: 1.0, 2: 1.0})
