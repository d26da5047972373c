"""`rcmae segment` from end to end: export, kills, several processes, running statistics, scales and flips."""

import json
import random
import shutil
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.config import load_config
from core.distributed import Processes
from core.engine import train_step
from core.flags import FlagReader
from core.optim import adamw
from core.start import Begun
from core.task import Place
from core.transforms import IMAGENET_MEAN, IMAGENET_STD
from tests.harness import ForkServer, fresh, kill_after
from tests.test_resume import assert_whole
from tests.tiny import tiny_segmentation
from transfer.segmentation.augment import fitted_size
from transfer.segmentation.data import Collate, PrepareSegmentation, SegmentationBatch
from transfer.segmentation.directory import export_segmentor, load_segmentor
from transfer.segmentation.linear_head import Network
from transfer.segmentation.run import build_task, evaluate_segmentor, open_inputs
from transfer.segmentation.settings import SegmentConfig, Setting, label_keys, parameter_groups, settle
from transfer.segmentation.tasks import EvalSizes, SegmentationTask

HEADS = ("upernet", "linear")


def run(server: ForkServer, overrides: list[str], log: Path, **options: object) -> int:
    return server.run(overrides, log, stage="segment", **options)


def tiny(data: Path, out: Path, backbone: Path, head: str = "upernet", **changes: object) -> SegmentConfig:
    return load_config(SegmentConfig, None, tiny_segmentation(data, out, backbone, head, **changes))


def evaluation(data: Path, out: Path, segmentor: Path, *more: str) -> list[str]:
    """Overrides of an evaluation that says nothing which the directory knows."""
    return [f"data={data}", f"out={out}", f"backbone={segmentor}", "device=cpu", "loader.num_workers=0", *more]


def evaluate(data: Path, out: Path, segmentor: Path, *more: str) -> dict:
    return evaluate_segmentor(load_config(SegmentConfig, None, evaluation(data, out, segmentor, *more)))


def confusion(out: Path) -> np.ndarray:
    return np.array(json.loads((out / "confusion.json").read_text())["rows_are_labels"])


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# ---- training and evaluation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_what_is_trained_is_exported_and_evaluates_the_same(
    segmented: dict[str, Path], ade: Path, tmp_path: Path, head: str
) -> None:
    out = segmented[head]
    found = json.loads((out / "results.json").read_text())
    assert found["test_images"] == 5 and found["images"] == 14 and found["images_seen"] == 24
    assert found["figures"].keys() == {"miou_pct", "macc_pct", "aacc_pct"}
    assert [entry["name"] for entry in found["classes"]][::149] == ["wall", "flag"]
    root = ade / "ADEChallengeData2016" / "annotations" / "validation"
    labels = np.concatenate([np.asarray(Image.open(path)).ravel() for path in sorted(root.iterdir())])
    assert [entry["pixels"] for entry in found["classes"]] == np.bincount(labels, minlength=151)[1:].tolist()
    matrix = confusion(out)
    assert matrix.sum() == (labels > 0).sum() and matrix.shape == (150, 150)
    assert found["figures"]["aacc_pct"] == pytest.approx(100 * matrix.trace() / matrix.sum())
    loaded = load_segmentor(out / "segmentor")
    assert (loaded.head, loaded.scale, loaded.inference.crop, loaded.inference.stride) == (head, (80, 20), 16, 10)
    assert (loaded.labels.label_shift, loaded.labels.ignore_index, loaded.classes.names[149]) == (1, 255, "flag")
    again = evaluate(ade, tmp_path / "again", out / "segmentor")
    assert again["figures"] == found["figures"]
    assert np.array_equal(confusion(tmp_path / "again"), matrix)
    last = [row for row in metrics(out) if "eval/miou_pct" in row][-1]
    assert last["step"] == 6 and last["eval/miou_pct"] == again["figures"]["miou_pct"]
    assert {path.name for path in (out / "pictures").iterdir()} == {"labels_0000000.png", "labels_0000006.png"}
    assert "flag" in (out / "train.log").read_text().splitlines()[-3]  # the table of classes


