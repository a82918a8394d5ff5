"""Rotary position embedding in place; the inverse rotation is its gradient."""

from typing import TYPE_CHECKING

from fastft.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor


def check_rotary_shapes(x_THd: "Tensor", cos_Sd: "Tensor", sin_Sd: "Tensor") -> None:
    """Refuse what would rotate wrongly without an error: partial rotary tables and odd head sizes.

    Raises:
        ModelError: the head size is odd, or a table's width is not the head size, or a table has no rows.
    """
    head_size = x_THd.shape[-1]
    if head_size % 2:
        raise ModelError("rotary embedding needs an even head size", got=head_size, fix="leave these heads unpatched")
    if cos_Sd.shape != sin_Sd.shape or cos_Sd.shape[-1] != head_size or (len(x_THd) and not len(cos_Sd)):
        raise ModelError(
            "rotary tables do not fit the heads",
            got=f"cos {tuple(cos_Sd.shape)}, sin {tuple(sin_Sd.shape)}",
            allowed=f"two tables of the shape (S, {head_size})",
            fix="pass the rotated part of each head only: x[..., :rotary_size]",
        )
