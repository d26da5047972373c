"""detectron2 as the other engine: equal losses, groups, rates and detections; runs from end to end, killed and resumed.

What needs no detectron2 is in test_detection_framework.py.
"""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("detectron2", reason="detectron2 is absent: the other engine of detection is not tested here")

from core.backbone_io import export_backbone
from core.checkpoint import read_checkpoint
from core.config import load_config
from core.distributed import Processes
from core.errors import ConfigError, DataError
from core.images import MAX_PIXELS
from core.loader import read_image
from core.log import read_metrics
from core.optim import layer_of
from core.task import Place
from core.vit import ViT, ViTConfig
from tests.coco_sets import small_set, write_set
from tests.harness import ForkServer, kill_after
from tests.tiny import tiny_detection
from tools.verify.detection_reference import fixed_permutation
from transfer.detection.coco import CocoSet
from transfer.detection.coco_eval import Figures, evaluate
from transfer.detection.coco_file import coco_paths, read_coco
from transfer.detection.data import Collate, Sample, normalized
from transfer.detection.detector import export_detector, load_detector
from transfer.detection.detectron2_engine.data import CocoRecords, mask_format, train_mapper
from transfer.detection.detectron2_engine.evaluate import evaluate_model, quiet
from transfer.detection.detectron2_engine.model import build_detectron2
from transfer.detection.detectron2_engine.run import Detectron2Task, multiplier, optimizer
from transfer.detection.jitter import Draws, JitterConfig, jitter
from transfer.detection.mask_rcnn import DetectorConfig, MaskRCNN, build_mask_rcnn
from transfer.detection.roi_heads import ROIHeadsConfig
from transfer.detection.rpn import RPNConfig
from transfer.detection.run import detect, evaluate_detector
from transfer.detection.settings import DetectConfig, parameter_groups, rate
from transfer.detection.tasks import CocoEvaluator
from transfer.detection.weights import to_detectron2

