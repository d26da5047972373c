"""A segmentation recipe run by mmengine's Runner, with mmsegmentation's network, transforms and metric.

What belongs to a run and not to the method is this suite's: directory, log, evaluation times, and checkpoints, which
hold weights under this suite's names. The framework draws dropout and drop path from PyTorch's global generator, which
is seeded before each micro-batch: so a run that goes on is as one that never stopped.
"""

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.models import EncoderDecoder
from torch import Tensor, nn

from core.checkpoint import Checkpoint
from core.engine import Progress, uses_bf16
from core.errors import ConfigError
from core.foreign_trainer import Alongside, alongside
from core.loader import Feed
from core.machine import seed_everything
from core.start import Begun
from core.task import Place
from core.vit import ViTConfig
from transfer.segmentation.directory import LoadedSegmentor
from transfer.segmentation.miou import scores_of
from transfer.segmentation.mmseg_engine.data import training_feed
from transfer.segmentation.mmseg_engine.evaluation import MmsegEvaluator
from transfer.segmentation.mmseg_engine.model import load_native, mmseg_segmentor, native_names, native_state
from transfer.segmentation.mmseg_engine.optimizer import OncePerStep, optim_wrapper, schedulers
from transfer.segmentation.segmentor import Segmentor
from transfer.segmentation.settings import Setting, rate
from transfer.segmentation.tasks import SegmentationEvaluator, SegmentationTask, figures_of

LOSSES = {"decode.loss_ce": "loss_decode", "aux.loss_ce": "loss_aux"}  # the framework's names and ours
NEVER = 2**62  # an iteration that does not come


def fit_mmseg(
    native: SegmentationTask, evaluator: SegmentationEvaluator, setting: Setting, checkpoint: Checkpoint | None,
    begun: Begun,
) -> tuple[Progress, dict[str, str]]:  # fmt: skip
    """Train to the end of the plan; `native.latest` is then what the last evaluation found.

    Args:
        native: the task that this suite would train; the framework's network begins with its weights.
        evaluator: that of `native`.
    Returns: the final progress, and the broken images.
    Raises: what `core.foreign_trainer.alongside` raises.
    """
    config, plan = setting.config, begun.plan
    assert isinstance(native.model, Segmentor), "a linear head is refused before"
    if uses_bf16(begun.device, config.engine.precision) and begun.device.type != "cuda":
        raise ConfigError("engine.precision=bf16: mmengine has mixed precision on a GPU only; give fp32")
    model = mmseg_segmentor(native.model, setting.inference, config.drop_path).to(begun.device)
    task = MmsegTask(model, native, MmsegEvaluator(evaluator, setting.inputs.classes, native.model.backbone.config))
    wrapper = optim_wrapper(config, plan, model, begun.device)
    run = begun.fit_of(task, lambda: wrapper.optimizer, rate(config), None)
    first = checkpoint.step * plan.accumulation if checkpoint else 0  # micro-batch
    feed = training_feed(setting, first, dict(checkpoint.state["feed"]["broken"]) if checkpoint else {})
    seed_everything(config.seed)  # as at the end of every step
    with alongside(task, run, checkpoint, "mmsegmentation", feed) as beside, tempfile.TemporaryDirectory() as folder:
        if beside.progress.step < plan.total_steps:
            runner = Runner(
                model,
                folder,  # for what it writes and nobody reads
                train_dataloader=Fed(feed, first),
                # The run evaluates, before it saves.
                train_cfg={
                    "type": "IterBasedTrainLoop", "max_iters": plan.total_steps * plan.accumulation, "val_begin": NEVER,
                },
                optim_wrapper=wrapper,
                param_scheduler=schedulers(config, wrapper),
                default_hooks={
                    "runtime_info": None, "timer": None, "sampler_seed": None, "logger": None, "checkpoint": None,
                    "param_scheduler": OncePerStep(plan.accumulation),
                },
                custom_hooks=[Recorder(beside, config.seed, plan.accumulation)],
                randomness={"seed": config.seed},
                log_level="ERROR",
                default_scope="mmseg",
                experiment_name=f"rcmae {begun.device} {id(task)}",
            )  # fmt: skip
            runner.model.to(begun.device)  # it takes a GPU wherever there is one
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # weights are there already; schedules are gone through
                runner.train()
        if task.latest is None:  # the run was finished before
            task.evaluate(beside.progress.step)
    native.latest = task.latest
    return beside.progress, feed.broken


def evaluate_mmseg(evaluator: SegmentationEvaluator, loaded: LoadedSegmentor) -> Tensor:
    """The confusion matrix [K, K] int64 of a segmentor of this suite, by mmsegmentation."""
    assert isinstance(loaded.model, Segmentor), "a linear head is refused before"
    model = mmseg_segmentor(loaded.model, evaluator.labeller.inference).to(evaluator.labeller.device)
    return MmsegEvaluator(evaluator, loaded.classes, loaded.model.backbone.config)(model)


