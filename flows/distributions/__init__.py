"""Base distributions: ``log_prob`` and ``sample``, on the module's device and in its dtype."""

from flows.distributions.normal import Normal

__all__ = ["Normal"]
