"""Running statistics of batch norm as part of an optimizer step: kept if the step counts, put back if not."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from core.distributed import Processes


class RunningStatistics:
    """What the batch norms of a network follow the batches with.

    A forward pass in training mode moves them at once. The loop learns later whether the step was finite, and passes
    once before the first step of several processes (`core.task.Task.losses`). So: `begin` before the forward passes of
    a step, `settle` after its update.
    """

    def __init__(self, network: nn.Module) -> None:
        norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
        buffers = [buffer for norm in norms for buffer in norm.buffers()]
        self._statistics = [buffer for buffer in buffers if buffer.is_floating_point()]  # means and variances
        self._buffers = [*self._statistics, *(buffer for buffer in buffers if not buffer.is_floating_point())]
        self._before: list[Tensor] | None = None

    @torch.no_grad()
    def begin(self) -> None:
        """Remember where the statistics are; if an earlier `begin` was not settled, go back there first."""
        if self._before is None:
            self._before = [buffer.clone() for buffer in self._buffers]
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(before)

    @torch.no_grad()
    def settle(self, finite: Tensor, processes: Processes) -> None:
        """Keep what was seen, as a mean over the processes; where the 0-dim bool `finite` is False, go back."""
        assert self._before is not None, "settle: there was no begin"
        if processes.size > 1 and self._statistics:
            mean = processes.mean_(torch.cat(self._statistics)).split([len(buffer) for buffer in self._statistics])
            torch._foreach_copy_(self._statistics, mean)
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(torch.where(finite, buffer, before))
        self._before = None
