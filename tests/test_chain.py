"""A chain: stages as commands, nothing done twice, nothing lost; and the demo, which is one."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from core.config import Config, load_config
from core.errors import ConfigError, DataError
from core.files import RunLock
from tests.tiny import draw_images, interrupted, tiny_overrides
from tools import chain
from tools.chain import load_chain, run_chain
from tools.chain_display import Display
from tools.cli import app
from tools.commands import begin_command, last_line

ROOT = Path(__file__).resolve().parent.parent
CHAIN = """
out: {out}
data: {{photos: photos, shapes: $out/world}}
set: {{cache: $out/cache}}
stages:
  pretrain:
    verb: pretrain
    recipe: {recipes}/pretrain.yaml
    set: {{data: $photos, probe: {{data: $photos}}}}
  tuned:
    verb: classify
    recipe: {recipes}/finetune.yaml
    set: {{data: $photos/labelled, backbone: $pretrain/backbone}}
  random:
    verb: classify
    recipe: {recipes}/finetune.yaml
    versus: tuned
    set: {{data: $photos/labelled, backbone: $pretrain/backbone, init: random}}
"""

# In place of a verb: writes down that it ran, and leaves what a finished run leaves.
STAGE = """
import json, pathlib, sys, time
out = pathlib.Path(next(text[4:] for text in sys.argv[2:] if text.startswith("out=")))
out.mkdir(exist_ok=True)
with (out.parent / "ran").open("a") as file:
    file.write(out.name + "\\n")
print("step 3/4", flush=True)
behaviour = json.loads((out.parent / "behaviour.json").read_text()).get(out.name, {})
time.sleep(behaviour.get("sleep", 0))
print(behaviour.get("say", "done"), flush=True)
if "code" in behaviour:
    sys.exit(behaviour["code"])
(out / "config.yaml").write_text("protocol: finetune\\n")
(out / "summary.json").write_text(json.dumps({"status": "done", "figures": behaviour.get("figures", {})}))
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "chain.yaml"
    path.write_text(CHAIN.format(out=tmp_path / "out", recipes=ROOT / "configs" / "demo"))
    return path


Behave = Callable[..., None]


@pytest.fixture
def behave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Behave:
    """Stages that do nothing but what they are told: figures, code, sleep, say, by the name of the stage."""
    (tmp_path / "out").mkdir()

    def begin(arguments: Sequence[str], log: Path) -> subprocess.Popen:
        with log.open("ab") as file:
            return subprocess.Popen([sys.executable, "-c", STAGE, *arguments], stdout=file, stderr=file)

    def tell(**behaviour: dict) -> None:
        (tmp_path / "out" / "behaviour.json").write_text(json.dumps(behaviour))

    monkeypatch.setattr(chain, "begin_command", begin)
    tell()
    return tell


def ran(tmp_path: Path) -> list[str]:
    """The stages that ran since this was asked last."""
    path = tmp_path / "out" / "ran"
    names = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return names


def nested(overrides: Sequence[str]) -> dict:
    """The tree of `a.b=value` texts."""
    return load_config(Free, None, [f"tree.{text}" for text in overrides]).tree


class Free(Config):
    tree: dict[str, Any]


def said(run: Callable[[Console], None]) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    run(console)
    return console.export_text()


# --- from a file to commands ----------------------------------------------------------------------------------------


def test_names_become_paths_and_stages_commands(path: Path, tmp_path: Path) -> None:
    _, (pretrain, tuned, random) = load_chain(path, ["set.seed=3", "stages.tuned.nproc=2"])
    out, recipes = tmp_path / "out", ROOT / "configs" / "demo"
    assert pretrain.command == [
        "pretrain", f"{recipes}/pretrain.yaml", f"cache={out}/cache", "seed=3", "data=photos", "probe.data=photos",
        f"out={out}/pretrain",
    ]  # fmt: skip
    assert tuned.command[-2:] == ["--nproc", "2"] and f"backbone={out}/pretrain/backbone" in tuned.command
    assert "init=random" in random.command and "data=photos/labelled" in random.command
    assert (pretrain.needs, tuned.needs, random.needs) == ((), ("pretrain",), ("pretrain",))


