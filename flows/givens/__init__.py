"""Orthogonal matrices and rotations from angles: plain functions on tensors."""

from flows.givens.dispatch import IMPLS, matrix, rotate
from flows.givens.recover import recover
from flows.givens.schedule import (
    Schedule,
    butterfly,
    cosine_sine,
    crossing,
    hurwitz,
    odd_even,
    round_robin,
)

__all__ = [
    "IMPLS",
    "Schedule",
    "butterfly",
    "cosine_sine",
    "crossing",
    "hurwitz",
    "matrix",
    "odd_even",
    "recover",
    "rotate",
    "round_robin",
]
