"""Parameter groups, optimizers, and schedules as pure functions of the optimizer step."""

import math
from collections.abc import Callable, Iterable, Sequence

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


def warmup_multistep(step: float, *, warmup_steps: float, start: float, milestones: Sequence[int]) -> float:
    """What the rate is multiplied by at an optimizer step: a linear warm-up, then a tenth from each milestone on.

    Args:
        start: the factor at step 0; it rises linearly to 1 at `warmup_steps`.
    Source: detectron2's ViTDet recipes; spec detection section 5.4.
    """
    share = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    dropped = sum(step >= milestone for milestone in milestones)
    return (start * (1 - share) + share) * 0.1**dropped


def warmup_poly(step: int, *, total_steps: int, warmup_steps: int, start: float = 1e-6, power: float = 1.0) -> float:
    """What the rate is multiplied by at an optimizer step: a linear warm-up, then a polynomial that ends at 0.

    The first step has the factor `start`; the last of the warm-up and the first after it have 1, the last of all has 0.
    Source: mmsegmentation's 160k recipes; spec segmentation section 7.3.
    """
    if step < warmup_steps:
        return start + (1 - start) * step / max(1, warmup_steps - 1)
    return max(0.0, 1 - (step - warmup_steps) / max(1, total_steps - warmup_steps - 1)) ** power


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
            (decayed if decays_but_biases(name, parameter) else plain).append(parameter)
    return [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def layer_decay_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    depth: int,
    layer_decay: float,
    weight_decay: float,
    *,
    prefix: str = "",
    decays: Callable[[str, nn.Parameter], bool] | None = None,
) -> list[dict]:
    """Groups of a ViT with a head for layer-wise rate decay: each has its `lr_scale` and weight decay.

    Class token, position table and patch embedding are layer 0, block i is layer i + 1, everything after is layer
    depth + 1; the scale is layer_decay ** (depth + 1 - layer).

    Args:
        prefix: what the names of the ViT's own parameters begin with; all others are layer depth + 1.
        decays: whether a parameter has weight decay; None: `decays_as_in_fine_tuning`.
    Source: the published fine-tuning of MAE; spec classify section 2.2, spec detection section 5.2.
    """
    rule = decays or decays_as_in_fine_tuning
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        layer = layer_of(name.removeprefix(prefix), depth) if name.startswith(prefix) else depth + 1
        decayed = rule(name, parameter)
        scale, decay = layer_decay ** (depth + 1 - layer), weight_decay if decayed else 0.0
        group = groups.setdefault((layer, decayed), {"params": [], "lr_scale": scale, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def decays_but_biases(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay for all but 1-D tensors and biases."""
    return parameter.ndim > 1 and not name.endswith(".bias")


def decays_as_in_fine_tuning(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay for all but 1-D tensors, class token and position table."""
    return parameter.ndim > 1 and name not in ("cls_token", "pos_embed")


def layer_of(name: str, depth: int) -> int:
    """Which layer a parameter of a ViT of so many blocks counts to: 0 is the embedding, depth + 1 what follows."""
    if name.startswith(("cls_token", "pos_embed", "patch_embed")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose matrices take steps in proportion to their own norm; biases take plain ones.

    For a tensor of more than one axis: g = g + weight_decay * p, then g = g * trust * |p| / |g| (1 where a norm is 0).
    Then buf = momentum * buf + g and p = p - lr * buf. Like the fused AdamW it leaves everything untouched where the
    0-dim attribute `found_inf` is not 0, decided on the device. Source: You et al., arXiv:1708.03888, as in the
    published linear probe of MAE (spec classify section 3), which timm's Lars is not.
    """

    def __init__(
        self, params: Iterable, lr: float = 0.0, weight_decay: float = 0.0, momentum: float = 0.9, trust: float = 0.001
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict) -> None:
        gradient = parameter.grad
        assert gradient is not None, "only parameters with a gradient are updated"
        if parameter.ndim > 1:
            gradient = gradient + group["weight_decay"] * parameter
            sizes, steps = torch.linalg.vector_norm(parameter), torch.linalg.vector_norm(gradient)
            ratio = group["trust"] * sizes / steps
            gradient = gradient * torch.where((sizes > 0) & (steps > 0), ratio, torch.ones_like(ratio))
        state = self.state[parameter]
        buffer = state.get("momentum_buffer")
        if buffer is None:
            buffer = state["momentum_buffer"] = torch.zeros_like(parameter)
        moved = group["momentum"] * buffer + gradient
        if self.found_inf is not None:
            moved = torch.where(self.found_inf == 0, moved, buffer)
        step = group["lr"] * moved if self.found_inf is None else group["lr"] * moved * (self.found_inf == 0)
        buffer.copy_(moved)
        parameter.sub_(step)


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
        # Adam's step counter stays where its kernel wants it: beside the parameter if that is fused, else on the host.
        parameter = by_name[name]
        same = value.shape == parameter.shape
        beside = parameter.device if optimizer.defaults.get("fused") else "cpu"
        optimizer.state[parameter][field] = like(value, parameter) if same else value.to(beside)
