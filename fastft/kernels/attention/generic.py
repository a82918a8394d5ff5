"""The fallback, on any device: PyTorch's public function, or scores written out where they are capped, under autograd.

It keeps nothing and runs its forward again in the backward.

Legend: B batch, S tokens of a sequence, R and C a chunk's queries and the keys that they may see, H query heads,
K key/value heads, G = H / K, d head size.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastft.kernels.attention.layout import Gradients, Saved, heads_first, repeat_kv
from fastft.kernels.attention.seen import Seen, mask_of

CHUNK_SCORES = 2**24
"""Capped scores that exist at a time, over all heads and rows of the batch; autograd keeps some 20 bytes for each."""

# With a mask, cuDNN's backward gives NaN where S % 128 is 64 (pytorch/pytorch#196678).
_WITH_A_MASK = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def sdpa_usable(q: torch.Tensor, seen: Seen) -> bool:
    """Always."""
    return True


def sdpa_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Seen, scale: float
) -> tuple[torch.Tensor, Saved]:
    """See `fastft.kernels.attention.library.Attention`."""
    with torch.no_grad():
        if seen.softcap is None and not seen.written_out:
            return _public(q, k, v, seen, scale), ()
        out = torch.empty_like(q)
        for rows, columns, mask in _chunks(q, seen):
            out[:, rows] = _written_out(q[:, rows], k[:, columns], v[:, columns], mask, seen.softcap, scale)
        return out, ()


def sdpa_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, saved: Saved,
    seen: Seen, scale: float,
) -> Gradients:  # fmt: skip
    """See `fastft.kernels.attention.library.Attention`."""
    if seen.softcap is None and not seen.written_out:
        q, k, v = _leaves(q, k, v)
        with torch.enable_grad():
            again = _public(q, k, v, seen, scale)
        dq, dk, dv = torch.autograd.grad(again, (q, k, v), dout)
        return dq, dk, dv
    dq = torch.empty_like(q)
    # A key's gradient is a sum over chunks.
    precise = torch.promote_types(k.dtype, torch.float32)
    dk, dv = (torch.zeros_like(t, dtype=precise) for t in (k, v))
    for rows, columns, mask in _chunks(q, seen):
        some_q, some_k, some_v = _leaves(q[:, rows], k[:, columns], v[:, columns])
        with torch.enable_grad():
            again = _written_out(some_q, some_k, some_v, mask, seen.softcap, scale)
        dq[:, rows], some_dk, some_dv = torch.autograd.grad(again, (some_q, some_k, some_v), dout[:, rows])
        dk[:, columns] += some_dk
        dv[:, columns] += some_dv
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _leaves(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(t.detach().requires_grad_() for t in tensors)


def _public(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Seen, scale: float) -> torch.Tensor:
    B, S, H, _ = q.shape
    mask = None if seen.is_causal_only(S) else mask_of(seen, B, S, q.device)
    q, k, v = heads_first(q, repeat_kv(k, H), repeat_kv(v, H))
    with nullcontext() if mask is None else sdpa_kernel(_WITH_A_MASK):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out.transpose(1, 2)


def _chunks(q: torch.Tensor, seen: Seen) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Queries with at most `CHUNK_SCORES` scores (but one query at least), the keys that they may see, the mask."""
    B, S, H, _ = q.shape
    step = max(1, CHUNK_SCORES // (B * H * S))
    for start in range(0, S, step):
        queries, keys = range(start, min(S, start + step)), range(S)
        if seen.mask is None:
            keys = range(0 if seen.window is None else max(0, start - seen.window + 1), queries.stop)
        mask = mask_of(seen, B, S, q.device, queries, keys)
        yield slice(queries.start, queries.stop), slice(keys.start, keys.stop), mask


def _written_out(
    q_BRHd: torch.Tensor,
    k_BCKd: torch.Tensor,
    v_BCKd: torch.Tensor,
    mask: torch.Tensor,
    softcap: float | None,
    scale: float,
) -> torch.Tensor:
    """softmax(mask(softcap · tanh(scale · q·kᵀ / softcap)))·v, or without the cap.

    It rounds where transformers' eager attention rounds.
    """
    R, H, K = q_BRHd.shape[1], q_BRHd.shape[2], k_BCKd.shape[2]
    # The query heads of a group become rows of one product, so that no key or value is repeated.
    q = q_BRHd.unflatten(2, (K, H // K)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    k, v = heads_first(k_BCKd, v_BCKd)
    scores = (q @ k.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    scores_BKGRC = scores.unflatten(2, (H // K, R))
    if mask.dtype == torch.bool:
        # Not −∞: a query of padding that sees nothing must not become NaN.
        scores_BKGRC = scores_BKGRC.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)
    else:
        scores_BKGRC = scores_BKGRC + mask[:, :, None]
    weights = scores_BKGRC.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    out = weights.flatten(2, 3) @ v
    return out.unflatten(2, (H // K, R)).permute(0, 3, 1, 2, 4).flatten(2, 3)
