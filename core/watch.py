"""Each process of a run watches the others, from a thread: a fault of one is known to all within two seconds.

Through the store that torchrun's rendezvous uses, not through collectives: those are what a stuck process blocks.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from core.errors import shown
from core.worker import leave

# What a process is doing, the least advanced first: of several that wait for each other, that is what they wait for.
START, EVALUATING, SAVING, LOADING, FIRST, FORWARD, BACKWARD, UPDATING, ENDING = (
    "start-up", "evaluation", "saving", "waiting for images", "first step", "forward", "backward", "update", "end",
)  # fmt: skip
_ORDER = (START, EVALUATING, SAVING, LOADING, FIRST, FORWARD, BACKWARD, UPDATING, ENDING)
_QUICK = (FORWARD, BACKWARD, UPDATING)
SLOW_FACTOR = 5  # the other phases may take so many times longer
INTERVAL_S = 1.0
_STORE_GONE = (RuntimeError, OSError)  # what its client raises when rank 0, which holds it, is dead or unreachable


class Watch:
    """The watch of one process over all. `enter` is called by the main thread, everything else happens in its own."""

    def __init__(self, store: dist.Store, rank: int, who: list[tuple[str, int]], timeout_s: float) -> None:
        """Begin to watch, when all have come.

        Args:
            store: a client of its own: a call that blocks in another thread would block this one.
            who: (host, process id) of every process, by rank.
            timeout_s: longest stay in one phase of a step; five times that for loading, saving, evaluation, start.
        """
        self._store, self._rank, self._size, self._timeout_s = store, rank, len(who), timeout_s
        self._phase: tuple[str, int, bool, float] = (START, -1, False, time.monotonic())
        self._beats = 0
        # Last beat of each other process of this machine, by rank.
        self._neighbours: dict[int, dict[str, Any]] = {
            other: {"pid": pid, "phase": START, "step": -1}
            for other, (host, pid) in enumerate(who)
            if other != rank and host == who[rank][0]
        }
        self._over = threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def enter(self, phase: str, step: int, waiting: bool = False) -> None:
        """Note what the main thread does now; `waiting`: for the other processes, in a collective."""
        self._phase = (phase, step, waiting, time.monotonic())

    def wait(self, waiting: bool) -> None:
        """Note that the main thread begins or ends to wait for the others, in the phase that it is in."""
        phase, step, _, _ = self._phase
        self._phase = (phase, step, waiting, time.monotonic())

    @property
    def here(self) -> str:
        """Where the main thread is, in words."""
        return _words(self._phase[0], self._phase[1])

    def post(self, code: int, message: str, final: bool) -> bool:
        """Tell all processes of a fault; False if another was first. Ends the watch: this process is leaving."""
        self._over.set()
        mine = json.dumps({"rank": self._rank, "code": code, "message": message, "final": final})
        try:
            return self._store.compare_set("fault", "", mine) == mine.encode()
        except _STORE_GONE:
            return True

    def close(self) -> None:
        """End the watch; the holder of the store stays until the others have read it, five seconds at most."""
        self._over.set()
        self._thread.join(timeout=2 * INTERVAL_S)
        self._part()

    def _part(self, patience_s: float = 5.0) -> None:
        deadline = time.monotonic() + patience_s
        try:
            self._store.set(f"left/{self._rank}", "1")
            waited_for = set(range(self._size)) if self._rank == 0 else set()
            while waited_for and time.monotonic() < deadline:
                dead = {rank for rank, beat in self._neighbours.items() if not _alive(beat["pid"])}
                waited_for = {rank for rank in waited_for - dead if not self._store.check([f"left/{rank}"])}
                time.sleep(0.02)
        except _STORE_GONE:  # nobody left to wait for
            return

    def fault_of_another(self, patience_s: float) -> dict[str, Any] | None:
        """The fault that was posted, waiting for one for so long."""
        deadline = time.monotonic() + patience_s
        while True:
            try:
                if self._store.check(["fault"]):
                    return json.loads(self._store.get("fault"))
            except _STORE_GONE:
                return None
            if time.monotonic() > deadline:
                return None
            time.sleep(0.1)

    def gone(self) -> list[str]:
        """Processes of this machine that have ended without a word, and what they were doing."""
        return [
            f"rank {rank} (pid {beat['pid']}) is gone; it was last seen in {_words(beat['phase'], beat['step'])}"
            for rank, beat in sorted(self._neighbours.items())
            if not _alive(beat["pid"]) and not self._has_left(rank)
        ]

    def _has_left(self, rank: int) -> bool:
        try:
            return self._store.check([f"left/{rank}"])
        except _STORE_GONE:  # with rank 0, which stays until all have left: it was not meant to
            return False

    def _run(self) -> None:
        failures = 0
        while not self._over.wait(0 if self._beats == 0 else INTERVAL_S):
            try:
                self._beat()
                if self._store.check(["fault"]):
                    fault = json.loads(self._store.get("fault"))
                    if fault["rank"] == self._rank:
                        return  # the main thread has just posted it, and says it itself
                    self._leave(fault["code"], fault["message"], fault["rank"], fault["final"], False)
                if self._stay() > self._allowance(self._phase[0], self._phase[2]):
                    self._report_stall()
                if any(not _alive(beat["pid"]) for beat in self._neighbours.values()):
                    self._report_gone()
                failures = 0
            except _STORE_GONE:
                failures += 1
                if failures == 5:
                    self._leave(7, "rank 0 is gone, or the network to it", 0, False, True)

    def _beat(self) -> None:
        phase, step, waiting, _ = self._phase
        self._beats += 1
        beat = {
            "beat": self._beats, "phase": phase, "step": step, "waiting": waiting, "for_s": round(self._stay(), 1),
            "pid": os.getpid(), "line": self._line(),
        }  # fmt: skip
        self._store.set(f"beat/{self._rank}", json.dumps(beat))
        self._neighbours |= {rank: beat for rank, beat in self._read_beats().items() if rank in self._neighbours}

    def _stay(self) -> float:
        return time.monotonic() - self._phase[3]

    def _allowance(self, phase: str, waiting: bool) -> float:
        # Who waits is patient: the one that is waited for runs out of time first, and knows best where it is.
        return self._timeout_s * (1 if phase in _QUICK else SLOW_FACTOR) + (3 * INTERVAL_S if waiting else 0)

    def _report_gone(self) -> None:
        # The main thread usually notices first, in a collective that fails; under NCCL it would wait on.
        if self._over.wait(2 * INTERVAL_S):
            return
        gone = self.gone()
        if gone:
            text = "; ".join(gone) + "; the same command goes on"
            self._leave(7, text, self._rank, False, self.post(7, text, False))

    def _report_stall(self) -> None:
        before = self._read_beats()
        for _ in range(4):  # beating on: the others may be looking too
            time.sleep(INTERVAL_S)
            self._beat()
        now = self._read_beats()
        frozen = [r for r in now if r != self._rank and before.get(r, {}).get("beat") == now[r]["beat"]]
        busy = {r: b for r, b in now.items() if not b["waiting"]} or now
        behind = [r for r in busy if _place(busy[r]) == min(map(_place, busy.values()))]
        if frozen:
            beat = now[frozen[0]]
            text = f"{_ranks(frozen)} silent: stopped, or its machine is; last in {_words(beat['phase'], beat['step'])}"
        else:
            beat = now[behind[0]]
            if beat["for_s"] <= self._allowance(beat["phase"], beat["waiting"]):
                return  # what is waited for may take longer than waiting itself
            where = f"{_words(beat['phase'], beat['step'])} ({beat['line']})"
            text = f"{_ranks(behind)} stuck for {beat['for_s']:.0f} s in {where}"
        text += "; give the same command again to go on, with a higher engine.timeout_s if that is how long it takes"
        self._leave(7, text, self._rank, False, self.post(7, text, False))

    def _line(self) -> str:
        """The innermost line of ours that the main thread is in."""
        frame = sys._current_frames().get(self._main or 0)
        root = str(Path(__file__).resolve().parent.parent)
        inner, ours = frame, None
        while frame is not None:
            path = frame.f_code.co_filename
            if ours is None and path.startswith(root) and "site-packages" not in path:
                ours = frame
            frame = frame.f_back
        found = ours or inner
        if found is None:
            return "no stack"
        return f"{shown(Path(found.f_code.co_filename).name)}:{found.f_lineno} in {found.f_code.co_name}"

    def _read_beats(self) -> dict[int, dict[str, Any]]:
        keys = {rank: f"beat/{rank}" for rank in range(self._size)}
        return {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._store.check([key])}

    def _leave(self, code: int, message: str, rank: int, final: bool, speaks: bool) -> None:
        status = leave(code, [f"error: {line}" for line in message.splitlines()], speaks=speaks, final=final)
        self._over.set()
        self._part()
        os._exit(status)  # the main thread may wait for ever


def _place(beat: dict[str, Any]) -> tuple[int, int]:
    return (beat["step"], _ORDER.index(beat["phase"]))


def _words(phase: str, step: int) -> str:
    return phase if step < 0 else f"{phase} of step {step}"


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else "ranks " + ", ".join(map(str, sorted(ranks)))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False
