"""What the teacher does in a run: gradients of both losses against each other and against the last update.

Off by default. At a measured step the losses are computed once more, eagerly, and differentiated one by one; nothing of
that enters the training (a run ends in the same bits with and without).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from pydantic import PositiveInt
from torch import Tensor

from core.config import Config
from core.distributed import Processes
from core.plots import plot
from core.task import Place
from pretrain.mae import MaskedAutoencoder

AREA = "dynamics"


class DynamicsConfig(Config):
    """When what the teacher does is measured."""

    every_steps: PositiveInt | None = None  # optimizer steps between measurements; None: never, and then free


class Dynamics:
    """Measures every so many steps of a pretraining run; holds up to four copies of the student's weights meanwhile.

    Figures, all over the student's trainable parameters as one vector, g being gradients at the measured step:
        reconstruction_grad_norm, consistency_grad_norm: |g| of each loss as it is weighted in the total.
        cos_reconstruction_consistency: cosine between both.
        cos_reconstruction_previous, cos_consistency_previous: cosine of the step that each loss asks for (-g) with the
            update of the step before; below 0 it takes that update back. Absent where that step was not seen.
        teacher_distance: |teacher - student| after the update.
        effective_momentum: the share of the teacher's distance from the updated student that the EMA left.
    Source: Lee et al., ICLR 2023 (arXiv:2210.02077); spec section 8.
    """

    def __init__(
        self, every_steps: int, student: MaskedAutoencoder, teacher: MaskedAutoencoder | None, processes: Processes
    ) -> None:
        self._every, self._processes = every_steps, processes
        self._student = [p for p in student.parameters() if p.requires_grad]
        followed = zip(teacher.parameters(), student.parameters(), strict=True) if teacher else ()
        self._teacher = [t for t, s in followed if s.requires_grad]
        self._before: tuple[int, Tensor] | None = None  # a step, and the weights that it began with
        self._previous: Tensor | None = None  # update of the step before the measured one
        self._teacher_before: Tensor | None = None
        self._gradients: dict[str, Tensor] = {}  # sums over this process's micro-batches, by loss
        self._turns = 0

    def note(self, at: Place, losses: Callable[[], Mapping[str, Tensor]]) -> None:
        """Look at one micro-batch before it is trained on; `losses` computes its losses with a graph of their own."""
        if at.turn == 0:
            self._begin(at.step)
        if not self._due(at.step):
            return
        with torch.compiler.set_stance("force_eager"):  # compiled code keeps no graph for two
            for name, loss in losses().items():
                gradients = torch.autograd.grad(loss, self._student, retain_graph=True)
                self._gradients[name] = self._gradients.get(name, 0) + _flat(gradients)
        self._turns += 1

    def _begin(self, step: int) -> None:
        weights = _flat(self._student) if self._due(step) or self._due(step + 1) else None
        if self._due(step):
            known = self._before is not None and self._before[0] == step - 1
            self._previous = weights - self._before[1] if known else None  # type: ignore[operator,index]
            self._teacher_before = _flat(self._teacher) if self._teacher else None
            self._gradients, self._turns = {}, 0
        self._before = (step, weights) if weights is not None and self._due(step + 1) else None

    def figures(self, step: int) -> dict[str, float]:
        """What was measured in `step`, which has just been done; nothing for other steps. Every process calls it."""
        if not self._due(step):
            return {}
        gradients = {name: self._processes.mean_(g / self._turns) for name, g in self._gradients.items()}
        found = {f"{name}_grad_norm": torch.linalg.vector_norm(g) for name, g in gradients.items()}
        if len(gradients) == 2:
            found["cos_reconstruction_consistency"] = _cosine(*gradients.values())
        if self._previous is not None:
            found |= {f"cos_{name}_previous": _cosine(-g, self._previous) for name, g in gradients.items()}
        if self._teacher_before is not None:
            student, teacher = _flat(self._student), _flat(self._teacher)
            found["teacher_distance"] = torch.linalg.vector_norm(teacher - student)
            start = self._teacher_before - student
            found["effective_momentum"] = (teacher - student).dot(start) / start.dot(start)
        self._previous, self._teacher_before, self._gradients = None, None, {}
        return {f"{AREA}/{name}": value.item() for name, value in found.items()}

    def _due(self, step: int) -> bool:
        # The last step of each interval: its neighbour is seen too, unless a resumed run begins between the two.
        return (step + 1) % self._every == 0


@torch.no_grad()
def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1).float() for tensor in tensors])


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return a.dot(b) / (torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))


_PANELS = {
    "gradient norms": ("reconstruction_grad_norm", "consistency_grad_norm"),
    "cosines (with the previous update: below 0 takes it back)": (
        "cos_reconstruction_consistency", "cos_reconstruction_previous", "cos_consistency_previous",
    ),
    "distance of the teacher": ("teacher_distance",),
    "effective momentum of the teacher": ("effective_momentum",),
}  # fmt: skip


def draw_dynamics(rows: Sequence[Mapping[str, float]], path: Path, title: str) -> None:
    """Draw what was measured over the optimizer step, one panel per kind, into a PNG; `rows` are of metrics.jsonl."""
    with plot(path, (11, 7), title) as figure:
        figure.set_layout_engine("constrained")
        for axes, (panel, names) in zip(figure.subplots(2, 2).flat, _PANELS.items(), strict=True):
            for name in names:
                key = f"{AREA}/{name}"
                points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), linewidth=1.2, label=name.replace("_", " "))
            axes.set_title(panel, fontsize=10)
            axes.grid(alpha=0.3)
            axes.tick_params(labelsize=8)
            axes.set_xlabel("optimizer step", fontsize=8)
            if panel == "gradient norms":
                axes.set_yscale("log")
            if len(names) > 1:
                axes.legend(fontsize=8)
            if panel.startswith("cosines"):
                axes.axhline(0, color="grey", linewidth=0.8)
            if panel.startswith("effective"):  # else rounding in its seventh digit would fill the panel
                low, high = axes.get_ylim()
                axes.set_ylim(min(low, (low + high) / 2 - 0.005), max(high, (low + high) / 2 + 0.005))
                axes.ticklabel_format(useOffset=False)
