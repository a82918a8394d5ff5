"""Normalisation of rows by frozen weights, alone and after a residual addition, with its input gradient."""

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NormKind = Literal["rms", "rms_unit_offset", "layer"]


class Norm(NamedTuple):
    """What a norm does to each row x (D elements), with statistics in fp32.

    - `rms`: `round(x · rstd) · weight` with `rstd = (mean(x²) + eps)^-½`, rounded before the weight and after;
      Source: `LlamaRMSNorm` in transformers' `modeling_llama.py`.
    - `rms_unit_offset`: `x · rstd · (1 + weight)`, rounded once.  Source: `Gemma2RMSNorm` in `modeling_gemma2.py`.
    - `layer`: `(x − mean(x)) · rstd · weight + bias` with the variance in place of `mean(x²)`, rounded once.  Source:
      `torch.nn.LayerNorm`.
    """

    kind: NormKind
    weight_D: "Tensor"
    """Any float dtype; one other than x's is multiplied in fp32."""
    bias_D: "Tensor | None"
    """None but for `layer`."""
    eps: float
    dtype: "torch.dtype | None" = None
    """Of y, where that is not x's: the residual stream is wider than what it is multiplied in, under autocast."""
