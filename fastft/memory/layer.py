"""What one decoder layer of the engine keeps for its backward, and what that backward needs while it runs.

The twin of `fastft.engine.layer`, in bytes: `saved_tensors` of what each policy saves, `forward_bytes` and
`working_bytes` of the moments at which most is alive.  Adapters of rank above the Triton kernels' and norms of another
kind than RMS keep some more, and DoRA the down projection's output.

Legend: D model, F feed-forward, f the share of F that a tiled MLP has at hand, Q = heads × head size, K = key/value
heads × head size, g 2 with a gate and 1 without; `a` bytes an activation element.
"""

from typing import NamedTuple

from fastft.models.shapes import ModelShape
from fastft.plan import OFFLOADED, POLICIES, Policy

WORTH_MOVING_BYTES = 2**20
"""Smaller tensors of an offloaded layer stay on the device: their copies would cost more launches than they free."""
HOST_PIECE_BYTES = 2**24
"""Page-locked memory of up to twice this may be rounded up to a power of two; larger tensors are cut to such."""
RECORDED_LAYER_FLOPS = 4e12
"""Above this a layer's forward and backward keep an H200 busy for over 6 ms, longer than any host needs to launch
them (docs/log.md), and recording them as CUDA graphs would only pin memory."""
_ROUND_UP = 64
"""Slices of a tiled MLP have a multiple of so many rows."""


class Moment(NamedTuple):
    """What is alive at one moment of a layer, beyond what other layers saved and, in its backward, what it saved itself
    and the gradient that came in."""

    per_token: float
    """Bytes."""
    weight: tuple[int, int]
    """In × out of the dense weights that are at hand if they have to be dequantized; (0, 0) for none."""


def saved_tensors(shape: ModelShape, a: int, rank: int) -> dict[Policy, list[float]]:
    """Bytes a token of each tensor that one layer saves, by policy: the twin of `fastft.engine.saved.SAVED`.

    full: x and the adapters' narrow intermediates.  mlp: those, q, k, v, attention's output and log-sum-exp, x after
    attention.  light: mlp, gate and up.  keep: light, and what norms give where the backward reads that.  The
    statistics of norms and softmax are fp32.
    """
    D, F = shape.hidden, shape.intermediate
    Q, K = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    spec = shape.spec
    # What a norm takes is saved instead of what it gives, so the norms of heads and the one behind attention cost
    # nothing; the one behind the MLP does.  With attention and MLP in parallel there is no x between them.
    streams = 1 + (spec.mlp_norm is not None) + (spec.post_mlp_norm is not None)
    norms = 1 + (spec.mlp_norm is not None and spec.post_attention_norm is None) + (spec.post_mlp_norm is not None)
    narrow = [a * rank * linears for linears in (len(spec.qkv), 1, len(spec.gate_up), 1)]
    full: list[float] = [a * D, *narrow]
    mlp = [*full, *[a * D] * (streams - 1), a * Q, a * Q, a * K, a * K, 4 * shape.heads, *[4] * norms]
    light = [*mlp, *[a * F] * (1 + spec.gated)]
    keep = [*light, a * (_head_norms(shape) + _between(shape) + _given(shape) * (spec.norm_kind == "layer"))]
    saved: dict[Policy, list[float]] = {"keep": keep, "light": light, "mlp": mlp, "full": full}
    return saved | {offloaded: saved[of] for offloaded, of in OFFLOADED.items()}


def working_bytes(
    shape: ModelShape, a: int, backend: str, tokens: int, mlp_chunk_tokens: int | None
) -> dict[Policy, list[Moment]]:
    """The moments of a layer's backward at which most is alive, by policy."""
    return {policy: _moments(shape, a, backend, policy, tokens, mlp_chunk_tokens) for policy in POLICIES}


def forward_bytes(
    shape: ModelShape, a: int, rank: int, tokens: int, mlp_chunk_tokens: int | None
) -> dict[Policy, Moment]:
    """What is alive when a layer's forward makes its output: all that it made, saved or not, and its input.

    Beside what any policy would save: the activation, what the MLP's norm gives, the output, and the embeddings, which
    Hugging Face's loop holds until its end.
    """
    D, F, spec = shape.hidden, shape.intermediate, shape.spec
    made = sum(saved_tensors(shape, a, rank)["keep"]) - a * F * (1 + spec.gated)
    down = list(shape.linear_sizes.values())[-1]
    shares = {policy: _tile_share(policy, tokens, mlp_chunk_tokens) for policy in POLICIES}
    return {p: Moment(made + a * (F * share * (2 + spec.gated) + 3 * D), down) for p, share in shares.items()}


