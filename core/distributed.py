"""The processes of a run: how they meet, agree, share results and leave. Models know nothing of them.

One process alone is the same object with nothing to do. Control goes as JSON over gloo, so that no pickle is involved;
tensors go over gloo on a CPU and NCCL on GPUs.
"""

import json
import os
import re
import signal
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from core.errors import (
    OUT_OF_MEMORY,
    DistributedError,
    MachineError,
    Preempted,
    RanksDisagree,
    RcmaeError,
    error_of,
    machine_error,
)
from core.watch import ENDING, SLOW_FACTOR, Watch
from core.worker import STOP_SIGNALS

T = TypeVar("T")
Tensors = dict[str, dict[str, Tensor]]


class Processes:
    """All processes of a run, as one of them sees them.

    Attributes:
        rank: number of this process; the first, 0, writes and speaks.
        size: how many there are.
        local_rank, local_size: the same among those of this machine.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1, watch: Watch | None = None
    ) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self._watch = watch

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def enter(self, phase: str, step: int = -1) -> None:
        """Note for the others what this process does now, one of the phases of `core.watch`."""
        if self._watch:
            self._watch.enter(phase, step)

    def gather(self, value: Any) -> list[Any]:
        """The JSON value of every process, in order of rank, on every process."""
        if self.size == 1:
            return [value]
        with self._waiting():
            data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(lengths, torch.tensor([len(data)]))
            longest = max(int(length) for length in lengths)
            rows = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(rows, torch.cat([data, data.new_zeros(longest - len(data))]))
        return [json.loads(bytes(row[: int(n)].tolist())) for row, n in zip(rows, lengths, strict=True)]

    def together(self, function: Callable[[], T], anonymous: bool = False) -> T:
        """The result of `function` here; an error that it raises on any process is raised on all.

        It names the process, unless all raised the same, or `anonymous`.
        """
        if self.size == 1:
            return function()
        result, error = None, None
        try:
            result = function()
        except RcmaeError as raised:
            error = raised
        except OSError as raised:
            error = machine_error(raised)
        faults = self.gather([error.exit_code, str(error), error.final] if error else None)
        for rank, fault in enumerate(faults):
            if fault:
                code, text, final = fault
                alike = all(other and other[1] == text for other in faults)
                everywhere = error_of(code, text if alike or anonymous else f"rank {rank}: {text}")
                everywhere.final = final
                raise everywhere
        return result  # type: ignore[return-value]

    def on_main(self, function: Callable[[], T]) -> T:
        """The JSON result of `function`, run on the first process only, on all; so is an error that it raises."""
        result = self.together(lambda: function() if self.is_main else None, anonymous=True)
        return self.gather(result)[0] if self.size > 1 else result  # type: ignore[return-value]

    def first_on_each_machine(self, function: Callable[[], T]) -> T:
        """The result of `function` here, run by one process per machine before the others: it may fill a cache."""
        one_machine = self.local_size == self.size
        early = self.together(lambda: function() if self.local_rank == 0 else None, anonymous=one_machine)
        late = self.together(lambda: function() if self.local_rank != 0 else None)
        return early if self.local_rank == 0 else late  # type: ignore[return-value]

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise RanksDisagree, naming the first fact and its values, unless the JSON facts are equal everywhere."""
        everywhere = self.gather(dict(facts))
        for name in facts:
            for rank, other in enumerate(everywhere):
                if other[name] != everywhere[0][name]:
                    raise RanksDisagree(
                        f"the processes differ in {name}: rank 0 has {_short(everywhere[0][name])}, "
                        f"rank {rank} has {_short(other[name])}; start all of them with the same"
                    )

    def any_(self, flags: Tensor) -> Tensor:
        """Flags (0 or 1, int32), set where they are on any process. In place; does not wait for the device."""
        if self.size > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return flags

    def mean_(self, values: Tensor) -> Tensor:
        """The mean over the processes. In place."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def stack(self, rows: Tensor) -> Tensor:
        """Tensors of one shape [*], of all processes: [size, *]."""
        if self.size == 1:
            return rows.unsqueeze(0)
        with self._waiting():
            parts = [torch.empty_like(rows) for _ in range(self.size)]
            dist.all_gather(parts, rows.contiguous())
        return torch.stack(parts)

    def spread(self, tensors: Tensors | None) -> Tensors:
        """The first process's tensors (on the CPU, by file stem and name), on all."""
        if self.size == 1:
            assert tensors is not None, "there is nobody else to have them from"
            return tensors
        layout = {
            stem: {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in group.items()}
            for stem, group in (tensors or {}).items()
        }
        result: Tensors = {}
        for stem, group in self.gather(layout)[0].items():
            result[stem] = {}
            for name, (shape, dtype) in group.items():
                tensor = tensors[stem][name] if tensors else torch.empty(shape, dtype=getattr(torch, dtype))
                with self._waiting():
                    dist.broadcast(tensor, src=0)
                result[stem][name] = tensor
        return result

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        if self._watch is None:
            yield
            return
        self._watch.wait(True)
        yield
        self._watch.wait(False)


