"""Numbers and foreign text as a report prints them."""

import math
import re
from collections.abc import Iterable

from reports.statistics import Estimate, Spread

MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"
NOTHING = "\N{EM DASH}"
_CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ufffe\uffff\ud800-\udfff]"
)


def number(value: float, digits: int = 4) -> str:
    """`value` to `digits` significant digits, with thousands separators.

    >>> number(12345.6), number(0.71894), number(0.000123456, 3), number(-3.0, 2)
    ('12,350', '0.7189', '1.23e−4', '−3.0')
    """
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    exponent = math.floor(math.log10(abs(rounded)))
    if exponent < -3:
        mantissa = rounded / 10.0**exponent
        text = f"{mantissa:.{digits - 1}f}e{exponent}"
    else:
        text = f"{rounded:,.{max(0, digits - 1 - exponent)}f}"
    return text.replace("-", MINUS)


def ratio(value: float) -> str:
    """`1.43×`."""
    return f"{number(value, 3)}×"


def percent(value: float) -> str:
    """A fraction of 1 as `71.9 %`."""
    return f"{100 * value:.1f} %" if math.isfinite(value) else number(value)


def points(value: float) -> str:
    """A difference of fractions in percentage points, with its sign: `+0.8`."""
    return f"{100 * value:+.1f}".replace("-", MINUS).replace("+0.0", "0.0").replace(f"{MINUS}0.0", "0.0")


def byte_unit(values: Iterable[float]) -> tuple[str, float]:
    """One unit for a whole column: GiB from 1 GiB on, else MiB."""
    return ("GiB", 2.0**30) if max(values, default=0) >= 2**30 else ("MiB", 2.0**20)


def span(spread: Spread | None, *, scale: float = 1.0) -> tuple[str, str]:
    """A spread as (median, `low–high`); no range is shown for one process or for equal values."""
    if spread is None:
        return NOTHING, ""
    low, high = number(spread.low / scale), number(spread.high / scale)
    return number(spread.median / scale), "" if low == high else f"{low}{DASH}{high}"


def interval(estimate: Estimate) -> str:
    """The interval in words: `95 % CI 1.38–1.49`, `95 % CI 0.97–1.04: ambiguous`, or why there is none."""
    if estimate.low is None or estimate.high is None:
        return f"too few processes for an interval ({estimate.processes})"
    if estimate.verdict == "equal":
        return "no difference in any process"
    if estimate.neutral == 0:
        bounds = f"{points(estimate.low)} to {points(estimate.high)}"
    else:
        bounds = f"{number(estimate.low, 3)}{DASH}{number(estimate.high, 3)}"
    return f"95 % CI {bounds}{': ambiguous' if estimate.verdict == 'ambiguous' else ''}"


def clean(text: object, limit: int = 400) -> str:
    """Foreign text as one line without control, direction or unpaired surrogate characters, cut at `limit`.

    This makes it printable, not safe: HTML and Markdown still escape it.
    """
    line = " ".join(_CONTROL.sub(" ", str(text)).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def plural(count: int, noun: str) -> str:
    """`1 process`, `3 processes`."""
    ending = "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending if count != 1 else ''}"
