"""`--nproc`: the launcher, torchrun below it and the workers below that, as a user and a cluster meet them."""

import json
import signal
import time
from pathlib import Path

import pytest

from core.errors import ConfigError
from core.worker import Report
from tests.harness import ForkServer, kill, started
from tests.test_distributed import wait_for_step
from tests.test_resume import digest
from tests.tiny import tiny_overrides
from tools.launch import FAILURES, Launch, _outcome

LONG = {"batch_size": 12, "epochs": 5000, "checkpoint__every_steps": 20, "log__every_steps": 20}


def outcome(out: Path) -> dict:
    return json.loads((out / "outcome.json").read_text())


def test_a_killed_worker_is_started_again_once_and_nothing_is_lost(
    server: ForkServer, data: Path, tmp_path: Path
) -> None:
    shorter = {**LONG, "epochs": 20}
    reference, out = tmp_path / "reference", tmp_path / "out"
    assert server.run(tiny_overrides(data, reference, **shorter), tmp_path / "log", size=3) == 0
    with started(["pretrain", *tiny_overrides(data, out, **shorter), "--nproc", "3"]) as run:
        wait_for_step(out, 20)
        kill(run.workers()[1])
        code, said, complained = run.end()
    assert (code, complained) == (0, ""), complained
    assert outcome(out) == outcome(out) | {"outcome": "done", "code": 0, "restarts": 1}
    assert said.count("resumed from step") == 1
    assert "started again: rank 1 (pid" in said and "is gone" in said
    assert digest(out) == digest(reference)


