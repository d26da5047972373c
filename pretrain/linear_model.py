"""The linear model of RC-MAE, in which what the teacher does can be written down: what it takes back, and when.

A linear student S and its EMA teacher T see a masked input X' and must give X; both losses have weights P. With
D = S - T, residual R and gradient G = R X'^T of each step, two identities hold exactly (spec section 8):

    I1  D_t = A(0,t) D_0 - sum over i < t of  rate_i A(i,t) G_i,     A(i,t) = momentum_i ... momentum_(t-1)
    I2  the consistency gradient is that of I1 put in: past residuals R_i enter weighted by (X'_i^T X'_t) alone,

so the consistency loss takes back a past update as far as its features agree with the present ones. Source: Lee et al.,
ICLR 2023 (arXiv:2210.02077); spec section 8. float64 throughout.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from core.plots import plot

Array = NDArray[np.float64]

TOLERANCE = 1e-11  # relative, of both identities in float64
DIM, SAMPLES, STEPS, VISIBLE_SHARE, GAMMA = 24, 5, 60, 0.25, 0.7


@dataclass(frozen=True)
class Case:
    """One way to train the two maps."""

    varying: bool  # learning rate and momentum change from step to step
    same_start: bool  # T_0 = S_0
    teacher_first: bool  # the teacher is updated before the student's step, not after it

    def __str__(self) -> str:
        rates = "varying" if self.varying else "constant"
        start = "T0 = S0" if self.same_start else "T0 /= S0"
        return f"{rates} rates, {start}, teacher updated {'before' if self.teacher_first else 'after'} the step"


CASES = tuple(Case(*flags) for flags in product((False, True), (True, False), (False, True)))


class Step(NamedTuple):
    """What one step saw and did; B samples are columns."""

    visible: Array  # X', [d, B], hidden entries zero
    weight: Array  # P, [d, B]
    rate: float
    momentum: float
    residual: Array  # R, [d, B]
    lag: Array  # D before the step, [d, d]
    consistency: Array  # gradient of gamma times the consistency loss, [d, d]

    @property
    def gradient(self) -> Array:
        """G, [d, d]."""
        return self.residual @ self.visible.T


def train(case: Case, rng: np.random.Generator) -> list[Step]:
    """Train student and teacher for `STEPS` steps on random inputs; returns every step."""
    student = rng.normal(size=(DIM, DIM)) / np.sqrt(DIM)
    teacher = student.copy() if case.same_start else rng.normal(size=(DIM, DIM)) / np.sqrt(DIM)
    steps = []
    for t in range(STEPS):
        rate = 0.02 * (1 + 0.5 * np.sin(t)) if case.varying else 0.02
        momentum = 0.9 + 0.099 * t / STEPS if case.varying else 0.99
        x = rng.normal(size=(DIM, SAMPLES))
        seen = rng.random(x.shape) < VISIBLE_SHARE
        visible, weight = np.where(seen, x, 0.0), np.where(seen, 0.0, 1.0) / SAMPLES
        lag = student - teacher
        apart = 2 * GAMMA * weight * (lag @ visible)
        residual = 2 * weight * (student @ visible - x) + apart
        steps.append(Step(visible, weight, rate, momentum, residual, lag, apart @ visible.T))
        before, student = student, student - rate * steps[-1].gradient
        followed = before if case.teacher_first else student
        teacher = momentum * teacher + (1 - momentum) * followed
    return steps


def decay(steps: list[Step], i: int, t: int) -> float:
    """A(i, t): the product of the momenta of steps i to t - 1."""
    return float(np.prod([step.momentum for step in steps[i:t]]))


def lag_by_identity(steps: list[Step], t: int, teacher_first: bool) -> Array:
    """D_t as the weighted sum of past updates, I1: [d, d]."""
    total = decay(steps, 0, t) * steps[0].lag
    for i in range(t):
        total = total - steps[i].rate * decay(steps, i + teacher_first, t) * steps[i].gradient
    return total


def consistency_by_identity(steps: list[Step], t: int, teacher_first: bool) -> Array:
    """The consistency gradient of step t from past residuals and inner products of visible features, I2: [d, d]."""
    now = steps[t]
    total = decay(steps, 0, t) * steps[0].lag @ now.visible  # [d, B]
    for i in range(t):
        past = steps[i]
        total = total - past.rate * decay(steps, i + teacher_first, t) * past.residual @ (past.visible.T @ now.visible)
    return 2 * GAMMA * (now.weight * total) @ now.visible.T


class Residuals(NamedTuple):
    """Largest relative deviation over all steps from each identity, and from I1 with the other order's exponent."""

    lag: float
    consistency: float
    wrong_order: float


def residuals(case: Case, seed: int = 0) -> Residuals:
    """How far a training run is from both identities."""
    steps = train(case, np.random.default_rng(seed))
    first = case.teacher_first
    found = [
        (
            _relative(lag_by_identity(steps, t, first), steps[t].lag),
            _relative(consistency_by_identity(steps, t, first), steps[t].consistency),
            _relative(lag_by_identity(steps, t, not first), steps[t].lag),
        )
        for t in range(1, STEPS)
    ]
    return Residuals(*(max(column) for column in zip(*found, strict=True)))