SIDE = 64
VIT = ViTConfig(
    img_size=(32, 32), patch_size=16, embed_dim=16, depth=4, num_heads=2, class_token=False, window_size=3,
    global_blocks=(1, 3), rel_pos_grid=(SIDE // 16, SIDE // 16),
)  # fmt: skip


def sizes(cascade: bool, num_classes: int = 10, **roi: Any) -> DetectorConfig:
    """Numbers all unlike detectron2's defaults."""
    return DetectorConfig(
        num_classes=num_classes,
        cascade=cascade,
        channels=8,
        rpn=RPNConfig(
            anchor_scale=6, aspect_ratios=(0.4, 1.5), num_convs=2, batch_size_per_image=48, positive_fraction=0.1,
            pre_nms_topk_train=90, pre_nms_topk_test=70, post_nms_topk_train=60, post_nms_topk_test=50,
            nms_threshold=0.75,
        ),
        roi=ROIHeadsConfig(
            **{"num_box_convs": 2, "box_fc_dim": 16, "num_mask_convs": 1, "batch_size_per_image": 24,
               "positive_fraction": 0.2, "score_threshold": 0.02, "nms_threshold": 0.45, "detections_per_image": 12,
               **roi},
        ),
    )  # fmt: skip


def native_detector(config: DetectorConfig, vit: ViTConfig = VIT) -> MaskRCNN:
    """A detector whose weights all count: none is zero, and none too small to tell."""
    model = build_mask_rcnn(ViT(vit), config)
    generator = torch.Generator().manual_seed(3)
    model.backbone.vit.init_weights(generator)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def theirs(native: MaskRCNN, config: DetectorConfig) -> Any:
    return build_detectron2(native.backbone.vit.config, config, SIDE, 0.0, native.state_dict())


@pytest.fixture(scope="module")
def drawn(coco: Path) -> CocoSet:
    """Scenes whose masks are run lengths."""
    return read_coco(coco_paths(coco, "train"))


@pytest.fixture(scope="module")
def outlined(tmp_path_factory: pytest.TempPathFactory) -> CocoSet:
    """Noise with polygons, some of two parts; one object is a crowd."""
    tree = small_set()
    for i, entry in enumerate(tree["annotations"]):
        low, high = 3.0 + 4 * i, 17.0 + 6 * i
        entry["segmentation"] = [[low, low, high, low + 2, high - 3, high], [30, 5, 55, 9, 41.5, 30.25, 33, 22]][
            : 1 + i % 2
        ]
    tree["annotations"][1]["iscrowd"] = 1
    root = write_set(tmp_path_factory.mktemp("outlined"), tree, draw=True)
    return read_coco(coco_paths(root, "train"))


def same_draws(coco: CocoSet, index: int) -> tuple[Sample, dict[str, Any]]:
    """One image jittered by either engine, with the same three draws."""
    config = JitterConfig(min_scale=0.6, max_scale=1.7)
    np.random.seed(index)
    record = train_mapper(coco, SIDE, config)(CocoRecords(coco)[index])
    draws = Draws(*np.random.RandomState(index).random_sample(3))
    image = read_image(coco.source(), index, 3, MAX_PIXELS)
    moved, targets = jitter(image, coco.objects(index), SIDE, config, draws)
    return Sample(moved, targets, coco.size(index), index), record


# ---- the same numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["drawn", "outlined"])
def test_the_same_draws_give_the_same_sample(kind: str, request: pytest.FixtureRequest) -> None:
    coco = request.getfixturevalue(kind)
    assert mask_format(coco) == {"drawn": "bitmask", "outlined": "polygon"}[kind]
    objects = 0
    for index in range(min(8, len(coco))):
        if not coco.num_learnable()[index]:
            continue
        ours, record = same_draws(coco, index)
        assert torch.equal(ours.image, record["image"])
        instances = record["instances"]
        assert torch.equal(ours.targets.boxes.float(), instances.gt_boxes.tensor.float())
        assert torch.equal(ours.targets.labels, instances.gt_classes)
        for mask, other in zip(ours.targets.masks, instances.gt_masks, strict=True):
            if kind == "drawn":
                assert torch.equal(mask, other)
            else:
                assert all(np.allclose(a, b, atol=1e-9) for a, b in zip(mask, other, strict=True))
        objects += len(instances)
    assert objects > (2 if kind == "outlined" else 8)


@pytest.mark.parametrize("kind", ["drawn", "outlined"])
@pytest.mark.parametrize("cascade", [False, True])
def test_losses_of_a_fixed_batch(
    kind: str, cascade: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    coco = request.getfixturevalue(kind)
    config = sizes(cascade, len(coco.names))
    native = native_detector(config)
    other = theirs(native, config).train()
    rows = np.flatnonzero(coco.num_learnable())[:3].tolist()
    samples, records = zip(*(same_draws(coco, index) for index in rows), strict=True)
    batch = Collate(SIDE)(samples)
    ours = native.losses(normalized(batch, torch.float32), batch.sizes, batch.targets, fixed_permutation)

    def permuted(n: int, device: Any = None) -> Tensor:
        return fixed_permutation(n)

    monkeypatch.setattr(torch, "randperm", permuted)
    with quiet():
        found = Detectron2Task(other, native, None).losses(list(records), Place(0, 0, 0))  # type: ignore[arg-type]
    assert found.keys() == ours.keys() and len(found) == (9 if cascade else 5)
    for name, value in ours.items():
        assert value > 1e-3, f"{name}: too small to compare"
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    gradients = [torch.autograd.grad(sum(losses.values()), list(model.parameters())) for losses, model in
                 ((ours, native), (found, other))]  # fmt: skip
    names = [[name for name, _ in model.named_parameters()] for model in (native, other)]
    expected = to_detectron2(dict(zip(names[0], gradients[0], strict=True)))[0]
    for name, gradient in zip(names[1], gradients[1], strict=True):
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("cascade", [False, True])
def test_detections_of_the_same_weights_have_the_same_precision(drawn: CocoSet, tmp_path: Path, cascade: bool) -> None:
    """Of a truth made from detections themselves, so that there is something to count."""
    config = sizes(cascade)
    native = native_detector(config).eval()
    evaluator = CocoEvaluator(drawn, SIDE, torch.device("cpu"), "fp32", 1, 0, 60, Processes())
    rows = evaluator(native)
    tree: dict[str, Any] = {
        "images": [
            {"id": i, "file_name": os.fsdecode(name), "height": drawn.size(i)[0], "width": drawn.size(i)[1]}
            for i, name in enumerate(drawn.file_names)
        ],
        "categories": [{"id": label, "name": name} for label, name in enumerate(drawn.names)],
        "annotations": [],
    }  # fmt: skip
    for number, row in enumerate(rows):
        x, y, w, h = row.xywh
        if number % 3 == 0 and w > 3 and h > 3:
            dx, dy = (number % 5 - 2) * 0.04 * w, (number % 7 - 3) * 0.03 * h
            outline = [x + dx, y + dy, x + dx + w, y + dy, x + dx + w, y + dy + h, x + dx, y + dy + h]
            box = {"bbox": [x + dx, y + dy, w, h], "area": w * h, "segmentation": [outline]}
            tree["annotations"].append(
                {"id": number + 1, "image_id": row.image, "category_id": row.label, "iscrowd": 0, **box}
            )
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(tree))
    coco = read_coco(coco_paths(None, "val", path, drawn.folder))
    ours = evaluate(coco, rows)
    with quiet():
        found = evaluate_model(theirs(native, config), coco, SIDE, torch.device("cpu"), "fp32", 0, tmp_path)
    assert ours["box_ap"] is not None and 0.05 < ours["box_ap"] < 0.95
    assert_same(found.figures, ours)
    assert_same(evaluate(coco, found.rows), found.figures)  # its evaluator and ours on the same rows
    assert [path.name for path in tmp_path.iterdir()] == ["truth.json"]


def assert_same(found: Figures, expected: Figures) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-3), name


