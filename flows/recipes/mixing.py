"""What mixes the features of a recipe between the layers that bend them."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from flows.transforms import (
    Householder1x1,
    HouseholderRotation,
    LULinear,
    Permutation,
    Rotation,
    Rotation1x1,
    Transform,
)

__all__ = ["Mixing", "choose_mixing"]

Mixing = Literal["angles", "householder", "lu", "permutation"]


def choose_mixing(
    mixing: Mixing,
    *,
    init: Literal["identity", "haar"] = "identity",
    images: bool = False,
    volume_preserving: bool = False,
) -> Callable[[int], Transform]:
    """What makes a recipe's mixing layers, given their number of features or channels.

    * ``"angles"``: :class:`~flows.transforms.Rotation`, a rotation by learned angles.
    * ``"householder"``: :class:`~flows.transforms.HouseholderRotation`, a rotation as a
      product of as many reflections as reach every rotation.
    * ``"lu"``: :class:`~flows.transforms.LULinear`, a matrix of learned LU factors, whose
      volume is learned as well.
    * ``"permutation"``: :class:`~flows.transforms.Permutation`, a fixed random order.

    The first two preserve volume, and so does the last, which has no parameters. All have a
    cheap inverse. Every recipe takes these words as ``mixing``; its default is in its signature.

    Args:
        mixing: One of the four.
        init: Where learned layers start: at the identity, or at random orthogonal matrices
            (of determinant one for ``"householder"``, as pairs of reflections are).
        images: Whether axis 1 holds the channels of images.
        volume_preserving: Whether log|det| must be zero, which excludes ``"lu"``.

    Raises:
        ValueError: If ``mixing`` is none of these, or changes volume where it must not.

    Example:
        >>> from flows.recipes.mixing import choose_mixing
        >>> choose_mixing("householder", init="haar")(5)
        HouseholderRotation(features=5, reflections=4)
    """
    match mixing:
        case "angles":
            return partial(Rotation1x1 if images else Rotation, init=init)
        case "householder":
            start = "random" if init == "haar" else "identity"
            return partial(Householder1x1 if images else HouseholderRotation, init=start)
        case "lu":
            if volume_preserving:
                raise ValueError(
                    "mixing must be 'angles', 'householder' or 'permutation' in a flow that "
                    "preserves volume, which 'lu' changes; got 'lu'."
                )
            return partial(LULinear, init=init)
        case "permutation":
            return Permutation
        case _:
            raise ValueError(
                f"mixing must be 'angles', 'householder', 'lu' or 'permutation', got {mixing!r}."
            )
