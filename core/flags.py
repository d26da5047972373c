"""What the loop is told late and without waiting: non-finite steps, counted on the device, and signals to stop."""

import signal
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core.worker import STOP_SIGNALS

FLAG_DELAY_STEPS = 2


class Counts(NamedTuple):
    """What is known of the steps so far."""

    in_row: int = 0  # most non-finite steps in a row
    total: int = 0  # non-finite steps
    stop: int = 0  # 1: some process was asked to stop


class FlagReader:
    """Counts non-finite steps on the device, and reports them and stop flags late, without waiting for the device.

    What it reports is a function of the step asked for, so all processes act at the same step.
    """

    def __init__(self, device: torch.device) -> None:
        self._row = torch.zeros(2, dtype=torch.int32, device=device)  # in a row now, most in a row
        self._total = torch.zeros((), dtype=torch.int32, device=device)
        self._pending: deque[tuple[int, Tensor, Any]] = deque()
        self._counts = Counts()
        self._cuda = device.type == "cuda"

    def record(self, step: int, bad: Tensor, stop: Tensor) -> None:
        """Note the 0-dim int32 flags of a step; starts a copy to the host."""
        in_row = (self._row[0] + 1) * bad
        self._row = torch.stack([in_row, torch.maximum(self._row[1], in_row)])
        self._total = self._total + bad
        counts = torch.stack([self._row[1], self._total, stop])
        host = torch.empty(3, dtype=torch.int32, pin_memory=self._cuda).copy_(counts, non_blocking=True)
        event = torch.cuda.Event() if self._cuda else None
        if event:
            event.record()
        self._pending.append((step, host, event))

    def read(self, upto_step: int) -> Counts:
        """What was recorded up to and including a step."""
        while self._pending and self._pending[0][0] <= upto_step:
            _, host, event = self._pending.popleft()
            if event:
                event.synchronize()
            self._counts = Counts(*host.tolist())
        return self._counts


@contextmanager
def stop_signal() -> Iterator[list[str]]:
    """While open, a signal to stop appends its name to the yielded list instead of ending the process."""
    received: list[str] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(signal.Signals(number).name)

    previous = {}
    for number in STOP_SIGNALS:
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue  # nohup
        try:
            previous[number] = signal.signal(number, note)
        except ValueError:  # not the main thread: signals are somebody else's business
            break
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
