"""What the tests ask of comparisons with reference results, which `rcmae verify` makes too."""

from collections.abc import Iterable

from tools.verify.measure import Measure


def require(measures: Iterable[Measure]) -> None:
    """Every comparison within its tolerance, and at least one."""
    found = list(measures)
    assert found, "nothing was compared"
    failed = [f"{m.what}: {m.difference:.3g} > {m.tolerance:g}" for m in found if not m.passes]
    assert not failed, "; ".join(failed)
