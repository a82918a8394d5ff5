"""PyTorch's kernels for NVIDIA GPUs: flash, cuDNN, and the memory-efficient one.

The limits are those of PyTorch's own dispatcher, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, and of the
operators themselves: flash_attn/flash_api.cpp and mem_eff_attention/ beside it.

Tensors are (B, S, heads, d): B batch, S tokens of a sequence, d head size; T = B·S tokens.
"""

from typing import NamedTuple

import torch

from fastft.kernels.attention.layout import Gradients, Saved, heads_first, repeat_kv, sum_kv
from fastft.kernels.attention.seen import Seen, additive

_aten = torch.ops.aten
# Of sdp_utils.cpp; for newer GPUs these kernels are not built.
_NEWEST = (12, 1)
# Of the y and z dimensions of a grid, where the kernels put the sequences.
_MOST_BLOCKS = 65535


def _runs_here(q: torch.Tensor, seen: Seen, oldest: tuple[int, int]) -> bool:
    """What all three need: an NVIDIA GPU for which the kernel is built, and no soft cap."""
    if q.device.type != "cuda" or torch.version.hip is not None or seen.softcap is not None:
        return False
    sequences = q.shape[0] if seen.documents is None else seen.documents.numel() - 1
    return sequences <= _MOST_BLOCKS and oldest <= torch.cuda.get_device_capability(q.device) <= _NEWEST


def _runs_in_16_bits(q: torch.Tensor, seen: Seen, oldest: tuple[int, int], largest_head: int) -> bool:
    """What flash and cuDNN need besides: 16-bit numbers, no mask, heads that vector loads can read."""
    return (
        _runs_here(q, seen, oldest)
        and seen.mask is None
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] <= largest_head
        and q.shape[-1] % 8 == 0
    )


def _packed(seen: Seen, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(B, S, heads, d) as (T, heads, d) where there are documents."""
    return tensors if seen.documents is None else tuple(t.flatten(0, 1) for t in tensors)


# Flash: everything but masks and soft caps.
def flash_usable(q: torch.Tensor, seen: Seen) -> bool:
    """Whether the kernel can run, and train, queries like `q`."""
    if not _runs_in_16_bits(q, seen, oldest=(8, 0), largest_head=256):
        return False
    major, minor = torch.cuda.get_device_capability(q.device)
    # sdp_utils.cpp refuses these heads where shared memory is smaller than an A100's.
    return not (192 < q.shape[-1] <= 224 and ((major == 8 and minor >= 6) or major == 12))


def _flash_sequences(seen: Seen, S: int) -> tuple[torch.Tensor | None, torch.Tensor | None, int, int]:
    """cum_seq_q, cum_seq_k, max_q, max_k."""
    # With single-token documents of grouped heads flash_api.cpp runs a decoding kernel with statistics of another
    # shape; the maximum only sizes the launch.
    longest = max(seen.longest_in(S), 2)
    return seen.documents, seen.documents, longest, longest


def _flash_window(seen: Seen, S: int) -> dict[str, int]:
    window = seen.window_in(S)
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def flash_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Seen, scale: float
) -> tuple[torch.Tensor, Saved]:
    """See `fastft.kernels.attention.library.Attention`."""
    S = q.shape[1]
    out, lse, seed, offset = _aten._flash_attention_forward(
        *_packed(seen, q, k, v), *_flash_sequences(seen, S), 0.0, True, False, scale=scale, **_flash_window(seen, S)
    )[:4]
    return out.view(q.shape), (lse, seed, offset)


def flash_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, saved: Saved,
    seen: Seen, scale: float,
) -> Gradients:  # fmt: skip
    """See `fastft.kernels.attention.library.Attention`.

    The operator itself looks whether deterministic algorithms are wanted.
    """
    S = q.shape[1]
    lse, seed, offset = saved
    dq, dk, dv = _aten._flash_attention_backward(
        *_packed(seen, dout, q, k, v, out), lse, *_flash_sequences(seen, S), 0.0, True, seed, offset,
        scale=scale, **_flash_window(seen, S),
    )  # fmt: skip
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


# cuDNN: about twice flash's rate on Hopper (docs/log.md), causal attention only.  It has no window, its backward is not
# deterministic, and that over documents writes out of bounds before pytorch/pytorch#186142 (it takes the head size for
# the longest document).
def cudnn_usable(q: torch.Tensor, seen: Seen) -> bool:
    """Whether the kernel can run, and train, queries like `q`."""
    S = q.shape[1]
    return (
        _runs_in_16_bits(q, seen, oldest=(9, 0), largest_head=128)
        # As sdp_utils.cpp prefers it: on Hopper and data-centre Blackwell.
        and torch.cuda.get_device_capability(q.device)[0] in (9, 10)
        and seen.is_causal_only(S)
        and S > 1
        and not torch.are_deterministic_algorithms_enabled()
        and torch.backends.cudnn.is_available()
        # Up to 9.15.0 it reads out of bounds unless S is a multiple of 128 (pytorch/pytorch#169849).
        and (S % 128 == 0 or (torch.backends.cudnn.version() or 0) > 91500)
    )


def _dense_heads_first(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(B, H, S, d), over memory in the order of (B, S, H, d).  On views of one packed tensor, with rows that are no
    multiple of a tile, the kernel was seen to give other numbers than on copies of them (torch 2.11, H200)."""
    return heads_first(*(t.contiguous() for t in tensors))


def cudnn_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Seen, scale: float
) -> tuple[torch.Tensor, Saved]:
    """See `fastft.kernels.attention.library.Attention`."""
    out, lse, _, _, _, _, seed, offset, _ = _aten._scaled_dot_product_cudnn_attention(
        *_dense_heads_first(q, k, v), None, True, 0.0, True, False, scale=scale
    )
    return out.transpose(1, 2), (lse, seed, offset)


