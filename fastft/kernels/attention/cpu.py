"""PyTorch's tiled kernel for CPUs.

It knows neither grouped heads nor windows nor documents: keys and values are repeated, and a mask is built, for the
call.  Tensors are (B, S, heads, d): B batch, S tokens of a sequence, d head size.
"""

import torch

from fastft.kernels.attention.layout import Gradients, Saved, heads_first, repeat_kv, sum_kv
from fastft.kernels.attention.seen import Seen, additive, mask_of

_aten = torch.ops.aten
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def cpu_usable(q: torch.Tensor, seen: Seen) -> bool:
    """Whether the kernel can run queries like `q`."""
    return (
        q.device.type == "cpu"
        and q.dtype in _DTYPES
        and seen.softcap is None
        and not seen.written_out
        and (seen.mask is None or seen.mask.dim() == 4)
    )


def _mask(q: torch.Tensor, seen: Seen) -> torch.Tensor | None:
    B, S = q.shape[:2]
    return None if seen.is_causal_only(S) else additive(mask_of(seen, B, S, q.device), q.dtype)


def cpu_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Seen, scale: float
) -> tuple[torch.Tensor, Saved]:
    """See `fastft.kernels.attention.library.Attention`."""
    heads, mask = q.shape[2], _mask(q, seen)
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        *heads_first(q, repeat_kv(k, heads), repeat_kv(v, heads)), 0.0, mask is None, attn_mask=mask, scale=scale
    )
    return out.transpose(1, 2), (lse,)


def cpu_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, saved: Saved,
    seen: Seen, scale: float,
) -> Gradients:  # fmt: skip
    """See `fastft.kernels.attention.library.Attention`."""
    heads, kv_heads, mask = q.shape[2], k.shape[2], _mask(q, seen)
    dq, dk, dv = heads_first(
        *_aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *heads_first(dout, q, repeat_kv(k, heads), repeat_kv(v, heads), out), *saved, 0.0, mask is None,
            attn_mask=mask, scale=scale,
        )
    )  # fmt: skip
    return dq, sum_kv(dk, kv_heads), sum_kv(dv, kv_heads)
