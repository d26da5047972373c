"""framework=mmseg: the same network, gradients, groups, rates, crops and figures as the native engine."""

import importlib.util
import io
import json
import sys
import warnings
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from core.distributed import Processes
from core.errors import ConfigError
from core.task import Place
from tests.mmseg_recipes import (
    PLAIN,
    PUBLISHED,
    both,
    config_of,
    evaluated,
    exported,
    fixed_batch,
    four_blocks,
    on_mmseg,
    packed,
)
from tests.segmentation_sets import blocks, save_pair, whole_set
from transfer.segmentation.data import PrepareSegmentation
from transfer.segmentation.run import open_inputs, segment
from transfer.segmentation.settings import parameter_groups, rate, settle

NETWORKS = pytest.mark.parametrize("network", [PUBLISHED, PLAIN], ids=["published", "plain"])


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone of four blocks."""
    return four_blocks(tmp_path_factory.mktemp("four") / "backbone")


# ---- the method ------------------------------------------------------------------------------------------------------


@NETWORKS
@pytest.mark.parametrize("average", ["all_pixels", "valid_pixels"])
def test_the_first_loss_and_its_gradients_are_equal(
    mmseg: ModuleType, ade: Path, four: Path, tmp_path: Path, network: dict, average: str
) -> None:
    from transfer.segmentation.mmseg_engine.run import MmsegTask

    changes = {**network, "segmentor__average": average, "segmentor__dropout_ratio": 0, "drop_path": 0}
    setting, task, model = both(config_of(ade, tmp_path / "out", four, **changes))
    batch = fixed_batch(setting)
    ours = task.losses(batch, Place(0, 0, 0))
    sum(ours.values()).backward()
    framework = MmsegTask(model, task, None)
    theirs = framework.losses(packed(batch), Place(0, 0, 0))
    sum(theirs.values()).backward()
    assert ours.keys() == theirs.keys() == {"loss_decode", "loss_aux"}
    for name, loss in ours.items():
        assert loss.item() == pytest.approx(theirs[name].item(), abs=1e-4) and loss > 0.5
    gradients = {name: parameter.grad for name, parameter in task.model.named_parameters()}
    found = {name: parameter.grad for name, parameter in framework.named_parameters()}
    assert gradients.keys() == found.keys()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, found[name], rtol=1e-3, atol=1e-5 * largest), name
    assert gradients["backbone.pos_embed"].abs().max() > 1e-3 * largest
    statistics = framework.modules()["segmentor"].state_dict()  # that followed the batch
    for name, tensor in task.model.state_dict().items():
        assert torch.allclose(tensor.double(), statistics[name].double(), atol=1e-5), name


@NETWORKS
def test_parameter_groups_are_equal(mmseg: ModuleType, ade: Path, four: Path, tmp_path: Path, network: dict) -> None:
    from transfer.segmentation.mmseg_engine.model import native_names
    from transfer.segmentation.mmseg_engine.optimizer import optim_wrapper

    setting, task, model = both(config_of(ade, tmp_path / "out", four, layer_decay=0.65, **network))
    names = {parameter: name for name, parameter in task.model.named_parameters()}
    ours = {
        names[parameter]: (group["lr_scale"], group["weight_decay"])
        for group in parameter_groups(setting.config, task.model)
        for parameter in group["params"]
    }
    with redirect_stdout(io.StringIO()) as said:
        wrapper = optim_wrapper(setting.config, setting.plan, model, setting.device)
    assert said.getvalue() == ""
    converted = native_names(model)
    theirs = {
        converted[name]: (group["lr"] / 1e-3, group["weight_decay"])
        for group in wrapper.optimizer.param_groups
        for name in group["param_names"]
    }
    assert ours.keys() == theirs.keys() and len({scale for scale, _ in ours.values()}) == 6
    for name, (scale, decay) in ours.items():
        assert theirs[name] == (pytest.approx(scale, rel=1e-9), decay), name


@pytest.mark.parametrize(("steps", "warmup"), [(50, 10), (40, 2), (12, 0), (5, 4)])
def test_learning_rates_are_equal(mmseg: ModuleType, ade: Path, four: Path, tmp_path: Path, steps: int, warmup: int) -> None:  # fmt: skip
    from transfer.segmentation.mmseg_engine.optimizer import optim_wrapper, schedulers

    setting, _, model = both(config_of(ade, tmp_path / "out", four, steps=steps, warmup_steps=warmup, **PUBLISHED))
    wrapper = optim_wrapper(setting.config, setting.plan, model, setting.device)
    scheduled, expected = schedulers(setting.config, wrapper), rate(setting.config)
    for step in range(steps):
        found = max(group["lr"] for group in wrapper.param_groups)
        assert found == pytest.approx(expected(step), rel=1e-9, abs=1e-15), step
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the optimizer has done nothing
            for scheduler in scheduled:
                scheduler.step()
    assert expected(steps - 1) == 0 or steps == warmup + 1


def test_crops_are_those_of_the_native_engine(mmseg: ModuleType, ade: Path, four: Path, tmp_path: Path) -> None:
    from transfer.segmentation.mmseg_engine.data import PrepareForMmseg, training_pipeline

    setting = settle(
        config := config_of(ade, tmp_path / "out", four), open_inputs(config), None, Processes()
    )  # fmt: skip
    train, table = setting.inputs.train, setting.inputs.table
    ours = PrepareSegmentation(train, table, 16, config.augment)
    theirs = PrepareForMmseg(train, table, training_pipeline(config.augment, 16, config.ignore_index))
    flipped = 0
    for index in range(len(train)):
        image = torch.from_numpy(np.asarray(Image.open(io.BytesIO(train.images.read(index)))).copy()).permute(2, 0, 1)
        sample = ours(image, np.random.default_rng(index), index)
        found = theirs(image, np.random.default_rng(index), index)
        assert torch.equal(found["inputs"][[2, 1, 0]], sample.image), index  # BGR
        assert torch.equal(found["data_samples"].gt_sem_seg.data[0], sample.label.long()), index
        flipped += found["data_samples"].flip
    assert 0 < flipped < len(train)


def test_micro_batches_go_on_where_they_stopped(mmseg: ModuleType) -> None:
    from transfer.segmentation.mmseg_engine.data import InfiniteOrder

    order = list(islice(InfiniteOrder(7, 3, 5, 0), 9))
    assert list(islice(InfiniteOrder(7, 3, 5, 4), 5)) == order[4:]
    flat = [key for batch in order for key in batch]
    for epoch in range(3):
        assert sorted(index for at, index in flat if at == epoch) == list(range(7))
    assert [index for at, index in flat if at == 0] != [index for at, index in flat if at == 1]


def test_noise_comes_from_the_place_in_the_run(mmseg: ModuleType) -> None:
    from transfer.segmentation.mmseg_engine.run import Recorder

    runner = SimpleNamespace(optim_wrapper=SimpleNamespace(param_groups=[{"lr": 1.0}]))

    def draws(seed: int) -> list[float]:
        recorder, found = Recorder(None, seed, 2), []
        for micro_batch in range(6):
            recorder.before_train_iter(runner, micro_batch)
            found.append(torch.rand(()).item())
        return found

    assert draws(3) == draws(3) and len({*draws(3), *draws(4)}) == 12


# ---- figures -------------------------------------------------------------------------------------------------------


@NETWORKS
@pytest.mark.parametrize("views", [(), ("flip=true",), ("scales=[1.0, 1.5]", "flip=true")], ids=["one", "flip", "ms"])
def test_either_engine_gives_the_same_figures(
    mmseg: ModuleType, ade: Path, four: Path, tmp_path: Path, network: dict, views: tuple[str, ...]
) -> None:
    """Also of images that are smaller than a window, where the published network pads them."""
    segmentor = exported(config_of(ade, tmp_path / "x", four, **network), tmp_path / "segmentor")
    ours, native = evaluated(ade, tmp_path / "native", segmentor, *views)
    theirs, matrix = evaluated(ade, tmp_path / "mmseg", segmentor, "framework=mmseg", *views)
    assert ours["figures"].keys() == theirs["figures"].keys()
    for name, value in ours["figures"].items():
        assert theirs["figures"][name] == pytest.approx(value, abs=0.01), name
    assert np.abs(native - matrix).sum() <= 2e-4 * native.sum() and len(np.unique(native.nonzero()[1])) >= 10
    log = (tmp_path / "mmseg" / "train.log").read_text()
    line = next(line for line in log.splitlines() if "IoUMetric" in line)
    own = [float(text) for text in line.split()[-5::2]]  # mIoU, mAcc, aAcc
    assert own == pytest.approx([theirs["figures"][f"{name}_pct"] for name in ("miou", "macc", "aacc")], abs=0.006)
    assert any("mmsegmentation 1.2.2" in flag for flag in theirs["flags"])


def test_small_views_of_a_bound_network_are_enlarged(mmseg: ModuleType, ade: Path, four: Path, tmp_path: Path) -> None:
    segmentor = exported(config_of(ade, tmp_path / "x", four, **PUBLISHED), tmp_path / "segmentor")
    views = ("scales=[0.5, 1.0]",)
    _, native = evaluated(ade, tmp_path / "native", segmentor, *views)
    _, matrix = evaluated(ade, tmp_path / "mmseg", segmentor, "framework=mmseg", *views)
    assert np.abs(native - matrix).sum() <= 2e-4 * native.sum()


def test_every_label_option_means_the_same(mmseg: ModuleType, four: Path, tmp_path: Path) -> None:
    """Values of 16 bits, a map, and an ignored value beyond 255; trained a step, then evaluated by both."""
    data = whole_set(tmp_path / "data", values=300)
    save_pair(data, "training", "more", blocks((30, 40), 300))
    changes = {
        **PUBLISHED, "classes": "null", "num_classes": 3, "ignore_index": 999, "label_shift": 0, "batch_size": 2,
        "label_map": "{" + ", ".join(f"{value}: {value % 3 if value % 5 else 999}" for value in range(300)) + "}",
        "steps": 2, "warmup_steps": 0, "checkpoint__every_steps": 1,
    }  # fmt: skip
    config = on_mmseg(data, tmp_path / "out", four, **changes)
    segment(config)
    ours, native = evaluated(data, tmp_path / "native", tmp_path / "out" / "segmentor")
    assert ours["figures"] == pytest.approx(json.loads((tmp_path / "out" / "summary.json").read_text())["figures"])
    labels = [np.asarray(Image.open(path)) for path in (data / "annotations" / "validation").iterdir()]
    assert native.sum() == sum((label % 5 > 0).sum() for label in labels)


# ---- the stand-in ----------------------------------------------------------------------------------------------------


def test_a_compiled_operator_says_that_it_is_absent(mmseg: ModuleType) -> None:
    import mmcv.ops

    if not hasattr(sys.modules["mmcv._ext"], "__file__"):
        with pytest.raises(ConfigError, match=r"mmcv\._ext\.nms: a compiled operator of mmcv"):
            mmcv.ops.nms(torch.rand(2, 4), torch.rand(2), 0.5)


def test_a_real_extension_is_left_alone(mmseg: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from transfer.segmentation.mmseg_engine import operators

    real = ModuleType(operators.EXTENSION)
    monkeypatch.setitem(sys.modules, operators.EXTENSION, real)
    operators.stand_in()
    assert sys.modules[operators.EXTENSION] is real
    monkeypatch.delitem(sys.modules, operators.EXTENSION)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())  # on disk, not imported yet
    operators.stand_in()
    assert operators.EXTENSION not in sys.modules