def loaded(*overrides: str) -> DetectConfig:
    return load_config(DetectConfig, None, ["data=x", "out=y", "backbone=z", "framework=detectron2", *overrides])


@pytest.mark.parametrize("rule", ["vitdet", "vitdet_huge"])
@pytest.mark.parametrize("cascade", [False, True])
def test_parameter_groups(rule: str, cascade: bool) -> None:
    config = loaded("layer_decay=0.6", "weight_decay=0.07", f"decay_rule={rule}", "optim.beta2=0.98")
    numbers = sizes(cascade)
    native = native_detector(numbers)
    other = theirs(native, numbers)
    their_optimizer = optimizer(config, other, VIT.depth)
    expected = {
        id(parameter): (group["lr_scale"] * config.optim.lr, group["weight_decay"])
        for group in parameter_groups(config, native)
        for parameter in group["params"]
    }
    ours, _ = to_detectron2({name: torch.tensor(expected[id(p)]) for name, p in native.named_parameters()})
    names = {id(parameter): name for name, parameter in other.named_parameters()}
    seen = 0
    for group in their_optimizer.param_groups:
        assert group["betas"] == (0.9, 0.98) and group["eps"] == 1e-8
        for parameter in group["params"]:
            name = names[id(parameter)]
            torch.testing.assert_close(torch.tensor((group["lr"], group["weight_decay"])), ours[name], msg=name)
            seen += 1
    assert seen == len(ours) and layer_of("blocks.0.x", VIT.depth) == 1
    assert len({group["lr"] for group in their_optimizer.param_groups}) == VIT.depth + 2