def test_a_linear_head_leaves_the_backbone_alone(segmented: dict[str, Path], backbone: Path) -> None:
    stored = load_file(segmented["linear"] / "segmentor" / "model.safetensors")
    plain = load_file(backbone / "model.safetensors")
    for name, tensor in plain.items():
        if name != "pos_embed":  # resized to the crop
            assert torch.equal(stored[f"backbone.{name}"], tensor), name
    newest = segmented["linear"] / "checkpoints" / "step_0000006" / "segmentor.safetensors"
    assert load_file(newest).keys() == {
        "bn.running_mean", "bn.running_var", "bn.num_batches_tracked", "conv_seg.weight", "conv_seg.bias",
    }  # fmt: skip
    assert stored["head.bn.num_batches_tracked"] == 6


@pytest.mark.parametrize("head", HEADS)
def test_kills_and_crash_points(server: ForkServer, ade: Path, backbone: Path, tmp_path: Path, head: str) -> None:
    reference, out, log = tmp_path / "reference", tmp_path / "out", tmp_path / "log"
    changes = {"engine__accumulation": 2}
    begun = time.perf_counter()
    assert run(server, tiny_segmentation(ade, reference, backbone, head, **changes), log) == 0, log.read_text()
    whole, rng = time.perf_counter() - begun, random.Random(head)
    points = int(Path(f"{log}.points").read_text())
    overrides = tiny_segmentation(ade, out, backbone, head, **changes)
    kill_after(server, overrides, log, rng.uniform(0.3, 0.8) * whole, stage="segment")
    assert run(server, overrides, log) == 0, log.read_text()
    assert_whole(out, reference)
    point = rng.randrange(1, points)
    assert run(server, tiny_segmentation(ade, fresh(out), backbone, head, **changes), log, crash_at=point) == -9
    for _ in range(2):  # and once it is done, the same figures once more
        assert run(server, overrides, log) == 0, log.read_text()
        assert_whole(out, reference)
        assert (out / "confusion.json").read_bytes() == (reference / "confusion.json").read_bytes()
    assert "not bit-exact" not in log.read_text()


@pytest.mark.parametrize("batch_norm", ["frozen", "training"])
def test_two_processes_train_as_one(
    server: ForkServer, ade: Path, backbone: Path, tmp_path: Path, batch_norm: str
) -> None:
    """Of the same micro-batches.

    PyTorch synchronises batch norm on GPUs alone. In training mode each micro-batch has its own statistics here, so
    that weights agree, and running statistics follow them in another order.
    """
    outs = [("one", 1, "ddp"), ("ddp", 2, "ddp"), ("fsdp2", 2, "fsdp2")][: 3 if batch_norm == "frozen" else 2]
    for name, size, mode in outs:
        log = tmp_path / f"{name}.log"
        changes = {"engine__accumulation": 2 // size, "engine__parallel": mode, "steps": 3, "batch_size": 6}
        overrides = tiny_segmentation(ade, tmp_path / name, backbone, **changes)
        fault = {"frozen": "frozen_batch_norms", "training": None}[batch_norm]
        assert server.wait(server.start(overrides, log, None, size, fault, -1, "segment")) == 0, log.read_text()
    one, *others = (tmp_path / name for name, _, _ in outs)
    expected = load_file(one / "segmentor" / "model.safetensors")
    for out in others:
        found = load_file(out / "segmentor" / "model.safetensors")
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            if batch_norm == "frozen" or (".running_" not in key and "num_batches" not in key):
                torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-5, msg=f"{out.name}: {key}")
        if batch_norm == "frozen":
            assert not any(found[key].any() for key in found if key.endswith("num_batches_tracked"))
            figures, wanted = (json.loads((o / "summary.json").read_text())["figures"] for o in (out, one))
            assert figures == pytest.approx(wanted, abs=0.2)  # a pixel is a pixel: one may fall to another class
            assert confusion(out).sum() == confusion(one).sum()


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_evaluate_to_the_bit(
    server: ForkServer, segmented: dict[str, Path], ade: Path, tmp_path: Path, size: int
) -> None:
    """Five images cannot be shared evenly, and each counts once; they take different numbers of windows."""
    log = tmp_path / "log"
    overrides = evaluation(ade, tmp_path / "out", segmented["upernet"] / "segmentor")
    assert server.run(overrides, log, size=size, stage="segment --eval") == 0, log.read_text()
    assert (tmp_path / "out" / "confusion.json").read_bytes() == (segmented["upernet"] / "confusion.json").read_bytes()