def _relative(found: Array, wanted: Array) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


class TakenBack(NamedTuple):
    """What one correction by the teacher does about one past step."""

    similarity: float  # cosine of the visible features of both steps
    age: int  # steps between them
    share: float  # of the past step's effect on its own sample that is undone, divided by gamma times the rate


RATE, MOMENTUM = 0.02, 0.9  # of the two experiments below: one sample per step, nothing masked, P = 1/2, gamma = 1


def single_past_steps(seed: int = 0, ages: tuple[int, ...] = (1, 5, 15), number: int = 40) -> Iterator[TakenBack]:
    """One step on a sample, some on samples orthogonal to it, then one of chosen similarity: what is taken back.

    Measured from the consistency gradient itself, (S - T) x x^T; I2 says momentum^age * similarity^2.
    """
    rng = np.random.default_rng(seed)
    for age, _ in product(ages, range(number)):
        first, other = _orthonormal(rng, 2)
        similarity = rng.uniform(-1, 1)
        last = similarity * first + np.sqrt(1 - similarity**2) * other
        between = (x - (x @ first) * first - (x @ other) * other for x in rng.normal(size=(age - 1, DIM)))
        student = rng.normal(size=(DIM, DIM)) / np.sqrt(DIM)
        teacher = student.copy()
        effects = []
        for x in (first, *(x / np.linalg.norm(x) for x in between)):
            update, _ = _updates(student, teacher, x)
            effects.append(update @ first)
            student = student + update
            teacher = MOMENTUM * teacher + (1 - MOMENTUM) * student
        _, correction = _updates(student, teacher, last)
        effect = effects[0]
        yield TakenBack(similarity, age, -float((correction @ first) @ effect / (effect @ effect)) / RATE)


class Correction(NamedTuple):
    """One step of an ordinary run."""

    similarity: float  # cosine of this step's features with those of the step before
    cosine: float  # of the correction by the teacher with the update of the step before


def ordinary_run(seed: int = 0, num_steps: int = 600, num_directions: int = 6) -> Iterator[Correction]:
    """A run on samples about a few directions, some alike and some not: does the teacher oppose the last update?"""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(num_directions, DIM))
    student = rng.normal(size=(DIM, DIM)) / np.sqrt(DIM)
    teacher = student.copy()
    before: tuple[Array, Array] | None = None  # features and update of the last step
    for _ in range(num_steps):
        x = rng.choice((-1, 1)) * directions[rng.integers(num_directions)] + rng.uniform(0, 2) * rng.normal(size=DIM)
        x /= np.linalg.norm(x)
        update, correction = _updates(student, teacher, x)
        if before is not None:
            features, last = before
            size = np.linalg.norm(correction) * np.linalg.norm(last)
            if size > 0:
                yield Correction(float(features @ x), float((correction * last).sum() / size))
        before = x, update
        student = student + update
        teacher = MOMENTUM * teacher + (1 - MOMENTUM) * student


def _updates(student: Array, teacher: Array, x: Array) -> tuple[Array, Array]:
    """The whole update of one sample, and the teacher's part in it."""
    correction = -RATE * np.outer((student - teacher) @ x, x)
    return correction - RATE * np.outer(student @ x - x, x), correction


def _orthonormal(rng: np.random.Generator, number: int) -> Array:
    return np.linalg.qr(rng.normal(size=(DIM, number)))[0].T


def draw(path: Path) -> None:
    """Draw how the teacher's correction depends on feature similarity, both experiments, as a PNG."""
    with plot(path, (11, 4.6), f"Linear model, d = {DIM}, momentum {MOMENTUM}, one sample per step") as figure:
        figure.set_layout_engine("constrained")
        left, right = figure.subplots(1, 2)
        points = list(single_past_steps())
        grid = np.linspace(-1, 1, 101)
        for age, colour in zip(sorted({p.age for p in points}), ("tab:red", "tab:blue", "tab:green"), strict=True):
            left.plot(grid, MOMENTUM**age * grid**2, color=colour, linewidth=1)
            chosen = [p for p in points if p.age == age]
            label = f"{age} step{'s' if age > 1 else ''} ago"
            left.scatter([p.similarity for p in chosen], [p.share for p in chosen], s=14, color=colour, label=label)
        left.set_title("How much of one past step is taken back", fontsize=10)
        left.set_ylabel("share undone / (gamma x learning rate)")
        left.legend(title="measured; lines: identity I2", fontsize=8, title_fontsize=8)
        run = list(ordinary_run())
        right.scatter([c.similarity for c in run], [c.cosine for c in run], s=9, alpha=0.6)
        right.axhline(0, color="grey", linewidth=0.8)
        right.set_title("An ordinary run: the correction against the last update", fontsize=10)
        right.set_ylabel("cosine; below 0: it takes the update back")
        for axes in (left, right):
            axes.set_xlabel("cosine of visible features, past and present step")
            axes.grid(alpha=0.3)
