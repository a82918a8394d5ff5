"""Causal attention through PyTorch's own kernels, with an explicit backward.

Each implementation is a pair of functions over what it needs to keep, so that the engine decides what is saved and
what is recomputed.  The operators behind `torch.nn.functional.scaled_dot_product_attention` are called directly
because autograd would save their inputs by itself.

Legend: B batch, S tokens of a sequence, H query heads, K key/value heads, d head size.  Tensors are (B, S, heads, d).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastft.errors import unknown_choice

Saved = tuple[torch.Tensor, ...]
_aten = torch.ops.aten


class Seen(NamedTuple):
    """What each query may attend to."""

    mask: torch.Tensor | None = None
    """(B, 1, S, S), boolean (true = attend) or additive; None is causal."""


class Attention(NamedTuple):
    """One implementation.

    `forward(q, k, v, seen, scale)` → (out, saved); `backward(dout, q, k, v, out, saved, seen, scale)` → (dq, dk, dv).
    `usable(q, seen)` says whether it can run these inputs.
    """

    name: str
    forward: Callable[..., tuple[torch.Tensor, Saved]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    usable: Callable[[torch.Tensor, Seen], bool]


def _heads_first(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(t.transpose(1, 2) for t in tensors)


def _repeat_kv(x_BKSd: torch.Tensor, heads: int) -> torch.Tensor:
    B, K, S, d = x_BKSd.shape
    if heads == K:
        return x_BKSd
    return x_BKSd[:, :, None].expand(B, K, heads // K, S, d).reshape(B, heads, S, d)


def _sum_kv(dx_BHSd: torch.Tensor, kv_heads: int) -> torch.Tensor:
    B, H, S, d = dx_BHSd.shape
    if kv_heads == H:
        return dx_BHSd
    return dx_BHSd.view(B, kv_heads, H // kv_heads, S, d).sum(2)


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A boolean mask (true = attend) as the additive one that the operators take."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


# CPU: the tiled kernel of PyTorch.  It knows no grouped heads, so keys and values are repeated for the call.
def _cpu_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Seen, scale: float
) -> tuple[torch.Tensor, Saved]:
    q, k, v = _heads_first(q, k, v)
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        q, _repeat_kv(k, q.shape[1]), _repeat_kv(v, q.shape[1]), 0.0, seen.mask is None,
        attn_mask=_additive(seen.mask, q.dtype), scale=scale,
    )  # fmt: skip
    return out.transpose(1, 2), (lse,)


def _cpu_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, saved: Saved,
    seen: Seen, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    kv_heads = k.shape[2]
    dout, q, k, v, out = _heads_first(dout, q, k, v, out)
    heads = q.shape[1]
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, _repeat_kv(k, heads), _repeat_kv(v, heads), out, saved[0], 0.0, seen.mask is None,
        attn_mask=_additive(seen.mask, q.dtype), scale=scale,
    )  # fmt: skip
    return dq.transpose(1, 2), _sum_kv(dk, kv_heads).transpose(1, 2), _sum_kv(dv, kv_heads).transpose(1, 2)


def _cpu_usable(q: torch.Tensor, seen: Seen) -> bool:
    return q.device.type == "cpu" and (seen.mask is None or seen.mask.dim() == 4)


# CUDA, flash: the library's default.
def _flash_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Seen, scale: float
) -> tuple[torch.Tensor, Saved]:
    q, k, v = _heads_first(q, k, v)
    out, lse, _, _, _, _, seed, offset, _ = _aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, True, return_debug_mask=False, scale=scale
    )
    return out.transpose(1, 2), tuple(t for t in (lse, seed, offset) if isinstance(t, torch.Tensor))


def _flash_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, saved: Saved,
    seen: Seen, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    tokens = q.shape[1]
    dout, q, k, v, out = _heads_first(dout, q, k, v, out)
    lse, seed, offset = saved
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, None, None, tokens, tokens, 0.0, True, seed, offset, scale=scale
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _flash_usable(q: torch.Tensor, seen: Seen) -> bool:
    return (
        q.device.type == "cuda"
        and seen.mask is None
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] <= 256
        and q.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


# CUDA, cuDNN: about twice flash's rate on Hopper (docs/log.md).  Its backward is not deterministic.
def _cudnn_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Seen, scale: float
) -> tuple[torch.Tensor, Saved]:
    q, k, v = _heads_first(q, k, v)
    out, lse, _, _, _, _, seed, offset, _ = _aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True, False, scale=scale
    )
    return out.transpose(1, 2), (lse, seed, offset)


def _cudnn_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, saved: Saved,
    seen: Seen, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    tokens = q.shape[1]
    dout, q, k, v, out = _heads_first(dout, q, k, v, out)
    lse, seed, offset = saved
    dq, dk, dv = _aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse, seed, offset, None, None, None, tokens, tokens, 0.0, True, scale=scale
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _cudnn_usable(q: torch.Tensor, seen: Seen) -> bool:
    return (
        q.device.type == "cuda"
        and seen.mask is None
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] <= 128
        and q.shape[-1] % 8 == 0
        and q.shape[1] > 1
        and torch.cuda.get_device_capability(q.device) >= (9, 0)
        and torch.backends.cudnn.is_available()
    )


# Anything: the public function under autograd.  It keeps nothing and runs its forward again in the backward.
def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Seen, scale: float) -> torch.Tensor:
    q, k, v = _heads_first(q, k, v)
    k, v = _repeat_kv(k, q.shape[1]), _repeat_kv(v, q.shape[1])
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen.mask, is_causal=seen.mask is None, scale=scale
    ).transpose(1, 2)


def _sdpa_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Seen, scale: float
) -> tuple[torch.Tensor, Saved]:
    with torch.no_grad():
        return _sdpa(q, k, v, seen, scale), ()


def _sdpa_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, saved: Saved,
    seen: Seen, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    with torch.enable_grad():
        again = _sdpa(q, k, v, seen, scale)
    dq, dk, dv = torch.autograd.grad(again, (q, k, v), dout)
    return dq, dk, dv


def _always(q: torch.Tensor, seen: Seen) -> bool:
    return True


ATTENTION: dict[str, Attention] = {
    "cudnn": Attention("cudnn", _cudnn_forward, _cudnn_backward, _cudnn_usable),
    "flash": Attention("flash", _flash_forward, _flash_backward, _flash_usable),
    "cpu": Attention("cpu", _cpu_forward, _cpu_backward, _cpu_usable),
    "sdpa": Attention("sdpa", _sdpa_forward, _sdpa_backward, _always),
}
"""By name, the preferred first; `auto` takes the first that is usable."""


def choose_attention(name: str, q_BSHd: torch.Tensor, seen: Seen) -> Attention:
    """The implementation called `name`, or the first usable one where it is `auto` or cannot run these inputs.

    Raises:
        ConfigError: the name is unknown.
    """
    if name != "auto":
        if name not in ATTENTION:
            raise unknown_choice("attention", name, [*ATTENTION, "auto"])
        if ATTENTION[name].usable(q_BSHd, seen):
            return ATTENTION[name]
    return next(kernel for kernel in ATTENTION.values() if kernel.usable(q_BSHd, seen))
