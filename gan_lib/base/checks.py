"""Checks of values, each of which names the value, what was expected and the cure."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, TypeVar

from gan_lib.base.errors import ParameterError

_T = TypeVar("_T")


def refuse_unknown_names(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise ParameterError for the first name that is not known, with the nearest that is."""
    known = list(known)
    for name in given:
        if name not in known:
            near = get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(known)}"
            raise ParameterError(f"there is no parameter {name!r}: {hint}")


def check_type(name: str, expected: type[_T], value: Any) -> _T:
    """Return `value` as `expected` (int, float, bool or str), widening only an int to a float.

    Raises:
        ParameterError: if the value has another type, or is a float that is not finite.
    """
    if expected is float and type(value) is int:
        value = float(value)
    # bool is a subclass of int in Python, so `batch_size=True` would pass an isinstance check.
    if type(value) is not expected:
        a = "an" if expected is int else "a"
        hint = ""
        if expected is float and isinstance(value, str):
            # YAML 1.1 reads 2e-4 as text: it wants a dot, 2.0e-4.
            with contextlib.suppress(ValueError):
                number = float(value)
                hint = f"; in YAML write it as {number}" if math.isfinite(number) else ""
        raise ParameterError(
            f"{name} is {value!r} ({type(value).__name__}), expected {a} {expected.__name__}{hint}"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ParameterError(f"{name} is {value}, expected a finite number")
    return value


def require_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise ParameterError unless the value is one of the choices."""
    if value not in choices:
        raise ParameterError(
            f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}"
        )


def require_range(name: str, value: float, low: float, high: float | None) -> None:
    """Raise ParameterError unless the value is from `low` to `high`; None is no upper end."""
    if high is None and value < low:
        raise ParameterError(f"{name} is {value}, expected {low} or more")
    if high is not None and not low <= value <= high:
        raise ParameterError(f"{name} is {value}, expected a value from {low} to {high}")
