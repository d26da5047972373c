"""Parameter groups, optimizers, and schedules as pure functions of the optimizer step."""

import math
from collections.abc import Iterable

import torch
from pydantic import Field
from torch import Tensor, nn

from core.config import Config
from core.parallel import like


class OptimConfig(Config):
    """AdamW beyond the keys that stay flat. Defaults: MAE and RC-MAE, spec section 5.1."""

    lr: float | None = Field(None, ge=0)  # absolute peak rate; None: blr * batch_size / 256
    min_lr: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    clip_grad: float | None = Field(None, gt=0)  # largest total gradient norm; None: as published, not clipped


def peak_lr(blr: float, batch_size: int, lr: float | None = None) -> float:
    """The linear scaling rule, lr = blr * global batch / 256, unless an absolute `lr` is given."""
    return blr * batch_size / 256 if lr is None else lr


def warmup_cosine(epoch: float, *, lr: float, epochs: float, warmup_epochs: float, min_lr: float = 0.0) -> float:
    """Learning rate at a (fractional) epoch: linear from 0 over the warm-up, then half a cosine to `min_lr`.

    epoch = optimizer step / steps per epoch; the first step has rate 0 exactly. Source: spec section 5.2.
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def cosine_momentum(step: int, *, momentum: float, total_steps: int) -> float:
    """EMA momentum that rises from `momentum` at step 0 to 1 at `total_steps` along half a cosine (spec 4.1)."""
    return 1.0 + 0.5 * (momentum - 1.0) * (1.0 + math.cos(math.pi * step / total_steps))


def decay_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Two AdamW groups of the trainable parameters: no decay for 1-D tensors and biases, `weight_decay` for the rest.

    Class and mask tokens are 3-D and decay, as in the published runs. Source: spec section 5.1.
    """
    plain: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            (plain if parameter.ndim == 1 or name.endswith(".bias") else decayed).append(parameter)
    return [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def adamw(groups: list[dict], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW. Its `found_inf` input lets a non-finite step be suppressed on the device, without a host sync."""
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=1e-8, fused=True)


def optimizer_state(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """The optimizer's tensors under readable names, `<parameter>.<field>`, as a checkpoint stores them."""
    return {
        f"{names[parameter]}.{field}": value
        for parameter, fields in optimizer.state.items()
        for field, value in fields.items()
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, names: dict[Tensor, str], tensors: dict[str, Tensor]
) -> None:
    """Inverse of `optimizer_state`. Raises: ValueError if a parameter has no state there, or a state no parameter."""
    by_name = {name: parameter for parameter, name in names.items()}
    unknown = {key.rpartition(".")[0] for key in tensors} ^ {n for n, p in by_name.items() if p.requires_grad}
    if tensors and unknown:
        raise ValueError(f"optimizer state and parameters differ: {', '.join(sorted(unknown)[:5])}")
    for key, value in tensors.items():
        name, _, field = key.rpartition(".")
        # Adam's step counter stays where the fused kernel wants it: on the parameter's device, float32.
        parameter = by_name[name]
        same = value.shape == parameter.shape
        optimizer.state[parameter][field] = like(value, parameter) if same else value.to(parameter.device)
