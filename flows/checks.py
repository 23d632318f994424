"""Arguments refused at the public door, in one wording."""

import math

__all__ = ["check_at_least", "check_positive"]


def check_at_least(minimum: float, **values: float) -> None:
    """Refuse named values below ``minimum``, NaN included."""
    for name, value in values.items():
        if not value >= minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}.")


def check_positive(**values: float) -> None:
    """Refuse named values that are not finite and greater than zero, NaN included."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be finite and greater than 0, got {value}.")
