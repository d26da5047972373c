"""Faults that are planted into the program of a forked run, by name: what the harness must be able to see."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace

import torch

import core.config
import core.engine
import core.parallel
import core.start
import pretrain.run
import tools.cli  # noqa: F401
from core.checkpoint import Checkpoint
from core.errors import DataError
from core.task import Place
from pretrain.rc_mae import RCMAETask


def plant(name: str) -> None:
    """Plant one of `FAULTS`."""
    FAULTS[name]()


def _after_restore(change: Callable) -> None:
    restore = core.engine.restore

    def changed(task: RCMAETask, checkpoint: Checkpoint, run: core.engine.Fit) -> core.engine.Progress:
        progress = restore(task, checkpoint, run)
        change(task, run, progress)
        return progress

    core.engine.restore = changed


def forget_teacher() -> None:
    """A resumed teacher starts anew, as a copy of the student."""
    _after_restore(lambda task, run, progress: task.teacher.load_state_dict(task.student.state_dict()))


def forget_moments() -> None:
    """A resumed optimizer keeps its step counters and loses its moments."""

    def change(task: RCMAETask, run: core.engine.Fit, progress: core.engine.Progress) -> None:
        for fields in run.optimizer.state.values():
            fields["exp_avg"].zero_()
            fields["exp_avg_sq"].zero_()

    _after_restore(change)


def forget_adam_step() -> None:
    """A resumed optimizer keeps its moments and loses its step counters."""

    def change(task: RCMAETask, run: core.engine.Fit, progress: core.engine.Progress) -> None:
        for fields in run.optimizer.state.values():
            fields["step"].zero_()

    _after_restore(change)


def forget_step() -> None:
    """A resumed run has its weights and counts its steps from 0 again: schedules, images, checkpoints."""
    start = core.start.starting_point

    def changed(*arguments: object) -> Checkpoint | None:
        found = start(*arguments)
        if found is None:
            return None
        return replace(found, step=0, state={**found.state, "progress": {**found.state["progress"], "step": 0}})

    core.start.starting_point = changed


def forget_sampler() -> None:
    """A resumed run reads the images from the beginning."""
    build = pretrain.run._build_feed
    pretrain.run._build_feed = lambda setting, checkpoint, processes: build(setting, None, processes)


def no_warm_up() -> None:
    """DDP's buckets are put in order during the first step."""
    core.parallel.Parallel.needs_warm_up = False


def _before_losses(change: Callable[[Place], None]) -> None:
    losses = RCMAETask.losses

    def changed(self: RCMAETask, batch: object, at: Place) -> dict[str, torch.Tensor]:
        change(at)
        return losses(self, batch, at)

    RCMAETask.losses = changed


def _poison(steps: range, part: str) -> None:
    losses = RCMAETask.losses

    def changed(self: RCMAETask, batch: object, at: Place) -> dict[str, torch.Tensor]:
        norm = self.student.norm
        forward = norm.forward
        if at.step in steps and part == "gradient":  # inside the network, where FSDP2 shows the whole weight
            norm.forward = lambda x: forward(x) + _NaNGradient.apply(norm.weight[3])
        found = losses(self, batch, at)
        norm.forward = forward
        if at.step in steps and part == "loss":
            found["reconstruction"] = found["reconstruction"] + float("nan")
        return found

    RCMAETask.losses = changed


class _NaNGradient(torch.autograd.Function):
    """0, with a gradient that is not a number."""

    @staticmethod
    def forward(context: object, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(context: object, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")


def nan_loss_once() -> None:
    """The loss is not a number at step 2."""
    _poison(range(2, 3), "loss")


def nan_gradient_once() -> None:
    """One entry of one gradient is not a number at step 2; the loss is."""
    _poison(range(2, 3), "gradient")


def nan_loss_from_step_3() -> None:
    """The loss is not a number from step 3 on."""
    _poison(range(3, 100), "loss")


def stuck_in_forward() -> None:
    """Sleeps for ever in the forward pass of step 2."""

    def sleep(at: Place) -> None:
        if at.step == 2:
            time.sleep(600)

    _before_losses(sleep)


def stopped_in_forward() -> None:
    """Is stopped like by Ctrl-Z, threads and all, in the forward pass of step 2."""
    _before_losses(lambda at: os.kill(os.getpid(), signal.SIGSTOP) if at.step == 2 else None)


def killed_in_forward() -> None:
    """Dies of SIGKILL in the forward pass of step 2."""
    _before_losses(lambda at: os.kill(os.getpid(), signal.SIGKILL) if at.step == 2 else None)


def raises_in_forward() -> None:
    """Meets a fault of ours in the forward pass of step 2."""

    def change(at: Place) -> None:
        if at.step == 2:
            raise KeyError("something unforeseen")

    _before_losses(change)


def other_code() -> None:
    """Runs another version of the program."""
    core.start.code_digest = lambda: "0123456789abcdef"


def other_configuration() -> None:
    """Is given another gamma."""
    load = core.config.load_config
    core.config.load_config = lambda kind, path, overrides: load(kind, path, [*overrides, "gamma=0.5"])


def other_data() -> None:
    """Sees one image fewer."""
    facts = pretrain.run._data_facts
    pretrain.run._data_facts = lambda *arguments: {**facts(*arguments), "images": 47}


def no_data() -> None:
    """Does not see the folder of images."""

    def refuse(*_: object) -> None:
        raise DataError("/data: no such file or folder")

    pretrain.run._open_source = refuse


def flipped_bit() -> None:
    """One bit of one weight of the student flips at step 2."""
    update = RCMAETask.after_update

    def changed(self: RCMAETask, step: int, finite: torch.Tensor) -> None:
        update(self, step, finite)
        if step == 2:
            bits = self.student.norm.weight.data.view(torch.int32)
            bits[3] ^= 1

    RCMAETask.after_update = changed


def slow_saves() -> None:
    """Every checkpoint takes three seconds."""
    save = core.engine._write

    def changed(*arguments: object) -> str:
        time.sleep(3)
        return save(*arguments)

    core.engine._write = changed


def frozen_batch_norms() -> None:
    """Batch norm is in evaluation mode throughout: no fault, but what PyTorch cannot synchronise on a CPU stays out."""
    norm = torch.nn.modules.batchnorm._BatchNorm
    norm.train = lambda self, mode=True: torch.nn.Module.train(self, False)


FAULTS = {
    function.__name__: function
    for function in (
        forget_teacher, forget_moments, forget_adam_step, forget_step, forget_sampler, no_warm_up, nan_loss_once, nan_gradient_once,
        nan_loss_from_step_3, stuck_in_forward, stopped_in_forward, killed_in_forward, raises_in_forward, other_code,
        other_configuration, other_data, no_data, flipped_bit, slow_saves, frozen_batch_norms,
    )
}  # fmt: skip
