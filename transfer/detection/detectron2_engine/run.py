"""A detection recipe run by detectron2: its trainer, optimizer groups and schedule around its model and data."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer, hooks
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from detectron2.utils.events import EventStorage
from fvcore.common.param_scheduler import ConstantParamScheduler, MultiStepParamScheduler, ParamScheduler
from torch import Tensor, nn

from core.checkpoint import Checkpoint
from core.engine import Progress, uses_bf16
from core.errors import ConfigError, NumericError
from core.foreign_trainer import Alongside, alongside
from core.machine import seed_everything
from core.start import Begun
from core.task import Place
from transfer.detection.coco import CocoSet
from transfer.detection.detector import LoadedDetector
from transfer.detection.detectron2_engine.data import Record, train_loader
from transfer.detection.detectron2_engine.evaluate import evaluate_model, quiet
from transfer.detection.detectron2_engine.model import build_detectron2
from transfer.detection.mask_rcnn import MaskRCNN
from transfer.detection.results import draw_validation
from transfer.detection.settings import WARMUP_START, DetectConfig, Setting, peak_rate, rate
from transfer.detection.tasks import Evaluated, average_precisions
from transfer.detection.weights import from_detectron2


class Detectron2Task:
    """detectron2's detector as a Task: what a run evaluates, draws and saves; see `core.task.Task`."""

    def __init__(self, model: nn.Module, native: MaskRCNN, setting: Setting) -> None:
        """Args: native: a detector of this suite of the same sizes, into which weights are put to draw."""
        self.model, self._native, self._setting = model, native, setting
        self.latest: Evaluated | None = None

    def losses(self, batch: list[Record], at: Place) -> dict[str, Tensor]:
        """Its losses of a batch of its loader; the model must be in training mode."""
        with EventStorage(at.step):
            return self.model(batch)

    def after_update(self, step: int, finite: Tensor) -> None:
        """Nothing follows the weights."""

    def observe(self, step: int) -> dict[str, float]:
        """Nothing is measured beside the losses."""
        return {}

    def evaluate(self, step: int) -> dict[str, float]:
        """COCO's average precision on the validation images."""
        setting, config = self._setting, self._setting.config
        self.latest = evaluate_model(
            self.model, setting.val, config.img_size, setting.device, config.eval_precision, setting.num_workers,
            config.out,
        )  # fmt: skip
        return {f"eval/{name}": value for name, value in average_precisions(self.latest.figures).items()}

    def pictures(self, step: int) -> dict[str, np.ndarray]:
        """Detections on a few validation images."""
        self._native.load_state_dict(from_detectron2(self.model.state_dict())[0])
        return {"detections": draw_validation(self._setting, self._native)}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All of the detector's parameters, under detectron2's names."""
        return self.model.named_parameters()

    def modules(self) -> Mapping[str, nn.Module]:
        """The detector."""
        return {"detector": self.model}


def train(
    setting: Setting, native: MaskRCNN, checkpoint: Checkpoint | None, begun: Begun
) -> tuple[Progress, Evaluated | None]:
    """Train to the end of the plan.

    Args:
        native: the detector that this suite would train; detectron2's begins with its weights.
    Returns: the final progress, and what the last evaluation found.
    Raises: what `core.foreign_trainer.alongside` raises; NumericError for losses that are not finite.
    """
    config, device = setting.config, setting.device
    bf16 = uses_bf16(device, config.engine.precision)
    if bf16 and device.type != "cuda":
        raise ConfigError("engine.precision=bf16: detectron2's trainer has it on a GPU only; give fp32")
    seed = (config.seed + (checkpoint.step if checkpoint else 0)) % 2**32  # other draws after a restart than before it
    seed_everything(seed)
    weights = native.state_dict()
    model = build_detectron2(setting.vit.config, setting.detector, config.img_size, config.drop_path, weights)
    task = Detectron2Task(model.to(device), native, setting)
    run = begun.fit_of(task, lambda: optimizer(config, model, setting.vit.config.depth), rate(config), None)
    with quiet(), alongside(task, run, checkpoint, "detectron2") as beside:
        if beside.progress.step < config.steps:
            loader = train_loader(
                setting.train, config.img_size, config.jitter, config.batch_size, config.loader, setting.num_workers,
                seed,
            )  # fmt: skip
            _train(_trainer(task.model, loader, run.optimizer, bf16), multiplier(config), beside, config.steps)
        if task.latest is None:  # the run was finished before
            task.evaluate(beside.progress.step)
        return beside.progress, task.latest


def evaluate_loaded(
    config: DetectConfig, loaded: LoadedDetector, coco: CocoSet, device: torch.device, num_workers: int
) -> Evaluated:
    """Evaluate a detector directory on all images of a set, by detectron2 from image file to figure."""
    model = build_detectron2(
        loaded.model.backbone.vit.config, loaded.config, loaded.side, 0.0, loaded.model.state_dict()
    )
    with quiet():
        return evaluate_model(
            model.to(device), coco, loaded.side, device, config.eval_precision, num_workers, config.out
        )


def _trainer(model: nn.Module, loader: Any, optimizer: torch.optim.Optimizer, bf16: bool) -> SimpleTrainer:
    if not bf16:
        return SimpleTrainer(model, loader, optimizer)
    unscaled = torch.amp.GradScaler("cuda", enabled=False)  # bf16 has the range of float32
    return AMPTrainer(model, loader, optimizer, grad_scaler=unscaled, precision=torch.bfloat16)


def _train(trainer: SimpleTrainer, schedule: ParamScheduler, beside: Alongside, steps: int) -> None:
    for group in trainer.optimizer.param_groups:
        group["initial_lr"] = group["lr"]  # what the schedule multiplies, also where it goes on
    trainer.register_hooks([hooks.LRScheduler(scheduler=schedule), _Recorder(beside)])
    try:
        trainer.train(beside.progress.step, steps)
    except FloatingPointError as error:
        raise NumericError(
            f"{str(error).splitlines()[0]} Nothing of it was saved; try a lower optim.lr, with another out= and "
            "--resume CHECKPOINT"
        ) from None


class _Recorder(HookBase):
    """Tells the run what a step of the trainer came to, under the names that all runs use."""

    def __init__(self, beside: Alongside) -> None:
        self._beside = beside
        self._step: dict[str, Any] = {}

    def before_step(self) -> None:
        # The largest rate is that of the heads, which all others are shares of.
        self._step = {"lr": max(group["lr"] for group in self.trainer.optimizer.param_groups)}

    def after_backward(self) -> None:
        gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        self._step["grad_norm"] = torch.nn.utils.get_total_norm(gradients)

    def after_step(self) -> None:
        latest = {name: value for name, (value, _) in self.trainer.storage.latest().items()}
        losses = {name: value for name, value in latest.items() if name.startswith("loss_")}
        self._beside.after_step({**losses, "loss": latest["total_loss"], **self._step}, latest["data_time"])


def optimizer(config: DetectConfig, model: nn.Module, depth: int) -> torch.optim.AdamW:
    """AdamW with detectron2's groups: rates that fall from block to block towards the image. Spec detection 5.1 to 5.3.

    Args:
        depth: blocks of the ViT.
    """
    exempt: dict[str, Any] = {"weight_decay_norm": 0.0, "overrides": {"pos_embed": {"weight_decay": 0.0}}}
    if config.decay_rule == "vitdet_huge":
        exempt = {"weight_decay_norm": None, "overrides": {}}
    groups = get_default_optimizer_params(
        model,
        base_lr=peak_rate(config),
        lr_factor_func=partial(get_vit_lr_decay_rate, lr_decay_rate=config.layer_decay, num_layers=depth),
        **exempt,
    )
    return torch.optim.AdamW(
        groups, lr=peak_rate(config), betas=(config.optim.beta1, config.optim.beta2), weight_decay=config.weight_decay
    )


def multiplier(config: DetectConfig) -> ParamScheduler:
    """detectron2's schedule: what the rate is multiplied by, over the share of the run that is done."""
    drops = [step for step in config.drops() if step < config.steps]
    milestones = sorted(set(drops))
    stepped: ParamScheduler = ConstantParamScheduler(1.0)
    if milestones:
        values = [1.0, *(0.1 ** sum(drop <= step for drop in drops) for step in milestones)]
        stepped = MultiStepParamScheduler(values, num_updates=config.steps, milestones=milestones)
    if not config.warmup_steps:
        return stepped
    return WarmupParamScheduler(stepped, WARMUP_START, config.warmup_steps / config.steps)
