"""Rotary position embedding in place; the inverse rotation is its gradient."""

from typing import TYPE_CHECKING

from fastft.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor


def rotary_width(x_THd: "Tensor", cos_Sd: "Tensor", sin_Sd: "Tensor") -> int:
    """How many of the first elements of each head are rotated: the tables' width.

    Raises:
        ModelError: the width is odd or more than the head size, or the tables differ or have no rows.
    """
    head_size, width = x_THd.shape[-1], cos_Sd.shape[-1]
    if width % 2:
        raise ModelError("rotary embedding needs an even width", got=width, fix="leave these heads unpatched")
    if cos_Sd.shape != sin_Sd.shape or width > head_size or (len(x_THd) and not len(cos_Sd)):
        raise ModelError(
            "rotary tables do not fit the heads",
            got=f"cos {tuple(cos_Sd.shape)}, sin {tuple(sin_Sd.shape)}",
            allowed=f"two tables of one shape, with rows, up to {head_size} wide",
            fix="pass the tables of these heads",
        )
    return width