class MmsegTask:
    """The framework's network as a Task: what a run evaluates, draws and saves; see `core.task.Task`."""

    def __init__(self, model: EncoderDecoder, native: SegmentationTask, evaluator: MmsegEvaluator) -> None:
        """`native`: the same segmentor as this suite has it, into which weights are put to draw."""
        self.model, self._native, self._evaluator = model, native, evaluator
        self.latest: Tensor | None = None  # confusion matrix of the last evaluation

    def losses(self, batch: dict[str, Any], at: Place) -> dict[str, Tensor]:
        """Its losses of a packed micro-batch, in training mode."""
        found = self.model.train().loss(**self.model.data_preprocessor(batch, True))
        return {name: found[theirs] for theirs, name in LOSSES.items()}

    def after_update(self, step: int, finite: Tensor) -> None:
        """Nothing follows the weights."""

    def observe(self, step: int) -> dict[str, float]:
        """Nothing is measured beside the losses."""
        return {}

    def evaluate(self, step: int) -> dict[str, float]:
        """IoU and accuracies on the validation images."""
        self.latest = self._evaluator(self.model)
        return {f"eval/{name}": value for name, value in figures_of(scores_of(self.latest)).items()}

    def pictures(self, step: int) -> dict[str, np.ndarray]:
        """Labels of a few validation images."""
        self._native.model.load_state_dict(native_state(self.model))
        return self._native.pictures(step)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained, under this suite's names."""
        names = native_names(self.model)
        return ((names[name], p) for name, p in self.model.named_parameters() if name in names)

    def modules(self) -> Mapping[str, nn.Module]:
        """The segmentor."""
        return {"segmentor": AsNative(self.model, self._native.model.backbone.config)}


class AsNative(nn.Module):
    """The framework's network with the state dict of a `Segmentor`."""

    def __init__(self, model: EncoderDecoder, vit: ViTConfig) -> None:
        super().__init__()
        self._model, self._vit = model, vit

    def state_dict(self) -> dict[str, Tensor]:  # type: ignore[override]
        """All weights and statistics, under this suite's names."""
        return native_state(self._model)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # type: ignore[override]
        """Load what `state_dict` gives, strictly."""
        load_native(self._model, state, self._vit)


@dataclass(frozen=True)
class Fed:
    """Micro-batches of a feed where mmengine's loop expects a loader.

    A loop that goes on reads what it has trained with before; here that is nothing, and takes no time.
    """

    feed: Feed
    first: int  # micro-batch that the feed begins with
    dataset: tuple[()] = ()

    def __iter__(self) -> Iterator[Any]:
        """Yield packed micro-batches without end."""
        yield from repeat(None, self.first)
        while True:
            yield self.feed.take()[0]


class Recorder(Hook):
    """Goes on where the run stands, and tells it what a step came to, under the names that all runs use."""

    priority = "VERY_LOW"  # after the schedules

    def __init__(self, beside: Alongside, seed: int, accumulation: int) -> None:
        self._beside, self._seed, self._accumulation = beside, seed, accumulation
        self._sums: dict[str, Any] = {}

    def before_train(self, runner: Runner) -> None:
        """Bring loop and schedules to the step of the run."""
        for _ in range(self._beside.progress.step):
            for scheduler in runner.param_schedulers:
                scheduler.step()
        runner.train_loop._iter = self._beside.progress.step * self._accumulation

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seed what dropout and drop path are drawn from by the place in the run."""
        step, turn = divmod(batch_idx, self._accumulation)
        torch.manual_seed(Place(step, turn, turn).generator(self._seed, torch.device("cpu")).initial_seed())
        if turn == 0:
            # The largest rate is that of the heads, which all others are shares of.
            self._sums = {"lr": max(group["lr"] for group in runner.optim_wrapper.param_groups)}

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Add up the losses of a micro-batch; after the last of a step, log, evaluate and save where it is due."""
        assert outputs is not None, "the network gives its losses"
        for theirs, name in {**LOSSES, "loss": "loss"}.items():
            self._sums[name] = self._sums.get(name, 0.0) + outputs[theirs].detach() / self._accumulation
        if (batch_idx + 1) % self._accumulation:
            return
        self._sums["grad_norm"] = runner.optim_wrapper.message_hub.get_scalar("train/grad_norm").current()
        seed_everything(self._seed)  # nothing hangs on what was drawn, so a checkpoint need not say it
        self._beside.after_step(self._sums, wait_s=0.0)