def cudnn_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, saved: Saved,
    seen: Seen, scale: float,
) -> Gradients:  # fmt: skip
    """See `fastft.kernels.attention.library.Attention`."""
    S = q.shape[1]
    dq, dk, dv = heads_first(
        *_aten._scaled_dot_product_cudnn_attention_backward(
            *_dense_heads_first(dout, q, k, v, out), *saved, None, None, None, S, S, 0.0, True, scale=scale
        )
    )
    return dq, dk, dv


# Memory-efficient: GPUs before Ampere, fp32, masks.  It knows no grouped heads: keys and values are repeated.
def efficient_usable(q: torch.Tensor, seen: Seen) -> bool:
    """Whether the kernel can run, and train, queries like `q`."""
    if not _runs_here(q, seen, oldest=(5, 0)) or not (seen.mask is None or seen.mask.dim() == 4):
        return False
    if seen.written_out:
        return False
    major, _ = torch.cuda.get_device_capability(q.device)
    if q.dtype not in (torch.float16, torch.float32) and (q.dtype != torch.bfloat16 or major < 8):
        return False
    # Tensor cores are fed 16 bytes at a time; fp32 has used them since Ampere (minimum_gemm_alignment, sdp_utils.cpp).
    tensor_cores = major >= 8 or (major == 7 and q.itemsize == 2)
    return not tensor_cores or q.shape[-1] * q.itemsize % 16 == 0


class _Efficient(NamedTuple):
    """What the operator wants to know of `Seen`."""

    bias: torch.Tensor | None
    documents: torch.Tensor | None
    longest: int
    mask_type: int
    """A `CustomMaskType` of sdp_utils_cpp.h: 0 none, 1 causal."""
    window: int | None

    def inputs(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, S, heads, d) as (1, T, heads, d) where there are documents."""
        return tensors if self.documents is None else tuple(t.flatten(0, 1).unsqueeze(0) for t in tensors)


def _efficient(q: torch.Tensor, seen: Seen) -> _Efficient:
    B, S, H, _ = q.shape
    if seen.mask is None:
        return _Efficient(None, seen.documents, seen.longest_in(S), 1, seen.window_in(S))
    # The kernel's loads want every row of the bias to start at a multiple of 16 elements.
    bias = q.new_zeros(*seen.mask.shape[:3], -(-S // 16) * 16).narrow(-1, 0, S)
    return _Efficient(bias.copy_(additive(seen.mask, q.dtype)).expand(B, H, S, S), None, S, 0, None)


def efficient_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Seen, scale: float
) -> tuple[torch.Tensor, Saved]:
    """See `fastft.kernels.attention.library.Attention`."""
    heads, call = q.shape[2], _efficient(q, seen)
    out, lse, seed, offset = _aten._efficient_attention_forward(
        *call.inputs(q, repeat_kv(k, heads), repeat_kv(v, heads)), call.bias, call.documents, call.documents,
        call.longest, call.longest, 0.0, call.mask_type, True, scale=scale, window_size=call.window,
    )[:4]  # fmt: skip
    return out.view(q.shape), (lse, seed, offset)


def efficient_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, saved: Saved,
    seen: Seen, scale: float,
) -> Gradients:  # fmt: skip
    """See `fastft.kernels.attention.library.Attention`.

    The operator itself looks whether deterministic algorithms are wanted.
    """
    heads, kv_heads, call = q.shape[2], k.shape[2], _efficient(q, seen)
    lse, seed, offset = saved
    # Of the strides of `out` the kernel reads some and takes the others for those of a contiguous tensor.
    dq, dk, dv, _ = _aten._efficient_attention_backward(
        *call.inputs(dout, q, repeat_kv(k, heads), repeat_kv(v, heads)), call.bias, *call.inputs(out.contiguous()),
        call.documents, call.documents, call.longest, call.longest, lse, 0.0, seed, offset, call.mask_type, False,
        scale=scale, window_size=call.window,
    )  # fmt: skip
    dk, dv = (dx.view(q.shape) for dx in (dk, dv))
    return dq.view(q.shape), sum_kv(dk, kv_heads), sum_kv(dv, kv_heads)
