"""`rcmae dynamics linear`: the identities of the linear model, checked and drawn."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from core.errors import NumericError, shown
from pretrain.linear_model import CASES, TOLERANCE, draw, residuals


def check_and_draw(out: Path) -> None:
    """Print how far each case is from identities I1 and I2, and draw the picture.

    Raises: NumericError if one is farther than `TOLERANCE`.
    """
    table = Table("case", "I1, lag", "I2, consistency gradient", "I1 of the other order")
    worst = 0.0
    for case in CASES:
        found = residuals(case)
        worst = max(worst, found.lag, found.consistency)
        table.add_row(str(case), f"{found.lag:.1e}", f"{found.consistency:.1e}", f"{found.wrong_order:.1e}")
    table.title, table.title_justify = "largest relative deviation over 60 steps, float64", "left"
    Console().print(table)
    if worst > TOLERANCE:
        raise NumericError(f"an identity of the linear model is off by {worst:.1e}, more than {TOLERANCE:.0e}")
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(out)
    print(f"both identities hold to {worst:.1e} (tolerance {TOLERANCE:.0e}); {shown(out)} shows the correction")