@pytest.mark.parametrize(
    "overrides",
    [(), ("steps=138281", "warmup_steps=187.5", "decay_rule=vitdet_huge"), ("steps=6", "warmup_steps=2"),
     ("steps=160", "warmup_steps=20"), ("steps=90", "warmup_steps=0", "milestones=[40, 70, 71]"),
     ("steps=50", "warmup_steps=7", "milestones=[60]")],
)  # fmt: skip
def test_rates_over_the_whole_schedule(overrides: tuple[str, ...]) -> None:
    config = loaded(*overrides)
    ours, multiply = rate(config), multiplier(config)
    edges = [
        0,
        1,
        config.warmup_steps,
        config.steps - 1,
        *config.drops(),
        *range(0, config.steps, 1 + config.steps // 300),
    ]
    steps = {int(edge) + offset for edge in edges for offset in (-1, 0, 1)}
    for step in sorted(step for step in steps if 0 <= step < config.steps):
        assert multiply(step / config.steps) * config.optim.lr == pytest.approx(ours(step), rel=1e-9), step


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone of patches of 16 px."""
    vit = ViT(ViTConfig(img_size=(64, 64), patch_size=16, embed_dim=16, depth=2, num_heads=2))
    vit.init_weights(torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("wide") / "backbone"
    export_backbone(folder, vit, {"step": 0})
    return folder


def overrides(coco: Path, out: Path, backbone: Path, **changes: Any) -> list[str]:
    return tiny_detection(coco, out, backbone, **{"framework": "detectron2", "img_size": 64, **changes})


@pytest.fixture(scope="module")
def finished(server: ForkServer, coco: Path, wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a whole run."""
    out = tmp_path_factory.mktemp("finished") / "out"
    log = out.parent / "log"
    assert server.run(overrides(coco, out, wide, loader__num_workers=1), log, stage="detect") == 0, log.read_text()
    assert "Warning" not in log.read_text() and "Traceback" not in log.read_text()
    return out


def test_a_run_leaves_what_a_native_one_does(
    server: ForkServer, finished: Path, coco: Path, wide: Path, tmp_path: Path
) -> None:
    native, log = tmp_path / "native", tmp_path / "log"
    assert server.run(overrides(coco, native, wide, framework="native"), log, stage="detect") == 0, log.read_text()
    files = [sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.name != ".lock") for out in (finished, native)]
    assert files[0] == files[1]
    for name in ("summary.json", "results.json"):
        found, expected = (json.loads((out / name).read_text()) for out in (finished, native))
        assert found.keys() == expected.keys() and found["figures"].keys() == expected["figures"].keys()
    assert "framework detectron2 0.6" in found["flags"] and found["images_seen"] == 24
    rows, others = (read_metrics(out / "metrics.jsonl") for out in (finished, native))
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    assert [row["train/lr"] for row in rows[1:-1]] == pytest.approx([row["train/lr"] for row in others[1:-1]])
    step_0 = [load_detector(out / "detector").names for out in (finished, native)]
    assert step_0[0] == step_0[1]


def test_either_engine_evaluates_what_the_other_trained(finished: Path, coco: Path, tmp_path: Path) -> None:
    expected = json.loads((finished / "summary.json").read_text())["figures"]
    for framework in ("native", "detectron2"):
        out = tmp_path / framework
        config = load_config(DetectConfig, None, overrides(coco, out, finished / "detector", framework=framework))
        assert_same(evaluate_detector(config)["figures"], expected)
        assert len(json.loads((out / "detections.json").read_text())) == 5 * 6


def test_killed_and_asked_to_stop_a_run_goes_on(server: ForkServer, coco: Path, wide: Path, tmp_path: Path) -> None:
    out, logs = tmp_path / "out", [tmp_path / f"log{i}" for i in range(5)]
    whole = overrides(coco, out, wide, steps=40, checkpoint__every_steps=4, detector__cascade=True)
    for log in logs:
        log.touch()
    # The first checkpoint is complete, the second is being written.
    assert server.run(whole, logs[0], crash_at=25, stage="detect") == -9
    assert "saved step 4" in logs[0].read_text() and "saved step 8" not in logs[0].read_text()
    run = server.start(whole, logs[1], stage="detect")
    deadline = time.monotonic() + 120
    while "resumed from step 4" not in logs[1].read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(run.pids[0], signal.SIGTERM)
    assert server.wait(run) == 75, logs[1].read_text()
    said = logs[1].read_text()
    assert said.count("not bit-exact from here") == 1 and "detectron2 draws from global generators" in said
    assert "stopped by SIGTERM at step" in said.splitlines()[-1] and "Traceback" not in said
    kill_after(server, whole, logs[2], 1.0, stage="detect")
    assert server.run(whole, logs[3], stage="detect") == 0, logs[3].read_text()
    newest = read_checkpoint(max((out / "checkpoints").glob("step_*")))
    assert newest.step == 40 and newest.tensors["optimizer"]["backbone.net.pos_embed.step"] == 40
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl") if "train/loss" in row] == [*range(1, 41)]
    assert server.run([*whole, "framework=native"], logs[4], stage="detect") == 2
    assert "holds a run with another framework: detectron2 -> native" in logs[4].read_text().splitlines()[-1]


