"""Rates and weight decay of the detection recipes, against detectron2's."""

import json
from pathlib import Path

import pytest

from core.optim import warmup_multistep


def test_the_published_schedules(shared: Path) -> None:
    recipes = json.loads((shared / "golden" / "detection_schedule.json").read_text())["recipes"]
    assert len(recipes) >= 2
    for recipe in recipes.values():
        share = recipe["iterations"] / 184375  # the warm-up was given as a share of the longest recipe
        for step, expected in recipe["multiplier"]:
            found = warmup_multistep(step, warmup_steps=250 * share, start=0.001, milestones=recipe["milestones"])
            assert found == pytest.approx(expected, abs=1e-9), step
