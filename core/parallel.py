"""How the processes of a run share one gradient: DDP, or FSDP2 for what does not fit.

Models and tasks are written for one process; only their parameters change type under FSDP2, to DTensor.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from core.compiling import blocks
from core.distributed import Processes, Tensors
from core.task import Place, Task

Mode = Literal["ddp", "fsdp2"]
ModuleT = TypeVar("ModuleT", bound=nn.Module)
ENTRANCES = ("tokens", "feature_maps", "predict_all", "losses", "detect")  # besides forward, what tasks call


class Parallel:
    """A task among several processes, each of which takes its own micro-batches."""

    def __init__(self, task: Task, mode: Mode, processes: Processes) -> None:
        """Share out the modules of `task`; make the optimizer afterwards, FSDP2 replaces the parameters."""
        self._task = task
        self._ddp: DistributedDataParallel | None = None
        self._sharded: list[FSDPModule] = []
        self._replicated = processes.size > 1 and mode == "ddp"
        if self._replicated:
            # Of one image per process, gradients have strides of their own, which costs a copy and no more.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            # Not by device_ids: batches are moved by the engine.
            self._ddp = DistributedDataParallel(_Losses(task), gradient_as_bucket_view=True)
        elif processes.size > 1:
            device = next(p.device for _, p in task.named_parameters())
            mesh = init_device_mesh(device.type, (processes.size,))
            for module in task.modules().values():
                self._sharded += _shard(module, mesh)

    def losses(self, batch: Any, at: Place) -> dict[str, Tensor]:
        """The task's losses of one micro-batch of this process."""
        return self._ddp(batch, at) if self._ddp is not None else self._task.losses(batch, at)

    @contextmanager
    def exchange(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: gradients are exchanged in the `last` one of a step only."""
        for module in self._sharded:
            module.set_requires_gradient_sync(last, recurse=False)
        with nullcontext() if last or self._ddp is None else self._ddp.no_sync():
            yield

    @property
    def needs_warm_up(self) -> bool:
        """Whether one backward pass must precede the first step.

        DDP orders its buckets after the first backward pass of a process, and gradients are summed in the order of the
        buckets: without it the first step after a restart would round otherwise than in a run without one.
        """
        return self._replicated

    @property
    def replicated(self) -> bool:
        """Whether every process holds all weights, which must then be equal."""
        return self._replicated


class _Losses(nn.Module):
    """What DDP wraps: the losses of a task as a forward pass, its trained modules as children."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self._task = [task]  # in a list: a task may be a module itself
        self.trained = nn.ModuleDict(
            {n: m for n, m in task.modules().items() if any(p.requires_grad for p in m.parameters())}
        )

    def forward(self, batch: Any, at: Place) -> dict[str, Tensor]:
        return self._task[0].losses(batch, at)


def _shard(module: nn.Module, mesh: Any) -> list[FSDPModule]:
    # What a network returns is a view; nothing of ours writes into it, which is all that the warning is about.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    inner = blocks(module)
    for block in inner:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)  # a teacher has no backward pass that would
    for name in ENTRANCES:
        if hasattr(module, name):
            register_fsdp_forward_method(module, name)
    return [part for part in (*inner, module) if isinstance(part, FSDPModule)]


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; then every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(module: ModuleT, build: Callable[[], ModuleT]) -> ModuleT:
    """A network with whole weights: itself where it is not sharded, else a copy in what `build` makes.

    For calls that processes do not make equally often: those of a sharded network communicate. Every process must call
    this.
    """
    if not isinstance(module, FSDPModule):
        return module
    tensors = {name: full(tensor.detach()) for name, tensor in module.state_dict().items()}
    with torch.random.fork_rng(devices=[]):  # first weights are drawn from the global generator
        copy = build()
    copy.load_state_dict(tensors)
    return copy.to(next(module.parameters()).device).train(module.training)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor as `target` has it: on its device, and sharded where that is. Does not communicate."""
    if isinstance(target, DTensor):
        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    return value.to(target.device)


def gathered(tensors: Mapping[str, Mapping[str, Tensor]], processes: Processes) -> Tensors:
    """Whole tensors on the first process's CPU, by file stem and name; empty elsewhere. Every process must call it."""
    result: Tensors = {}
    for stem, group in tensors.items():
        for name, tensor in group.items():
            whole = full(tensor.detach())
            if processes.is_main:
                result.setdefault(stem, {})[name] = whole.cpu()
    return result


def fingerprints(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, int]:
    """A sum over the bits of every tensor, by name: one flipped bit changes it. Reads from the device once."""
    names = [f"{stem} {name}" for stem, group in tensors.items() for name in group]
    sums = [_bits(tensor).sum(dtype=torch.int64) for group in tensors.values() for tensor in group.values()]
    return dict(zip(names, torch.stack(sums).tolist(), strict=True)) if sums else {}


def _bits(tensor: Tensor) -> Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(kinds[tensor.element_size()])