def test_what_goes_on_is_what_was_saved(coco: Path, wide: Path, tmp_path: Path) -> None:
    """Weights, moments and the optimizer's count: a further step of hardly any rate changes hardly anything."""
    out, further = tmp_path / "out", tmp_path / "further"
    detect(load_config(DetectConfig, None, overrides(coco, out, wide, steps=4)))
    saved = out / "checkpoints" / "step_0000004"
    small = overrides(coco, further, wide, steps=5, optim__lr=1e-12)
    detect(load_config(DetectConfig, None, small), resume=str(saved))
    before, after = read_checkpoint(saved), read_checkpoint(further / "checkpoints" / "step_0000005")
    for name, tensor in before.tensors["detector"].items():
        torch.testing.assert_close(after.tensors["detector"][name], tensor, rtol=0, atol=1e-9)
    moments = before.tensors["optimizer"]
    assert moments["backbone.net.pos_embed.step"] == 4
    assert after.tensors["optimizer"]["backbone.net.pos_embed.step"] == 5
    name = "roi_heads.box_predictor.bbox_pred.weight.exp_avg_sq"
    assert (after.tensors["optimizer"][name] >= 0.998 * moments[name]).all() and moments[name].max() > 0


# ---- what it cannot do ----------------------------------------------------------------------------------------------


def test_why_keep_background_is_refused(drawn: CocoSet) -> None:
    empty = int(np.flatnonzero(drawn.num_learnable() == 0)[0])
    with pytest.raises(AttributeError, match="gt_masks"):
        train_mapper(drawn, SIDE, JitterConfig()).mapper(CocoRecords(drawn)[empty])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_line(coco: Path, wide: Path, tmp_path: Path, workers: int) -> None:
    data = tmp_path / "data"
    for name in ("annotations", "train2017", "val2017"):
        (data / name).mkdir(parents=True)
        for path in (coco / name).iterdir():
            (data / name / path.name).write_bytes(path.read_bytes())
    for path in (data / "train2017").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="detectron2 replaces no image: mend it, remove it from the JSON, or") as caught:
        detect(load_config(DetectConfig, None, overrides(data, tmp_path / "out", wide, loader__num_workers=workers)))
    assert "\n" not in str(caught.value) and "train2017/" in str(caught.value)
    del caught  # its frames hold the loader
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("changes", "line"),
    [({"engine__precision": "bf16"}, "engine.precision=bf16: detectron2's trainer has it on a GPU only; give fp32"),
     ({"patch_size": 8}, "framework=detectron2: patches of 8 px and positions of 8x8, its ViTDet has patches of 16 px")],
)  # fmt: skip
def test_refusals(coco: Path, wide: Path, tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line.replace("(", r"\(")):
        detect(load_config(DetectConfig, None, overrides(coco, tmp_path / "out", wide, **changes)))


def test_a_detector_of_other_patches_is_refused(coco: Path, tmp_path: Path) -> None:
    vit = VIT.model_copy(update={"patch_size": 8, "rel_pos_grid": (8, 8)})
    numbers = sizes(False)
    names, ids = read_coco(coco_paths(coco, "val")).names, tuple(range(1, 11))
    export_detector(tmp_path / "detector", native_detector(numbers, vit), numbers, names, ids, SIDE, {})
    with pytest.raises(ConfigError, match="framework=detectron2: patches of 8 px"):
        evaluate_detector(load_config(DetectConfig, None, overrides(coco, tmp_path / "out", tmp_path / "detector")))


def test_losses_that_are_not_finite_end_a_run_with_one_line(
    server: ForkServer, coco: Path, wide: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    assert server.run(overrides(coco, tmp_path / "out", wide, optim__lr=1e20), log, stage="detect") == 5
    assert "Nothing of it was saved; try a lower optim.lr" in log.read_text().splitlines()[-1]
    assert "Traceback" not in log.read_text()
