"""mmengine's optimizer and schedules for a recipe."""

import contextlib
import io
import math
import warnings

import torch
from mmengine.hooks import ParamSchedulerHook
from mmengine.optim import LinearLR, OptimWrapper, PolyLR, build_optim_wrapper
from mmseg.engine.optimizers import LayerDecayOptimizerConstructor
from mmseg.models import EncoderDecoder

from core.engine import Plan, uses_bf16
from transfer.segmentation.settings import SegmentConfig

START_FACTOR = 1e-6  # of the warm-up, as published


def optim_wrapper(config: SegmentConfig, plan: Plan, model: EncoderDecoder, device: torch.device) -> OptimWrapper:
    """AdamW with the published constructor of groups: rates that fall from block to block, no decay of 1-D tensors.

    The norm of the gradient is always taken, so that it is logged; where the recipe does not clip it has no limit.
    Mixed precision is bf16, which needs no scaling of the loss.
    """
    optim = config.optim
    amp = uses_bf16(device, config.engine.precision)
    settings = {
        "type": "AmpOptimWrapper" if amp else "OptimWrapper",
        **({"dtype": "bfloat16", "loss_scale": 1.0} if amp else {}),
        "constructor": LayerDecayOptimizerConstructor,
        "paramwise_cfg": {"num_layers": len(model.backbone.layers), "layer_decay_rate": config.layer_decay},
        "optimizer": {
            "type": "AdamW",
            "lr": optim.lr,
            "betas": (optim.beta1, optim.beta2),
            "weight_decay": config.weight_decay,
            "fused": True,  # as here: the same steps, and counters on the device
        },
        "clip_grad": {"max_norm": math.inf if optim.clip_grad is None else optim.clip_grad},
        "accumulative_counts": plan.accumulation,
    }
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints every group
        warnings.simplefilter("ignore")  # the published name is deprecated
        return build_optim_wrapper(model, settings)


def schedulers(config: SegmentConfig, wrapper: OptimWrapper) -> list[LinearLR | PolyLR]:
    """mmengine's schedules, in optimizer steps."""
    warmup, steps = config.warmup_steps, config.steps
    decay = {"eta_min": 0.0, "power": 1.0, "begin": warmup, "end": steps, "by_epoch": False}
    first = [LinearLR(wrapper, start_factor=START_FACTOR, begin=0, end=warmup, by_epoch=False)] if warmup else []
    return [*first, PolyLR(wrapper, **decay)]


class OncePerStep(ParamSchedulerHook):
    """Steps the schedules with the optimizer, and not with every micro-batch."""

    def __init__(self, accumulation: int) -> None:
        self._accumulation = accumulation

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:  # type: ignore[no-untyped-def]
        """As `ParamSchedulerHook.after_train_iter`, after the last micro-batch of a step."""
        if (batch_idx + 1) % self._accumulation == 0:
            super().after_train_iter(runner, batch_idx, data_batch, outputs)
