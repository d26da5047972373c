"""mPC, rPC, CD and rCD of made-up grids, by hand; what is refused of less; published rows; the heat map."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from PIL import Image

from robustness.corruptions.apply import BENCHMARK, NAMES, SEVERITIES
from robustness.dense import DenseModel
from robustness.grid import Cell
from robustness.published import PUBLISHED_COCO
from robustness.reference import Reference
from robustness.report import draw_heat_map, markdown
from robustness.results import set_results
from transfer.detection.coco_names import COCO_NAMES

UNITS = {"detector": ("box_ap", "mask_ap"), "segmentor": ("miou_pct",)}


def fake(kind: str, classes: tuple[str, ...] = ("a", "b")) -> DenseModel:
    return DenseModel(kind, "fake", "0" * 12, classes, (32, 32), "fp32", UNITS[kind], "fake")  # type: ignore[arg-type]


def cells_of(
    clean: Mapping[str, float], values: Callable[[str, int], Mapping[str, float]], names: tuple[str, ...] = BENCHMARK,
    severities: tuple[int, ...] = SEVERITIES, **flags: object,
) -> list[tuple[Cell, dict]]:  # fmt: skip
    """A clean cell and a grid of what `values` says of a corruption and severity."""
    flags = {
        "images": 5000, "of": 5000, "subset": False, "masked": False, "img_size": "32x32", "device": "cpu",
        "precision": "fp32", "transform": "model", "definition": "imagecorruptions", "corrupt": "decoded",
        "jpeg_step": False, "draws": "cpu", "seed": 0, **flags,
    }  # fmt: skip
    content = {"images": flags["images"], "flags": flags}
    return [
        (Cell("corruptions", "clean", 0, {}), {"figures": dict(clean), **content}),
        *(
            (Cell("corruptions", name, s, {}), {"figures": dict(values(name, s)), **content})
            for name in names
            for s in severities
        ),
    ]


def falling(name: str, severity: int) -> dict[str, float]:
    """0.40, 0.38, ... of the first corruption; a hundredth less of each further one; masks 0.05 lower."""
    box = 0.42 - 0.02 * severity - 0.01 * NAMES.index(name)
    return {"box_ap": box, "mask_ap": box - 0.05, "box_ap50": 0.9}


def test_mpc_and_rpc_of_boxes_and_masks_by_hand() -> None:
    found = set_results(cells_of({"box_ap": 0.5, "mask_ap": 0.4}, falling), fake("detector"))["corruptions"]
    # Severities 1 to 5 of corruption k have the mean 0.36 - k / 100; k = 0 to 14 has the mean 7.
    assert found.figures["box_mpc_pct"] == pytest.approx(29)
    assert found.figures["box_rpc_pct"] == pytest.approx(58)
    assert found.figures["mask_mpc_pct"] == pytest.approx(24)
    assert found.figures["mask_rpc_pct"] == pytest.approx(60)
    assert found.figures["fog/box_ap"] == pytest.approx(0.36 - 0.09)
    assert found.figures["noise/mask_ap"] == pytest.approx(0.36 - 0.01 - 0.05)
    assert found.figures["severity_5/box_ap"] == pytest.approx(0.32 - 0.07)
    assert not found.refused and not any(key.startswith("part_") for key in found.figures)


def test_the_four_extra_corruptions_are_no_part_of_mpc() -> None:
    cells = cells_of({"box_ap": 0.5, "mask_ap": 0.4}, falling, NAMES)
    assert set_results(cells, fake("detector"))["corruptions"].figures["box_mpc_pct"] == pytest.approx(29)


@pytest.mark.parametrize(
    ("changes", "why", "mean"),
    [
        ({"severities": (1, 3, 5)}, "needs all 15 corruptions at severities 1 to 5; missing gaussian_noise 2", 0.29),
        ({"names": BENCHMARK[:3]}, "missing defocus_blur 1, defocus_blur 2, defocus_blur 3 and 57 more", 0.35),
        ({"images": 500, "subset": True}, "needs all 5000 images, and 500 were evaluated", 0.29),
    ],
)
def test_mpc_is_refused_of_less(changes: dict, why: str, mean: float) -> None:
    found = set_results(cells_of({"box_ap": 0.5, "mask_ap": 0.4}, falling, **changes), fake("detector"))["corruptions"]
    assert why in found.refused["box_mpc_pct"] and why in found.refused["mask_mpc_pct"]
    assert not any("mpc" in key or "rpc" in key for key in found.figures)
    assert found.figures["part_mean_box_ap"] == pytest.approx(mean)
    assert found.figures["part_box_relative_pct"] == pytest.approx(100 * mean / 0.5)
    text = markdown("x", [], {"corruptions": found})
    assert f"mean box AP % over these cells; this is not mPC: **{100 * mean:.2f}**" in text
    assert f"corruptions/box_mpc_pct: not given, {found.refused['box_mpc_pct']}" in text and "mPC %:" not in text


def test_a_detector_that_finds_nothing_has_no_rpc() -> None:
    cells = cells_of({"box_ap": 0.0, "mask_ap": 0.0}, lambda name, severity: {"box_ap": 0.0, "mask_ap": 0.0})
    found = set_results(cells, fake("detector"))["corruptions"]
    assert found.figures["box_mpc_pct"] == 0 and "box_rpc_pct" not in found.figures
    assert found.refused["box_rpc_pct"] == "is relative to the clean figure, which is 0"


def reference(clean: float, value: Callable[[str, int], float]) -> Reference:
    return Reference("ref.json", "1" * 12, clean, {name: {s: value(name, s) for s in SEVERITIES} for name in NAMES})


def test_degradation_of_a_segmentor_by_hand() -> None:
    cells = cells_of({"miou_pct": 60.0}, lambda name, severity: {"miou_pct": 60 - 4 * severity})
    theirs = reference(50.0, lambda name, severity: 50 - 8 * severity if name == "fog" else 40 - 2 * severity)
    figures = set_results(cells, fake("segmentor"), theirs)["corruptions"].figures
    # Ours at 1 to 5: 56, 52, 48, 44, 40, of which 1 - mIoU has the sum 2.6, and what is lost of 60 the sum 0.6.
    # Theirs of fog: 42, 34, 26, 18, 10: 3.7 and 1.2; of the others: 38, 36, 34, 32, 30: 3.3 and 0.8.
    assert figures["mpc_pct"] == pytest.approx(48) and figures["rpc_pct"] == pytest.approx(80)
    assert figures["fog/cd_pct"] == pytest.approx(100 * 2.6 / 3.7)
    assert figures["fog/rcd_pct"] == pytest.approx(50)
    assert figures["snow/cd_pct"] == pytest.approx(100 * 2.6 / 3.3)
    assert figures["snow/rcd_pct"] == pytest.approx(75)
    assert figures["mean_cd_pct"] == pytest.approx(100 * (2.6 / 3.7 + 14 * 2.6 / 3.3) / 15)
    assert figures["mean_rcd_pct"] == pytest.approx((50 + 14 * 75) / 15)


def test_degradation_of_less_has_another_name() -> None:
    cells = cells_of({"miou_pct": 60.0}, lambda name, severity: {"miou_pct": 60 - 4 * severity}, ("fog",), (1, 5))
    theirs = reference(50.0, lambda name, severity: 50 - 8 * severity)
    found = set_results(cells, fake("segmentor"), theirs)["corruptions"]
    assert found.figures["fog/part_cd_pct"] == pytest.approx(100 * (0.44 + 0.6) / (0.58 + 0.9))
    assert found.figures["fog/part_rcd_pct"] == pytest.approx(100 * 24 / 48)
    assert found.figures["part_mean_cd_pct"] == found.figures["fog/part_cd_pct"]
    assert "missing gaussian_noise 1" in found.refused["mean_cd_pct"] and "fog/cd_pct" not in found.figures
    text = markdown("x", [], {"corruptions": found})
    assert "| CD % of these cells | rCD % of these cells |" in text and "| fog | weather |" in text


def test_a_reference_that_loses_nothing() -> None:
    cells = cells_of({"miou_pct": 60.0}, lambda name, severity: {"miou_pct": 50.0})
    theirs = reference(50.0, lambda name, severity: 60.0 if name == "fog" else 40.0)
    found = set_results(cells, fake("segmentor"), theirs)["corruptions"]
    assert "the reference loses nothing" in found.refused["fog/rcd_pct"] and "fog/cd_pct" in found.figures
    assert found.refused["mean_rcd_pct"] == "is not defined for each of the 15 corruptions"
    assert "mean_cd_pct" in found.figures


def test_published_detectors_stand_only_beside_the_same_protocol() -> None:
    clean = {"box_ap": 0.5, "mask_ap": 0.4}
    whole = set_results(cells_of(clean, falling), fake("detector", COCO_NAMES))
    text = markdown("mine", [], whole, COCO_NAMES)
    assert "| Mask R-CNN R50-FPN 1x | 37.3 | 18.7 | 50.1 | 34.2 | 16.8 | 49.1 | mmdetection docs" in text
    assert "| **mine** | **50.00** | **29.00** | **58.00** | **40.00** | **24.00** | **60.00** | this sweep |" in text
    assert all(row.model in text for row in PUBLISHED_COCO)
    others = [
        (cells_of(clean, falling), ("a", "b")),
        (cells_of(clean, falling, severities=(1, 3, 5)), COCO_NAMES),
        (cells_of(clean, falling, images=500, subset=True), COCO_NAMES),
        (cells_of(clean, falling, images=4999, of=4999), COCO_NAMES),
    ]
    for cells, classes in others:
        found = set_results(cells, fake("detector", classes))
        assert "R50-FPN" not in markdown("mine", [], found, classes)


def test_a_heat_map_of_two_units_has_two_panels(tmp_path: Path) -> None:
    found = set_results(cells_of({"box_ap": 0.5, "mask_ap": 0.4}, falling), fake("detector"))
    draw_heat_map(tmp_path / "two.png", "x", found)
    one = set_results(cells_of({"miou_pct": 60.0}, lambda name, s: {"miou_pct": 50.0 - s}), fake("segmentor"))
    draw_heat_map(tmp_path / "one.png", "x", one)
    widths = [Image.open(tmp_path / name).size[0] for name in ("two.png", "one.png")]
    assert widths[0] == pytest.approx(2 * widths[1], abs=2)
