"""What `core.engine.fit` does around a step, around the steps of a trainer that is not this suite's.

The other trainer computes losses, takes gradients and updates weights; logging, evaluation, checkpoints and signals are
those of every run. One process only.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from core.checkpoint import Checkpoint
from core.engine import (
    Fit,
    Meter,
    Progress,
    evaluate,
    is_due,
    load_state,
    preempted,
    record_step,
    require_steps_left,
    restore,
)
from core.flags import stop_signal
from core.loader import Feed, worker_faults
from core.task import Task

logger = logging.getLogger("rcmae")


@dataclass(frozen=True)
class Alongside:
    """A run beside a foreign trainer, while that one trains.

    Attributes:
        progress: how far the run is; the trainer begins with step `progress.step`.
    """

    progress: Progress
    _task: Task
    _run: Fit
    _feed: Feed
    _meter: Meter
    _stopped: list[str]  # names of the signals that came

    def after_step(self, figures: dict[str, Any], wait_s: float) -> None:
        """Log, evaluate and save where it is due, after the trainer has finished a step.

        Args:
            figures: losses and the like of the step, numbers or 0-dim tensors.
            wait_s: seconds that the trainer waited in this step for data that came from no feed.
        Raises: Preempted after a signal, with the state saved; NumericError, before anything is written, for weights
            that are not finite.
        """
        self.progress.step += 1
        self._feed.wait_s += wait_s
        stop = bool(self._stopped) and self.progress.step < self._run.plan.total_steps
        due = is_due(self.progress.step, self._run) or stop
        record_step(self._task, self._feed, self.progress, self._run, self._meter, figures, due)
        if stop:
            raise preempted(self._stopped[0], self.progress.step)


@contextmanager
def alongside(
    task: Task, run: Fit, resumed: Checkpoint | None, trainer: str, feed: Feed | None = None
) -> Iterator[Alongside]:
    """Go on from a checkpoint, evaluate before the first step, and heed signals while the trainer trains.

    Args:
        task: its networks are what the trainer trains; its losses are not asked for.
        trainer: the printable name of the trainer, for the log.
        feed: what the trainer is fed from, if a run that goes on is to be as one that never stopped; the trainer then
            draws nothing that does not follow from the place in the run. None: it reads and draws for itself.
    Raises: CheckpointError for a checkpoint of another model; what a loader of the trainer's raises, as one line.
    """
    require_steps_left(resumed, run)
    if feed is not None:
        progress = Progress() if resumed is None else restore(task, resumed, run)
    else:
        feed = Feed((), accumulation=1, max_broken=0)  # what the trainer waited is counted here
        progress = Progress() if resumed is None else load_state(task, resumed, run.optimizer)
        if resumed is not None:
            logger.warning(
                "resumed from step %d of %d; not bit-exact from here: %s draws from global generators, and its order "
                "of images begins anew", progress.step, run.plan.total_steps, trainer,
            )  # fmt: skip
    with stop_signal() as stopped, worker_faults():
        if progress.step == 0:
            evaluate(task, run, 0)
        meter = Meter(feed, run, progress.step)
        try:
            yield Alongside(progress, task, run, feed, meter, stopped)
        finally:
            meter.stop()
