"""Values of config.json, each as what it must be or refused by its name. All raise UserError."""

import sys
from typing import Any

from dppo_jax.errors import UserError
from dppo_jax.files import shown

LARGEST = 2**31 - 1  # largest size: what an index of 32 bits reaches


def positive_int(value: Any, name: str, source: str) -> int:
    """A size."""
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise UserError(f"{source}: {name} must be a positive integer, not {shown(value)}")
    if value > LARGEST:
        raise UserError(f"{source}: {name} must be at most {LARGEST}, not {shown(value)}")
    return value


def positive(value: Any, name: str, source: str) -> float:
    """A finite number above 0."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise UserError(f"{source}: {name} must be a positive number, not {shown(value)}")
    return float(value)


def boolean(value: Any, name: str, source: str) -> bool:
    """true or false, and not 0 or 1."""
    if not isinstance(value, bool):
        raise UserError(f"{source}: {name} must be true or false, not {shown(value)}")
    return value


def int_or_null(value: Any, name: str, source: str) -> int | None:
    """A size, or null."""
    return None if value is None else positive_int(value, name, source)


def positive_or_null(value: Any, name: str, source: str) -> float | None:
    """A number above 0, or null."""
    return None if value is None else positive(value, name, source)


def boolean_or_null(value: Any, name: str, source: str) -> bool:
    """true or false; null is false."""
    return False if value is None else boolean(value, name, source)