def is_recorded(graphs: str, tokens: int, layer_weights: int) -> bool:
    """Whether layers of so many weights replay CUDA graphs on so many tokens, where nothing else forbids it."""
    return graphs == "on" or (graphs == "auto" and 4.0 * tokens * layer_weights < RECORDED_LAYER_FLOPS)


def host_pieces(size: int) -> list[int]:
    """The bytes of the pieces in which a tensor of `size` bytes goes to the host: powers of two, and a rest.

    PyTorch rounds page-locked memory up to powers of two: of one large piece, up to half would be wasted.
    """
    pieces = []
    while size >= 2 * HOST_PIECE_BYTES and size & (size - 1):
        pieces.append(1 << (size.bit_length() - 1))
        size -= pieces[-1]
    return [*pieces, size]


def page_locked_bytes(size: int) -> int:
    """What the host gives for a tensor of `size` bytes that is moved there."""
    return sum(1 << (piece - 1).bit_length() for piece in host_pieces(size) if piece)


def _tile_share(policy: Policy, tokens: int, mlp_chunk_tokens: int | None) -> float:
    """The share of its tokens that a layer's MLP has at hand; a layer that saves gate and up has all."""
    if mlp_chunk_tokens is None or OFFLOADED.get(policy, policy) not in ("mlp", "full"):
        return 1.0
    rows = -(-min(mlp_chunk_tokens, tokens) // _ROUND_UP) * _ROUND_UP
    return min(1.0, rows / tokens)


def _moments(
    shape: ModelShape, a: int, backend: str, policy: Policy, tokens: int, mlp_chunk_tokens: int | None
) -> list[Moment]:
    share = _tile_share(policy, tokens, mlp_chunk_tokens)
    policy = OFFLOADED.get(policy, policy)
    D, F, spec = shape.hidden, shape.intermediate, shape.spec
    Q, K = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    g = 1 + spec.gated
    f, tiled = F * share, share < 1.0
    sizes = shape.linear_sizes
    down, gate = list(sizes.values())[-1], sizes[shape.gate_up_names[0]]
    # Computed again: q, k, v, attention's output, x₂; gate and up.
    attention = 2 * Q + 2 * K + D if policy == "full" else 0
    gates = 0.0 if policy in ("keep", "light") else g * f
    more = _head_norms(shape) + _between(shape) + _given(shape) * (spec.norm_kind == "layer")
    if policy == "keep":
        more = 0
    # Triton's gradients take the place of gate, up and their activation, unless one tensor must hold both; plain
    # PyTorch's do not, and it needs the activation again.
    packed = spec.gated and len(shape.gate_up_names) == 1
    copies = (g + 1) * f if backend == "eager" else g * f * packed
    sliced = D if tiled else 0
    moments = [
        # The gradient of the activation beside what it is made of.
        Moment(a * (attention + gates + f + copies + sliced + more), down),
        # The gradients of gate and up, of the MLP's input, and of x₂.
        Moment(a * (attention + gates + copies + (1 if tiled else 2) * D + more), gate),
        # Attention's backward: the gradients of x₂, of its output, of q, k and v, in fp32 of q, and of every head's k
        # and v.  Gate and up, x₂ and the gradient that came in are gone.
        Moment(
            a * (attention + D + 2 * Q + 2 * K + (2 * Q if K < Q else 0) + more) + 4 * Q
            - a * (2 * D + (g * F if policy in ("keep", "light") else 0)),
            (0, 0),
        ),
    ]  # fmt: skip
    if policy == "full":
        # The attention block again: its output, x₂, and what the MLP's norm makes of it.
        moments.append(Moment(a * (2 * Q + 2 * K + 3 * D + more), list(sizes.values())[len(spec.qkv)]))
    return moments


def _head_norms(shape: ModelShape) -> int:
    return 0 if shape.spec.head_norms is None else (shape.heads + shape.kv_heads) * shape.head_dim


def _between(shape: ModelShape) -> int:
    """What stands between attention and the MLP where that is made again by all but `keep`."""
    spec = shape.spec
    return shape.hidden * (spec.post_attention_norm is not None or spec.mlp_norm is None)


def _given(shape: ModelShape) -> int:
    """What the norms give."""
    return shape.hidden * (1 + (shape.spec.mlp_norm is not None))
