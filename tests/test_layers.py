"""The order of the rooms: a package imports only what stands before it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "core": set(),
    "pretrain": {"core"},
    "transfer": {"core"},
    "robustness": {"core", "pretrain", "transfer"},
    "tools": {"core", "pretrain", "transfer", "robustness"},
}


def imported_modules(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_stands_before_it(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        rooms = {name.partition(".")[0] for name in imported_modules(path)}
        forbidden = rooms & ((set(ALLOWED) | {"tests"}) - ALLOWED[package] - {package})
        assert not forbidden, f"{path.relative_to(ROOT)} imports {forbidden}; {package} may import {ALLOWED[package]}"


def test_no_import_cycle() -> None:
    files = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts): p for room in ALLOWED for p in (ROOT / room).rglob("*.py")
    }
    graph = {name: imported_modules(path) & set(files) for name, path in files.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in done:
            for other in graph[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert len(done) > 20


def test_package_inits_hold_at_most_a_docstring() -> None:
    for room in ALLOWED:
        for path in (ROOT / room).rglob("__init__.py"):
            body = ast.parse(path.read_text()).body
            assert all(isinstance(node, ast.Expr) for node in body) and len(body) <= 1, path


def test_nothing_unpickles_or_evaluates() -> None:
    for room in ALLOWED:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                called = ast.unparse(node.func)
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                where = f"{path.relative_to(ROOT)}:{node.lineno} {called}"
                assert called not in {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "os.system"}, where
                assert not called.endswith((".extractall", ".extract")), where
                assert keywords.get("allow_pickle") != "True" and keywords.get("shell") != "True", where
                assert called != "torch.load" or keywords.get("weights_only") == "True", where


def test_only_these_files_know_of_other_processes() -> None:
    """Models, tasks and stages are written for one process; `core.distributed.Processes` is all they may ask."""
    knowing = {
        str(path.relative_to(ROOT))
        for package in ALLOWED
        for path in (ROOT / package).rglob("*.py")
        if any(name.startswith("torch.distributed") for name in imported_modules(path))
    }
    assert knowing == {"core/distributed.py", "core/parallel.py", "core/watch.py", "tools/launch.py"}
