"""`rcmae convert` of detectors: detectron2's ViTDet to a detector directory that finds the same, and back."""

import json
import pickle
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.coco_sets import small_set
from tests.test_convert_cli import convert, only_error
from tests.test_detection_model import tiny_detector
from tools.verify.detection_reference import batch_of
from tools.verify.golden import FOLDER, Golden, part, read_golden, read_json, unpacked
from transfer.detection.coco_names import COCO
from transfer.detection.detector import load_detector
from transfer.detection.detectron2_files import FROM_PICKLE
from transfer.detection.weights import to_detectron2


def theirs(kind: str) -> tuple[Golden, dict[str, Any]]:
    golden, meta = read_golden(FOLDER, f"detection_inference_{kind}")
    return golden, meta["config"]


def names_file(folder: Path, count: int) -> Path:
    """A COCO-format JSON with so many categories, their ids in falling order and with holes."""
    path = folder / "names.json"
    categories = [{"id": 10 * (i + 1), "name": f"kind {i}"} for i in reversed(range(count))]
    path.write_text(json.dumps({**small_set(), "categories": categories}))
    return path


@pytest.mark.parametrize("kind", ["mask_rcnn", "cascade"])
def test_a_converted_detector_finds_what_detectron2_finds(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    golden, config = theirs(kind)
    weights = {name: tensor.clone() for name, tensor in part(golden, "weight.").items()}
    source, out = tmp_path / "model_final.pth", tmp_path / "new" / "detector"
    torch.save({"model": {**weights, "pixel_mean": torch.zeros(3, 1, 1)}, "iteration": 5, "optimizer": {}}, source)
    assert convert(source, out, "--names-json", names_file(tmp_path, config["classes"])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(weights) + 2 and lines[-2:] == ["ignored  pixel_mean", f"written  {out}"]
    assert "backbone.net.pos_embed -> backbone.vit.pos_embed" in lines

    # What leaves no trace in weights is ViTDet's; the reference had fewer regions and detections.
    description = json.loads((out / "config.json").read_text())
    detector = description["rcmae"]["detector"]
    detector["rpn"]["post_nms_topk_test"] = config["post_nms_topk"][config["topk_order"].index("test")]
    detector["roi"]["detections_per_image"] = config["detections_per_image"]
    (out / "config.json").write_text(json.dumps(description))
    loaded = load_detector(out)
    assert loaded.side == config["image"] and loaded.category_ids == (10, 20, 30, 40, 50)
    assert loaded.names == tuple(f"kind {i}" for i in range(5))
    assert loaded.provenance["layout"] == "detectron2 ViTDet"
    images, sizes = batch_of(golden, config)
    for i, found in enumerate(loaded.model.detect(images, sizes, [tuple(size) for size in config["output_sizes"]])):
        expected = part(golden, f"expected.image{i}.")
        torch.testing.assert_close(found.boxes, expected["boxes"], atol=1e-2, rtol=0)
        torch.testing.assert_close(found.scores, expected["scores"], atol=5e-4, rtol=0)
        assert torch.equal(found.labels, expected["classes"])
        masks = unpacked(expected["masks_packed"], *config["output_sizes"][i])
        assert (found.masks != masks).float().mean() <= 1e-3

    back = tmp_path / "back.safetensors"
    assert convert(out, back) == 0
    assert f"written  {back}" in capsys.readouterr().out
    returned = load_file(back)
    assert returned.keys() == weights.keys() and all(torch.equal(returned[name], weights[name]) for name in weights)


def test_eighty_classes_are_those_of_coco() -> None:
    golden = read_json(FOLDER, "detection_coco_map")
    assert list(COCO.names) == golden["class_names"]
    assert {str(id_): label for label, id_ in enumerate(COCO.ids)} == golden["category_id_to_class"]


def test_a_pickle_is_refused_with_the_way_around(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "model_final.pkl", tmp_path / "weights.safetensors"
    state = {name: tensor.numpy() for name, tensor in to_detectron2(tiny_detector(False).state_dict())[0].items()}
    source.write_bytes(pickle.dumps({"model": state, "__author__": "someone"}))
    assert convert(source, tmp_path / "detector") == 4
    line = only_error(capsys)
    assert line.endswith(FROM_PICKLE) and "a pickle can run any code" in line
    command = shlex.split(FROM_PICKLE.replace("IN.pkl", str(source)).replace("OUT.safetensors", str(out)))
    subprocess.run([sys.executable, *command[1:]], check=True)
    found = load_file(out)
    assert found.keys() == state.keys() and all(np.array_equal(found[name], state[name]) for name in state)
    assert convert(out, tmp_path / "detector", "--names-json", names_file(tmp_path, 3)) == 0
    assert load_detector(tmp_path / "detector").model.roi.num_classes == 3


def test_refusals_are_one_line_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    state, names = to_detectron2(tiny_detector(False).state_dict())[0], names_file(folder, 3)
    states = {
        "whole": state,
        "missing": {name: tensor for name, tensor in state.items() if "anchor_deltas.bias" not in name},
        "unknown": {**state, "roi_heads.keypoint_head.weight": torch.ones(1)},
        "not_finite": {**state, "backbone.simfp_2.0.bias": torch.full((8,), torch.nan)},
        "no_tables": {name: tensor for name, tensor in state.items() if "rel_pos" not in name},
        "plain": {"blocks.0.norm1.weight": torch.ones(4)},
    }
    for name, content in states.items():
        save_file({key: tensor.contiguous() for key, tensor in content.items()}, folder / f"{name}.safetensors")
    (folder / "none.json").write_text("{}")
    for name, options, code, text in (
        ("whole", (), 4, "3 classes, COCO has 80; give the JSON that it was trained on as --names-json"),
        ("whole", ("--names-json", folder / "none.json"), 3, "categories are missing"),
        ("whole", ("--names-json", folder / "absent.json"), 3, "absent.json"),
        ("missing", ("--names-json", names), 4, "Missing key"),
        ("unknown", ("--names-json", names), 4, "no place for roi_heads.keypoint_head.weight"),
        ("not_finite", ("--names-json", names), 5, "holds non-finite values"),
        ("no_tables", ("--names-json", names), 4, "no weights of a Mask R-CNN"),
        ("plain", ("--names-json", names), 2, "--names-json: has no effect"),
    ):
        assert convert(folder / f"{name}.safetensors", tmp_path / "out", *options) == code, name
        assert text in only_error(capsys)
    assert convert(folder / "whole.safetensors", tmp_path / "detector", "--names-json", names) == 0
    capsys.readouterr()
    assert convert(tmp_path / "detector", tmp_path / "out") == 2
    assert "name it .safetensors" in only_error(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["detector", "in"]
