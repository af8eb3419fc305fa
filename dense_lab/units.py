"""Numbers as people write them: `2M`, `4k`, `1%`. Decimal factors: k = 1e3, M = 1e6, G = B = 1e9, T = 1e12."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

_FACTORS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12, "%": 0.01}
_NUMBER = re.compile(r"([+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([kKMGBT%]?)")


def number(value: Any) -> Any:
    """`value` with its unit applied if it is a string such as `2M` or `1%`; anything else unchanged.

    Whole results are ints, so that `2M` may stand where an integer is asked for. `010` is not a number but a string
    in YAML 1.2 only if quoted; here both read as ten.
    """
    if isinstance(value, bool):
        # Python counts True as 1; in a study it is a slip.
        raise PydanticCustomError("number", "expected a number, got {got}", {"got": str(value).lower()})
    if not isinstance(value, str):
        return value
    match = _NUMBER.fullmatch(value.strip())
    if match is None:
        return value
    digits, unit = match.groups()
    scaled = float(digits.replace("_", "")) * _FACTORS[unit]
    # 0.1 * 0.01 and 1.1 * 10**6 pick up a last-bit error that nobody wrote.
    scaled = float(f"{scaled:.12g}")
    return int(scaled) if scaled.is_integer() and "e" not in digits.lower() and unit != "%" else scaled


def human(value: float, unit: str = "") -> str:
    """A count in three significant digits: `1.23M`, `45.6k`, `789`; `unit` is appended after a space."""
    for factor, suffix in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if float(f"{abs(value):.3g}") >= factor:
            return f"{value / factor:.3g}{suffix}" + (f" {unit}" if unit else "")
    return f"{value:.3g}" + (f" {unit}" if unit else "")


def counted(number: int, what: str) -> str:
    """`1 worker`, `2 workers`."""
    return f"{number} {what}" + "s" * (number != 1)


Count = Annotated[int, BeforeValidator(number), Field(gt=0)]
"""A positive whole number; accepts units."""
Size = Annotated[int, BeforeValidator(number), Field(ge=0)]
"""A whole number, zero allowed; accepts units."""
Positive = Annotated[float, BeforeValidator(number), Field(gt=0, allow_inf_nan=False)]
"""A number above zero; accepts units."""
NonNegative = Annotated[float, BeforeValidator(number), Field(ge=0, allow_inf_nan=False)]
"""A number from zero up; accepts units."""
Fraction = Annotated[float, BeforeValidator(number), Field(ge=0, le=1)]
"""A number from 0 to 1; accepts `%`."""