@pytest.mark.parametrize("average", ["all_pixels", "valid_pixels"])
def test_crops_without_a_label_have_no_loss(
    server: ForkServer, ade: Path, backbone: Path, tmp_path: Path, average: str
) -> None:
    data, out, log = tmp_path / "ade", tmp_path / "out", tmp_path / "log"
    shutil.copytree(ade, data)
    for path in data.rglob("*.png"):
        Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)
    overrides = tiny_segmentation(data, out, backbone, segmentor__average=average, weight_decay=0)
    assert run(server, overrides, log) == 0, log.read_text()
    rows = [row for row in metrics(out) if "train/loss" in row]
    assert len(rows) == 6 and all(row["train/loss"] == row["train/grad_norm"] == 0 for row in rows)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["figures"] == {"miou_pct": None, "macc_pct": None, "aacc_pct": None}
    assert summary["non_finite_steps"] == 0 and "no figure is defined" in log.read_text()
    assert all(t.isfinite().all() for t in load_file(out / "segmentor" / "model.safetensors").values())
    assert torch.equal(
        load_file(out / "segmentor" / "model.safetensors")["backbone.cls_token"],
        load_file(backbone / "model.safetensors")["cls_token"],
    )


def test_variants(server: ForkServer, ade: Path, backbone: Path, tmp_path: Path) -> None:
    """As published, from random weights, with blocks recomputed; more classes than a byte holds; images whole."""
    out, log = tmp_path / "out", tmp_path / "log"
    changes = {
        "init": "random", "rel_pos_bias": True, "layer_scale": True, "activation_checkpointing": True, "steps": 3,
        "eval_precision": "bf16", "optim__clip_grad": 1.0, "scales": [0.5, 1], "flip": True,
    }  # fmt: skip
    assert run(server, tiny_segmentation(ade, out, backbone, **changes), log) == 0, log.read_text()
    assert "relative position bias and layer scale" in log.read_text()
    flags = json.loads((out / "summary.json").read_text())["flags"]
    assert "random initialisation: no pretrained weights" in flags and "evaluated in bf16" in flags
    assert "evaluated at scales 0.5, 1, mirror images too" in flags
    changed = load_file(out / "segmentor" / "model.safetensors")
    assert changed["backbone.blocks.0.attn.relative_position_bias_table"].any()
    assert (changed["backbone.blocks.0.gamma_1"] != 1).any()

    def many(path: Path) -> None:
        Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16) + 200).save(path)

    data, out = tmp_path / "many", tmp_path / "out2"
    shutil.copytree(ade / "ADEChallengeData2016", data)
    for path in data.rglob("*.png"):
        many(path)
    changes = {"inference__mode": "whole", "classes": "null", "num_classes": 351, "label_shift": 0, "ignore_index": 999}
    assert run(server, tiny_segmentation(data, out, backbone, "linear", **changes), log) == 0, log.read_text()
    assert load_segmentor(out / "segmentor").labels.ignore_index == 999
    assert confusion(out).sum() == confusion(out)[200:].sum() > 0


def test_another_backbone_is_refused_on_resume(
    server: ForkServer, segmented: dict[str, Path], ade: Path, backbone: Path, tmp_path: Path
) -> None:
    out, other, log = tmp_path / "out", tmp_path / "other", tmp_path / "log"
    shutil.copytree(segmented["linear"], out)
    shutil.copytree(backbone, other)
    weights = load_file(other / "model.safetensors")
    save_file({**weights, "pos_embed": weights["pos_embed"] + 1}, other / "model.safetensors")
    assert run(server, tiny_segmentation(ade, out, other, "linear"), log) == 3
    assert "but the run was started from" in log.read_text().splitlines()[-1]


# ---- running statistics ---------------------------------------------------------------------------------------------


def prepared(config: SegmentConfig) -> Setting:
    return settle(config, open_inputs(config), None, Processes())