def test_a_signal_to_the_launcher_saves_and_ends_with_75(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(["pretrain", *tiny_overrides(data, out, **LONG), "--nproc", "2"]) as run:
        wait_for_step(out, 20)
        begun = time.monotonic()
        for _ in range(3):  # somebody insists
            run.process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        code, _, complained = run.end()
    assert time.monotonic() - begun < 30
    assert code == 75
    (line,) = complained.splitlines()
    step = int(line.split("at step ")[1].split(",")[0])
    assert line == f"stopped by SIGTERM at step {step}, saved; the same command goes on"
    assert (out / "checkpoints" / f"step_{step:07d}").is_dir()
    assert outcome(out) == outcome(out) | {"outcome": "preempted", "code": 75, "signal": "SIGTERM", "restarts": 0}


@pytest.mark.parametrize("victim", ["agent", "launcher"])
def test_no_worker_outlives_a_killed_agent_or_launcher(data: Path, tmp_path: Path, victim: str) -> None:
    out = tmp_path / "out"
    with started(["pretrain", *tiny_overrides(data, out, **LONG), "--nproc", "2"]) as run:
        wait_for_step(out, 20)
        assert len(run.workers()) == 2
        kill(run.agent() if victim == "agent" else run.process.pid)
        code, _, complained = run.end(20)
    assert code == (7 if victim == "agent" else -9)
    if victim == "agent":
        assert complained == "error: torchrun was killed by SIGKILL; the same command goes on\n"


def test_no_worker_outlives_an_agent_killed_while_they_import(data: Path, tmp_path: Path) -> None:
    with started(["pretrain", *tiny_overrides(data, tmp_path / "out", **LONG), "--nproc", "3"]) as run:
        deadline = time.monotonic() + 240  # patience for a busy machine
        while len(run.workers()) < 3:
            assert time.monotonic() < deadline
        kill(run.agent())
        run.process.wait(20)
        run.assert_nobody_left()


def test_restarts_that_are_used_up_end_with_7_and_name_the_process(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["pretrain", *tiny_overrides(data, out, **LONG), "--nproc", "2", "--max-restarts", "0"]
    with started(arguments) as run:
        wait_for_step(out, 20)
        victim = run.workers()[1]
        kill(victim)
        code, _, complained = run.end()
    assert code == 7
    assert f"error: rank 1 (pid {victim}) was killed by SIGKILL" in complained and "Traceback" not in complained


def test_an_error_is_said_once_and_not_tried_again(data: Path, tmp_path: Path) -> None:
    arguments = tiny_overrides(data / "nowhere", tmp_path / "out", **LONG)
    with started(["pretrain", *arguments, "--nproc", "2"]) as run:
        code, said, complained = run.end()
    assert code == 3
    assert said == ""
    assert complained.startswith("error: ") and complained.count("\n") == 1 and "no such file" in complained
    with started(["pretrain", *tiny_overrides(data, tmp_path / "out"), "gama=1", "--nproc", "2"]) as run:
        code, _, complained = run.end()
    assert (code, complained) == (2, "error: command line: gama: unknown key; did you mean 'gamma'?\n")
    assert not (tmp_path / "out").exists()


def test_under_plain_torchrun_signals_and_codes_are_torchruns(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    torchrun = ["--standalone", "--nproc-per-node=2", "-m", "tools.cli", "pretrain"]
    with started([*torchrun, *tiny_overrides(data, out, **LONG)], "torch.distributed.run") as run:
        wait_for_step(out, 20)
        run.process.send_signal(signal.SIGTERM)
        code, _, complained = run.end()
    assert code == 1  # torchrun's own, after any signal
    assert complained.count("saved; the same command goes on") == 1
    assert not (out / "outcome.json").exists()
    with started([*torchrun, *tiny_overrides(data, out, **LONG, gamma=2)], "torch.distributed.run") as run:
        code, _, complained = run.end()
    assert code == 1
    assert complained.count("error: out=") == 1


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"nproc": 0}, "--nproc 0: expected 1 or more"),
        ({"nnodes": 2}, "--nnodes: needs --rdzv-endpoint HOST:PORT"),
        ({"nproc": 2, "rdzv_endpoint": "a:1"}, "--rdzv-endpoint: needs --nnodes"),
        ({"max_restarts": -1}, "--max-restarts -1: expected 0 or more"),
    ],
)
def test_launches_that_cannot_be(fields: dict, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        Launch(**fields)


def report(rank: int, code: int, line: str, attempt: int = 0, speaks: bool = True, final: bool = True) -> Report:
    return Report(rank, attempt, code, (line,), speaks, final)


OUTCOMES = {
    "done": (0, [], [report(0, 0, ""), report(1, 0, "")], 0, []),
    "one speaks for all": (1, [], [report(0, 3, "a", speaks=False), report(1, 3, "b")], 3, ["b"]),
    "a final fault before what followed": (
        1, [], [report(0, 7, "lost", 0, final=False), report(1, 3, "data", 1)], 3, ["data"],
    ),
    "saved": (1, ["SIGTERM"], [report(0, 75, "saved"), report(1, 75, "saved", speaks=False)], 75, ["saved"]),
    "a mended fault is forgotten": (0, [], [report(0, 7, "lost", 0, final=False), report(0, 0, "", 1)], 0, []),
    "saved after a restart": (
        0, ["SIGTERM"], [report(0, 7, "lost", 0, final=False), report(0, 75, "saved", 1)], 75, ["saved"],
    ),
    "stopped before anything": (
        1, ["SIGINT"], [], 75,
        ["stopped by SIGINT, nothing new was saved; the same command goes on from the last checkpoint"],
    ),
    "out of restarts": (1, [], [report(0, 7, "lost", 3, final=False)], 7, ["lost"]),
    "out of restarts, of memory": (1, [], [report(0, 6, "memory", 3, final=False)], 6, ["memory"]),
    "no word": (1, [], [], 7, ["error: torchrun ended with status 1; the same command goes on"]),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTCOMES)
def test_outcomes(tmp_path: Path, name: str) -> None:
    status, stopped, reports, code, lines = OUTCOMES[name]
    assert _outcome(status, stopped, reports, tmp_path) == (code, lines)


def test_the_killed_are_named_and_those_that_torchrun_ended_are_not(tmp_path: Path) -> None:
    (tmp_path / FAILURES).write_text(json.dumps([[0, 11, -15], [2, 13, -9], [1, 12, 7]]))
    code, lines = _outcome(1, [], [report(1, 7, "error: lost", 0, final=False)], tmp_path)
    assert (code, lines) == (7, ["error: rank 2 (pid 13) was killed by SIGKILL", "error: lost"])