class Planned(Processes):
    """Processes that are only counted, for a plan that is not carried out: nothing is asked of the others."""

    def on_main(self, function: Callable[[], T]) -> T:
        """The result of `function`."""
        return function()


@contextmanager
def joined(timeout_s: float) -> Iterator[Processes]:
    """Meet the other processes that torchrun started, where it did; leave with them.

    An error raised inside is told to all, and one of them speaks of it. A collective that fails because a process is
    gone becomes a DistributedError that names it.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Processes()
        return
    watch = _meet(rank, size, timeout_s)
    local_rank, local_size = (int(os.environ[key]) for key in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    processes = Processes(rank, size, local_rank, local_size, watch)
    try:
        yield processes
        processes.enter(ENDING)
        processes.gather(None)  # nobody leaves before all are done
    except Exception as error:
        _let_finish()
        _leave_with(error, watch, rank)
    watch.close()
    dist.destroy_process_group()


def _leave_with(error: Exception, watch: Watch, rank: int) -> NoReturn:
    """Tell the others of an error, and raise it as what it is."""
    known: Exception = error
    if isinstance(error, Preempted):
        error.speaks = rank == 0  # all have stopped alike
    elif _is_lost_contact(error):
        known = _explained(error, watch)
        known.speaks = watch.post(known.exit_code, str(known), known.final) and known.speaks
    else:
        if isinstance(error, torch.OutOfMemoryError):
            known = MachineError(OUT_OF_MEMORY)
        elif isinstance(error, OSError) and not isinstance(error, RcmaeError):
            known = machine_error(error)
        if isinstance(known, RcmaeError):
            known.speaks = watch.post(known.exit_code, str(known), known.final)
        else:
            watch.post(1, f"rank {rank}: a fault of ours: {type(error).__name__}", True)
    watch.close()
    raise known from None


def _let_finish() -> None:
    """Ignore signals from here: torchrun sends one to all when the first has failed, and each has a last word."""
    for number in STOP_SIGNALS:
        with suppress(ValueError):  # not the main thread
            signal.signal(number, signal.SIG_IGN)


def _meet(rank: int, size: int, timeout_s: float) -> Watch:
    start = timedelta(seconds=SLOW_FACTOR * timeout_s)
    longest = start + timedelta(seconds=60)  # for a collective: the watch is to notice first
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, _, _ = next(iter(rendezvous("env://", timeout=start)))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=longest)
        # A store may outlive an attempt, and attempts are not counted alike on all machines: keys of our own.
        came = Processes(rank, size).gather([uuid.uuid4().hex, socket.gethostname(), os.getpid()])
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        own = dist.TCPStore(address, port, None, False, timedelta(seconds=30))
    except (RuntimeError, OSError) as error:
        first = str(error).splitlines()[0]
        raise DistributedError(f"rank {rank}: could not meet the other {size - 1} processes: {first}") from None
    return Watch(dist.PrefixStore(f"rcmae/{came[0][0]}", own), rank, [(host, pid) for _, host, pid in came], timeout_s)


def _is_lost_contact(error: Exception) -> bool:
    words = ("gloo", "NCCL", "Connection", "Broken pipe", "Socket", "recvValue", "sendBytes")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def _explained(error: Exception, watch: Watch) -> RcmaeError:
    here = watch.here
    fault = watch.fault_of_another(patience_s=1.5)
    if fault:
        known = error_of(fault["code"], fault["message"])
        known.speaks, known.final = False, fault["final"]
        return known
    gone = watch.gone()
    if gone:
        return DistributedError("; ".join(gone) + f"; noticed in {here}; the same command goes on")
    reason = re.sub(r"^\[.*?\] ?", "", str(error).splitlines()[0]).partition(". ")[0]
    return DistributedError(f"lost contact with another process in {here}: {reason}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