def test_a_dollar_sign_twice_is_one_and_none_elsewhere_means_anything(path: Path) -> None:
    _, stages = load_chain(path, ["data.photos=$$odd", "stages.pretrain.set.probe.data=a$photos"])
    assert {"data=$odd", "probe.data=a$photos"} <= set(stages[0].command)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("stages.tuned.set.backbone=$pretran/backbone", "stage tuned: $pretran/backbone: no such data set or earlier"),
        ("stages.pretrain.set.backbone=$tuned/x", "stage pretrain: $tuned/x: no such data set or earlier stage"),
        ("stages.tuned.set.finetun.epochs=3", "stage tuned: command line: finetun: unknown key; did you mean"),
        ("stages.tuned.recipe=none.yaml", "none.yaml: No such file or directory; expected a YAML file"),
        ("stages.tuned.set.out=there", "stage tuned: set.out: is "),
        ("stages.tuned.verb=train", "command line: stages.tuned.verb: expected 'pretrain', 'classify'"),
        ("stages.tuned.recip=a", "command line: stages.tuned.recip: unknown key"),
        ("stages.random.versus=pretrain", "stages.random.versus: pretrain: expected an earlier stage of the same verb"),
        ("stages.tuned.versus=random", "stages.tuned.versus: random: expected an earlier stage of the same verb"),
        ("data.pretrain=x", "pretrain: names two things"),
        ("data.out=x", "out: names two things"),
        ("stages={}", "stages: give one or more of them"),
        ('stages={"../x": {verb: pretrain}}', "../x: expected a name of at most 64 letters"),
        ("stages.tuned.nproc=0", "command line: stages.tuned.nproc: expected"),
    ],
)
def test_every_fault_is_a_line_before_anything_begins(path: Path, override: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_chain(path, [override])
    assert line in str(caught.value) and "\n" not in str(caught.value)
    assert not (path.parent / "out").exists()


def test_faults_of_several_stages_are_told_at_once(path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_chain(path, ["stages.tuned.set.epoch=3", "stages.random.set.epoch=3"])
    assert len(str(caught.value).splitlines()) == 2


def test_the_verb_needs_a_file_and_a_dry_run_begins_nothing(path: Path) -> None:
    assert "needs a file of stages" in str(CliRunner().invoke(app, ["chain"]).exception)
    shown = CliRunner().invoke(app, ["chain", str(path), "--dry-run"]).output
    assert shown.count("\nrcmae ") == 4 and "rcmae report" in shown and not (path.parent / "out").exists()


# --- nothing twice, nothing lost ------------------------------------------------------------------------------------


def test_finished_stages_are_not_repeated(path: Path, tmp_path: Path, behave: Behave) -> None:
    behave(tuned={"figures": {"eval/top1_pct": 40.0}}, random={"figures": {"eval/top1_pct": 35.5}})
    text = said(lambda console: run_chain(path, [], console))
    assert ran(tmp_path) == ["pretrain", "tuned", "random"]
    assert "top-1: tuned 40.00 %, random 35.50 %: tuned is ahead by 4.50 points (one run each)" in text
    assert (tmp_path / "out" / "report.html").exists()
    again = said(lambda console: run_chain(path, [], console))
    assert ran(tmp_path) == [] and again.count("(before, ") == 3


def test_a_changed_stage_runs_again_and_so_does_what_was_made_from_it(
    path: Path, tmp_path: Path, behave: Behave
) -> None:
    run_chain(path, [], Console(quiet=True))
    ran(tmp_path)
    run_chain(path, ["stages.random.set.seed=4"], Console(quiet=True))
    assert ran(tmp_path) == ["random"]
    behave(pretrain={"figures": {"train/reconstruction": 1.0}})
    run_chain(path, ["stages.random.set.seed=4", "stages.pretrain.set.seed=1"], Console(quiet=True))
    assert ran(tmp_path) == ["pretrain", "tuned", "random"]
    (tmp_path / "out" / "tuned" / "summary.json").unlink()
    run_chain(path, ["stages.random.set.seed=4", "stages.pretrain.set.seed=1"], Console(quiet=True))
    assert ran(tmp_path) == ["tuned"]


def test_other_processes_are_no_other_stage(path: Path, tmp_path: Path, behave: Behave) -> None:
    run_chain(path, [], Console(quiet=True))
    ran(tmp_path)
    run_chain(path, ["nproc=2"], Console(quiet=True))
    assert ran(tmp_path) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pretrain": 3, "tuned": {"left": 4}}'])
def test_a_damaged_record_costs_commands_that_find_themselves_done(
    path: Path, tmp_path: Path, behave: Behave, content: str
) -> None:
    run_chain(path, [], Console(quiet=True))
    ran(tmp_path)
    (tmp_path / "out" / "chain.json").write_text(content)
    run_chain(path, [], Console(quiet=True))
    assert ran(tmp_path) == ["pretrain", "tuned", "random"]


def test_a_stage_that_fails_ends_the_chain_with_its_line_and_code(path: Path, tmp_path: Path, behave: Behave) -> None:
    behave(tuned={"code": 3, "say": "error: photos: no such folder"})
    with pytest.raises(DataError) as caught:
        run_chain(path, [], Console(quiet=True))
    assert str(caught.value) == f"stage tuned: {tmp_path}/out/tuned.log: photos: no such folder"
    assert ran(tmp_path) == ["pretrain", "tuned"]
    behave()
    run_chain(path, [], Console(quiet=True))
    assert ran(tmp_path) == ["tuned", "random"]


def test_two_chains_do_not_share_a_folder(path: Path, tmp_path: Path, behave: Behave) -> None:
    code = (
        "import sys; from core.files import RunLock; from pathlib import Path; lock = RunLock(Path(sys.argv[1]));"
        "print('held', flush=True); sys.stdin.read()"
    )
    lock = tmp_path / "out" / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(OSError, match="in use by pid"):
            run_chain(path, [], Console(quiet=True))
        other.communicate("")
    RunLock(lock).release()


def test_a_signal_stops_the_stage_and_the_same_command_goes_on(tmp_path: Path) -> None:
    draw_images(tmp_path / "data")
    overrides = [t for t in tiny_overrides(tmp_path / "data", tmp_path / "x", epochs=4000) if not t.startswith("out=")]
    tree = {"verb": "pretrain", "set": nested(overrides)}
    (tmp_path / "chain.yaml").write_text(json.dumps({"out": str(tmp_path / "out"), "stages": {"long": tree}}))
    command = [sys.executable, "-m", "tools.cli", "chain", str(tmp_path / "chain.yaml")]
    log = tmp_path / "out" / "long.log"
    code, told = interrupted(command, log)
    assert code == 75
    assert re.fullmatch(r"long: stopped by SIGTERM at step \d+, saved; .*\n", told)
    assert json.loads((tmp_path / "out" / "chain.json").read_text())["long"]["left"] is None
    epochs = 1 + int(re.findall(r"at step (\d+), saved", log.read_text())[-1]) // 6
    again = subprocess.run([*command, f"stages.long.set.epochs={epochs}"], capture_output=True, text=True)
    assert again.returncode == 2 and "holds a run with another epochs: 4000 -> " in again.stderr


def test_the_time_of_a_stage_is_that_of_all_its_attempts(path: Path, tmp_path: Path, behave: Behave) -> None:
    behave(pretrain={"sleep": 0.6, "code": 6})
    for _ in range(2):
        with pytest.raises(OSError):
            run_chain(path, [], Console(quiet=True))
    assert json.loads((tmp_path / "out" / "chain.json").read_text())["pretrain"]["seconds"] >= 1.2


# --- processes and what is shown ------------------------------------------------------------------------------------


def test_a_command_is_begun_anywhere_and_says_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "cli.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    process = begin_command(["report", "nowhere"], tmp_path / "log")
    assert process.wait() == 2
    assert last_line(tmp_path / "log") == "error: nowhere: no such folder; give run directories"
    assert last_line(tmp_path / "none") == ""


def test_on_a_terminal_there_is_one_bar_and_a_line_per_stage() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, emoji=False)
    with Display(console, ["pretrain", "detect"]) as display:
        display.begun("pretrain", "rcmae pretrain a.yaml")
        display.doing("step 3/4  [bold]odd[/bold]\x1b[31m")
        display.finished("pretrain", "k-NN top-1 3 %", 61, False)
        display.begun("detect", "rcmae detect <b>")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "1/2 pretrain  k-NN top-1 3 %  (0:01:01)" in text and "2/2 detect    rcmae detect <b>" in text
    assert "[bold]odd[/bold]\\x1b" in text


# --- the demo -------------------------------------------------------------------------------------------------------


def test_the_quick_demo_runs_every_stage_and_only_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.cli", "demo", "--quick", "--out", str(tmp_path / "demo")]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    stages = re.findall(r"^(\d/9) (\w+) +(.*)$", first.stdout, re.MULTILINE)
    assert len({name for _, name, _ in stages}) == 9 and len(stages) == 18
    for expected in (
        "k-NN top-1",
        "top-1",
        "box AP",
        "mIoU",
        "under corruption",
        "(one run each)",
        "9 runs",
        "report.html",
    ):
        assert expected in first.stdout
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "All are finished." in page and page.count("data:image/webp") == 6
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count("(before, ") == 9
