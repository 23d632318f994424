"""Errors of other libraries in the wording of ours."""

__all__ = ["one_line"]


def one_line(error: Exception) -> str:
    """Kind and message of an error, without line ends, at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
