"""Arguments refused at the public door, in one wording."""

__all__ = ["check_at_least", "check_positive"]


def check_at_least(minimum: float, **values: float) -> None:
    """Refuse named values below ``minimum``, NaN included."""
    for name, value in values.items():
        if not value >= minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}.")


def check_positive(**values: float) -> None:
    """Refuse named values that are not greater than zero, NaN included."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be greater than 0, got {value}.")