def batches_of(setting: Setting) -> list[SegmentationBatch]:
    """Two micro-batches of two images."""
    prepare = PrepareSegmentation(
        setting.inputs.train, setting.inputs.table, setting.config.img_size, setting.config.augment
    )
    collate, rng = Collate(setting.config.img_size, setting.inputs.table.ignore_index), np.random.default_rng(0)
    images = [torch.from_numpy(rng.integers(0, 256, (3, 40, 44), dtype=np.uint8)) for _ in range(4)]
    samples = [prepare(image, rng, 7 * (i % 2)) for i, image in enumerate(images)]  # labels of 40 x 44 px
    return [collate(samples[:2]), collate(samples[2:])]


def bits_of(task: SegmentationTask) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in task.modules()["segmentor"].state_dict().items()}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("bad_turn", [0, 1])
def test_a_step_that_is_not_finite_leaves_running_statistics(
    ade: Path, backbone: Path, tmp_path: Path, head: str, bad_turn: int
) -> None:
    setting = prepared(tiny(ade, tmp_path / "out", backbone, head, engine__accumulation=2))
    task, batches = build_task(setting, Processes()), batches_of(setting)
    run = Begun(setting.config, setting.plan, setting.device, Processes(), None, Console(quiet=True), {}).fit_of(
        task, lambda: adamw(parameter_groups(setting.config, task.part), setting.config.optim), lambda step: 1e-3, None
    )
    flags, losses, before = FlagReader(setting.device), task.model.losses, bits_of(task)
    train_step(task, batches, run, 0, flags)
    after = bits_of(task)
    statistics = [name for name in after if "running" in name or "tracked" in name]
    assert statistics and all(not torch.equal(before[name], after[name]) for name in statistics)
    assert all(after[name] == 2 for name in statistics if "tracked" in name)  # of both micro-batches
    assert not any(module.training for module in task.model.modules())
    turns = iter(range(2))

    def poisoned(*arguments: object) -> dict[str, Tensor]:
        found = losses(*arguments)
        return {**found, "loss_decode": found["loss_decode"] * (float("nan") if next(turns) == bad_turn else 1)}

    task.model.losses = poisoned
    train_step(task, batches, run, 1, flags)
    assert all(torch.equal(tensor, after[name]) for name, tensor in bits_of(task).items())
    task.model.losses = losses
    train_step(task, batches, run, 2, flags)
    assert all(not torch.equal(bits_of(task)[name], after[name]) for name in statistics)
    assert flags.read(3).total == 1


