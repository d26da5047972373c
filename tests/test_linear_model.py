"""The linear model's identities, and that the check of them can fail."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from pretrain import linear_model
from pretrain.linear_model import CASES, TOLERANCE, ordinary_run, residuals, single_past_steps
from tools.cli import app


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_identities_hold(case: linear_model.Case, seed: int) -> None:
    found = residuals(case, seed)
    assert found.lag < TOLERANCE
    assert found.consistency < TOLERANCE
    assert found.wrong_order > 1e-3  # the exponent is a test of the order of updates


def test_the_wrong_exponent_is_off_by_one_momentum() -> None:
    """Spec section 8: a relative error of 1 / momentum - 1 for constant rates, teacher after the step."""
    case = next(c for c in CASES if not c.varying and c.same_start and not c.teacher_first)
    assert residuals(case).wrong_order == pytest.approx(1 / 0.99 - 1, rel=1e-6)


def test_what_is_taken_back_falls_with_age_and_with_the_square_of_the_similarity() -> None:
    for point in single_past_steps(seed=3):
        assert point.share == pytest.approx(linear_model.MOMENTUM**point.age * point.similarity**2, abs=1e-9)


def test_in_an_ordinary_run_the_correction_opposes_updates_of_similar_features_and_leaves_others() -> None:
    run = np.array(list(ordinary_run(seed=5)))
    alike, apart = run[np.abs(run[:, 0]) > 0.5, 1], run[np.abs(run[:, 0]) < 0.05, 1]
    assert len(alike) > 20 and len(apart) > 20
    assert alike.max() < -0.05
    assert np.abs(apart).max() < 0.1


def test_the_verb_prints_every_case_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "new" / "linear.png"
    result = CliRunner().invoke(app, ["dynamics", "linear", "--out", str(picture)])
    assert result.exit_code == 0, result.output
    assert "both identities hold" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_identity_that_does_not_hold_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from core.errors import NumericError
    from tools.dynamics import check_and_draw

    exact = linear_model.lag_by_identity
    monkeypatch.setattr(linear_model, "lag_by_identity", lambda *args: exact(*args) * (1 + 1e-10))
    with pytest.raises(NumericError, match=r"off by 1\.0e-10"):
        check_and_draw(tmp_path / "linear.png")
    assert not list(tmp_path.iterdir())
