"""RC-MAE: a masked autoencoder whose EMA teacher must reconstruct the same hidden patches the same way.

Source: Lee et al., ICLR 2023 (arXiv:2210.02077); spec sections 2 to 4. MAE is the same task without a teacher.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from core.config import Config
from core.optim import cosine_momentum
from core.parallel import local
from core.task import Place
from core.transforms import normalize
from core.vit import gather_patches, patchify
from pretrain.data import PretrainBatch
from pretrain.dynamics import Dynamics
from pretrain.mae import MaskedAutoencoder, random_masking, reconstruction_target


class TeacherConfig(Config):
    """How the teacher follows and what it sees, beyond the flat keys `momentum` and `gamma`."""

    mask: Literal["same", "own"] = "same"  # own: another mask than the student's (RC-MAE-D of the paper's ablation)
    schedule: Literal["constant", "cosine"] = "constant"  # cosine: momentum rises to 1 over the run
    update: Literal["step", "micro_batch"] = "step"  # micro_batch: as the released code does with accumulation


@dataclass(frozen=True)
class Method:
    """The numbers of the method that the task needs."""

    mask_ratio: float
    norm_pix_loss: bool
    gamma: float
    momentum: float
    teacher: TeacherConfig
    total_steps: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class RCMAETask:
    """Reconstruction of hidden patches by the student, consistency with the teacher; see `core.task.Task`."""

    def __init__(
        self,
        student: MaskedAutoencoder,
        teacher: MaskedAutoencoder | None,
        method: Method,
        probe: Callable[[MaskedAutoencoder], dict[str, float]] | None = None,
        draw: Callable[[MaskedAutoencoder, MaskedAutoencoder | None], np.ndarray] | None = None,
        dynamics: Dynamics | None = None,
    ) -> None:
        """Tie a student to a teacher of the same sizes (None for MAE). The teacher starts as a copy of the student.

        Args:
            probe: figures from the branch that would be exported.
            draw: a picture of reconstructions.
            dynamics: measures what the teacher does.
        """
        self.student, self.teacher, self.method = student, teacher, method
        self._probe, self._draw, self._dynamics = probe, draw, dynamics
        if teacher is not None:
            teacher.load_state_dict(student.state_dict())
            teacher.requires_grad_(False)

    def losses(self, batch: PretrainBatch, at: Place) -> dict[str, Tensor]:
        """Mean squared errors over hidden patches: reconstruction, and gamma times consistency."""
        if self.method.teacher.update == "micro_batch" and at.turn > 0:
            # The released code also averages after each micro-batch that does not step the optimizer.
            self._update_teacher(at.step, torch.ones((), dtype=torch.bool, device=batch.images.device))
        if self._dynamics is not None:
            self._dynamics.note(at, lambda: self._losses(batch))
        return self._losses(batch)

    def _losses(self, batch: PretrainBatch) -> dict[str, Tensor]:
        dtype = self.student.mask_token.dtype
        images = normalize(batch.images, self.method.mean, self.method.std, dtype)
        patches = patchify(images, self.student.config.patch_size)  # [B, L, V]
        ids_keep, ids_hidden = random_masking(batch.noise, self.method.mask_ratio)
        target = reconstruction_target(gather_patches(patches, ids_hidden), self.method.norm_pix_loss)  # [B, M, V]
        prediction = self.student(patches, ids_keep, ids_hidden)  # [B, M, V]
        losses = {"reconstruction": hidden_patch_loss(prediction, target)}
        if self.teacher is not None:
            expected = self._teacher_prediction(batch, patches, ids_keep, ids_hidden)
            losses["consistency"] = self.method.gamma * hidden_patch_loss(prediction, expected)
        return losses

    @torch.no_grad()
    def _teacher_prediction(
        self, batch: PretrainBatch, patches: Tensor, ids_keep: Tensor, ids_hidden: Tensor
    ) -> Tensor:
        assert self.teacher is not None, "only RC-MAE has a teacher"
        if batch.teacher_noise is None:
            return self.teacher(patches, ids_keep, ids_hidden)
        # With its own mask the teacher may see what the student must predict; the student's mask decides what counts.
        teacher_keep, teacher_hidden = random_masking(batch.teacher_noise, self.method.mask_ratio)
        return gather_patches(self.teacher.predict_all(patches, teacher_keep, teacher_hidden), ids_hidden)

    def after_update(self, step: int, finite: Tensor) -> None:
        """Move the teacher towards the student, once per optimizer update; not at all where `finite` is False."""
        self._update_teacher(step, finite)

    @torch.no_grad()
    def _update_teacher(self, step: int, finite: Tensor) -> None:
        if self.teacher is None:
            return
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        # The fixed position tables are equal for ever and need no update. Sharded weights are averaged shard by shard.
        teachers, students = zip(*((local(t), local(s)) for t, s in pairs if s.requires_grad), strict=True)
        ema_update(list(teachers), list(students), self.momentum_at(step), finite)

    def momentum_at(self, step: int) -> float:
        """EMA momentum at an optimizer step."""
        if self.method.teacher.schedule == "constant":
            return self.method.momentum
        return cosine_momentum(step, momentum=self.method.momentum, total_steps=self.method.total_steps)

    def observe(self, step: int) -> dict[str, float]:
        """What the teacher did, where that is measured."""
        return self._dynamics.figures(step) if self._dynamics is not None else {}

    @property
    def exported(self) -> MaskedAutoencoder:
        """The branch that is exported by default and probed: the teacher where there is one, as published."""
        return self.teacher if self.teacher is not None else self.student

    def evaluate(self, step: int) -> dict[str, float]:
        """Figures of the k-NN probe, where one was given."""
        return self._probe(self.exported) if self._probe else {}

    def pictures(self, step: int) -> dict[str, np.ndarray]:
        """Reconstructions of a few fixed images."""
        return {"reconstructions": self._draw(self.student, self.teacher)} if self._draw else {}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The student's parameters; the teacher has no gradient."""
        return self.student.named_parameters()

    def modules(self) -> Mapping[str, nn.Module]:
        """Student and, where there is one, teacher."""
        return {"student": self.student} | ({"teacher": self.teacher} if self.teacher is not None else {})


def hidden_patch_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over hidden patches and their values, at least float32.

    Args:
        prediction: [B, M, V], carries the gradient.
        target: [B, M, V] pixels (reconstruction) or the teacher's predictions (consistency), constant.
    Returns: [] >= 0. The same number of patches is hidden in every image, so this plain mean is the published
        mask-weighted one (spec section 3).
    Raises: ValueError if the shapes disagree.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"hidden_patch_loss: {tuple(prediction.shape)} and {tuple(target.shape)} must be equal, [B, M, V]"
        )
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(dtype) - target.detach().to(dtype)).square().mean()


def ema_update(teacher: list[Tensor], student: list[Tensor], momentum: float, finite: Tensor) -> None:
    """In place, teacher = momentum * teacher + (1 - momentum) * student where the 0-dim `finite` holds, else nothing.

    One linear interpolation keeps constants exactly; its weight is a device tensor, so nothing waits for `finite`.
    """
    weight = finite.to(teacher[0].dtype) * (1.0 - momentum)
    torch._foreach_lerp_(teacher, student, [weight] * len(teacher))