def test_synchronised_batch_norms_are_followed_too(
    ade: Path, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What several GPUs have; on a CPU they can only be evaluated."""
    setting = prepared(tiny(ade, tmp_path / "out", backbone))
    plain = build_task(setting, Processes())
    monkeypatch.setattr("transfer.segmentation.run.synchronised", lambda device, processes: True)
    task = build_task(setting, Processes())
    norms = [module for module in task.model.modules() if isinstance(module, torch.nn.SyncBatchNorm)]
    assert len(norms) == 14 and bits_of(task).keys() == bits_of(plain).keys()
    assert task.evaluate(0) == plain.evaluate(0)
    task._statistics.begin()
    before = norms[3].running_mean.clone()
    norms[3].running_mean.add_(1)
    task.after_update(0, torch.tensor(False))
    assert torch.equal(norms[3].running_mean, before)


def test_noise_comes_from_the_place_in_the_run(ade: Path, backbone: Path, tmp_path: Path) -> None:
    setting = prepared(tiny(ade, tmp_path / "out", backbone))
    task, (batch, _) = build_task(setting, Processes()), batches_of(setting)
    before = torch.random.get_rng_state()

    def loss(*place: int) -> float:
        return sum(value.item() for value in task.losses(batch, Place(*place)).values())

    assert loss(3, 1, 0) == loss(3, 1, 0) != loss(3, 0, 0)
    assert torch.equal(torch.random.get_rng_state(), before)


# ---- sizes of evaluation --------------------------------------------------------------------------------------------


def test_the_sizes_of_views() -> None:
    once = EvalSizes((2048, 512))
    assert [once(size) for size in [(375, 500), (1100, 256), (400, 3000)]] == [
        ((512, 683),), ((2048, 477),), ((273, 2048),),
    ]  # fmt: skip
    scaled = EvalSizes((2048, 512), (0.5, 1.75))
    assert scaled((375, 500)) == ((256, 341), (896, 1195))
    enlarged = EvalSizes((2048, 512), (0.5, 1.0, 1.75), least_px=512)
    assert enlarged((375, 500)) == ((512, 683), (512, 683), (896, 1195))
    assert enlarged((3000, 400))[0] == (3840, 512)


@pytest.mark.parametrize("rel_pos_bias", [False, True])
def test_scales_and_flips_are_as_by_hand(ade: Path, backbone: Path, tmp_path: Path, rel_pos_bias: bool) -> None:
    setting = prepared(tiny(ade, tmp_path / "out", backbone, rel_pos_bias=rel_pos_bias, layer_scale=True))
    task = build_task(setting, Processes())
    task.losses(batches_of(setting)[0], Place(0, 0, 0))  # running statistics that are something
    torch.nn.init.normal_(task.model.decode_head.conv_seg.weight, generator=torch.Generator().manual_seed(0))
    segmentor = export(task, setting, tmp_path / "segmentor")
    changes = ["scales=[0.5, 1.25]", "flip=true"]
    evaluate(ade, tmp_path / "again", segmentor, *changes)
    expected, model = np.zeros((150, 150), np.int64), load_segmentor(segmentor).model
    root = ade / "ADEChallengeData2016"
    for path in sorted((root / "images" / "validation").iterdir()):
        image = np.asarray(Image.open(path))
        label = np.asarray(Image.open(root / "annotations" / "validation" / f"{path.stem}.png")).astype(int) - 1
        total = 0
        for ratio in (0.5, 1.25):
            size = fitted_size(label.shape, (int(80 * ratio), int(20 * ratio)))
            if rel_pos_bias and min(size) < 16:
                size = fitted_size(label.shape, (10_000, 16))
            pixels = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR) / 255
            views = ((pixels - IMAGENET_MEAN) / IMAGENET_STD).astype(np.float32).transpose(2, 0, 1)[None]
            for mirrored in (False, True):
                view = torch.from_numpy(views[..., ::-1].copy() if mirrored else views)
                scores = slid_by_hand(model, view)
                total = total + resized(scores.flip(-1) if mirrored else scores, label.shape).softmax(dim=1)
        found = total.argmax(dim=1)[0].numpy()
        np.add.at(expected, (label[label >= 0], found[label >= 0]), 1)
    found = confusion(tmp_path / "again")
    assert np.array_equal(found.sum(axis=1), expected.sum(axis=1))
    assert np.abs(found - expected).sum() <= 0.002 * expected.sum()  # ties apart
    assert len(np.unique(expected.nonzero()[1])) > 10  # many classes are predicted
    evaluate(ade, tmp_path / "once", segmentor)
    assert np.abs(confusion(tmp_path / "once") - expected).sum() > 0.05 * expected.sum()


def slid_by_hand(model: Network, image: Tensor, crop: int = 16, stride: int = 10) -> Tensor:
    """Scores [1, K, H, W] of an image, the mean over windows, one after the other."""
    H, W = image.shape[2:]
    total, covered = torch.zeros(1, 150, H, W), torch.zeros(H, W)
    for y in {max(min(y, H - crop), 0) for y in range(0, max(H - crop, 0) + stride, stride)}:
        for x in {max(min(x, W - crop), 0) for x in range(0, max(W - crop, 0) + stride, stride)}:
            window = image[:, :, y : y + crop, x : x + crop]
            coarse = model.logits(window)
            whole = resized(coarse.values, coarse.size)[:, :, : window.shape[2], : window.shape[3]]
            total[:, :, y : y + crop, x : x + crop] += whole
            covered[y : y + crop, x : x + crop] += 1
    return total / covered


def resized(scores: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.nn.functional.interpolate(scores, size=size, mode="bilinear")


def export(task: SegmentationTask, setting: Setting, folder: Path) -> Path:
    config = setting.config
    keys = label_keys(config)
    export_segmentor(folder, task.model, setting.inputs.classes, keys, config.augment.scale, setting.inference, {})
    return folder
