"""Fixtures of all tests. `shared` is the folder of reference results beside the clone; without it tests skip."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """../shared beside the clone: golden files and small real data sets."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("../shared is absent: no reference results and data sets here")
    return folder
