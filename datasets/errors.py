"""Errors of other libraries in the wording of ours."""

__all__ = ["one_line"]


def one_line(error: Exception) -> str:
    r"""Kind and message of an error, without line ends, at most 300 characters.

    Args:
        error: Any.

    Example:
        >>> from datasets.errors import one_line
        >>> one_line(ValueError("too\nlong"))
        'ValueError: too long'
    """
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
