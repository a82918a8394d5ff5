"""What one forward tells layers of one kind.

Legend: B batch, S sequence, D model, d head size.
"""

import torch

from fastft.engine.parts import StepContext
from fastft.engine.state import EngineSettings
from fastft.kernels.attention.library import Seen, choose_attention


def context_of(
    settings: EngineSettings,
    hidden_BSD: torch.Tensor,
    seen: Seen,
    angles: tuple[torch.Tensor, torch.Tensor],
    head_dim: int,
    dtype: torch.dtype,
    rows_R: torch.Tensor | None = None,
) -> StepContext:
    """The context of layers that may see `seen` and compute in `dtype`, with cosines and sines (1 or B × S × d).

    `rows_R` are the real tokens where the others are left out.
    """
    B, S, _ = hidden_BSD.shape
    cos, sin = (t.reshape(-1, t.shape[-1]).to(hidden_BSD.dtype) for t in angles)
    if rows_R is not None:
        # Row t of the angles is that of token t % S; with padding left out, each real token gets its own.
        cos, sin = (t.index_select(0, rows_R % t.shape[0]) for t in (cos, sin))
    # The queries do not exist yet; what they will look like decides.
    like_queries = hidden_BSD.new_empty((), dtype=dtype).expand(B, S, 1, head_dim)
    attention = choose_attention(settings.attention, like_queries, seen)
    return StepContext(
        batch=B, tokens=B * S, attention=attention, cos_Sd=cos, sin_Sd=sin, seen=seen, rows_R=rows_R
    )  # fmt: skip


def why_other_kernel(settings: EngineSettings, context: StepContext) -> str | None:
    """Why attention is not the one that was asked for, or None."""
    if settings.attention in ("auto", context.attention.name):
        return None
    given = [name for name in ("mask", "window", "softcap", "documents") if getattr(context.seen, name) is not None]
    return f"{settings.attention} cannot run here with {' and '.join(given) or 'causal attention'}"
