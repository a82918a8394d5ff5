"""How much work a training step of any choices is: arithmetic on the model's shape, for what was not measured yet.

Everything is in FLOPs a token that the device does in the same time, so that it adds up:

    products        of forward and backward, the head's too
    traffic         what norms, activations, rotations, adapters and sums read and write outside of products
    starting        what a layer takes in every micro-batch, however few its tokens: many kernels, none fills a device
    dequantizing    of weights that are not dense already, once a micro-batch
    placement       what a layer computes again, or waits for the bus
    chunks          smaller products run a little slower; tiles that are not recorded wait for the host
    launches        without CUDA graphs the host may take longer for a layer than the GPU
    host embedding  a row a token crosses the bus

Held against 340 configurations of four models on an H100 (docs/log.md, 2026-11-25, "What a step costs", and the day
after), a scale a model aside: wrong by 0.9 to 2.4 % in the root mean square.  A tuned plan rests on measured times,
never on this alone.

Legend: T tokens of a micro-batch, S of a sequence, D model, F feed-forward, Q = heads × head size, V vocabulary.
"""

from collections import Counter
from typing import NamedTuple

from fastft.config import RunConfig
from fastft.hardware import Device
from fastft.memory.model import MemoryTerms, element_bytes, is_gpu, memory_terms, records
from fastft.models.shapes import ModelShape
from fastft.plan import OFFLOADED, Choices, Policy


class _Rates(NamedTuple):
    """What a kind of device computes meanwhile, in FLOPs."""

    a_byte: float
    """While it reads or writes a byte of its own memory."""
    a_start: float
    """In the time that a layer's forward and backward take however few the tokens are."""


_RATES = {"cuda": _Rates(200, 1.5e11), "cpu": _Rates(5, 3e7)}
"""H100: 650e12 over 3.35e12 byte/s; a quarter of a millisecond (docs/log.md, 2026-11-25)."""
_TRAFFIC_OF_HIDDEN, _TRAFFIC_OF_MLP = 40, 20
"""How often an element of the hidden state, and one of gate, up or their product, is read or written outside of
products, in all of a layer's forward and backward."""
_FLOPS_A_DEQUANTIZED_WEIGHT = 1000
"""Forward and backward: an H200 does 650e12 over 4.8e12 byte/s, three times 2.5 bytes."""
_FLOPS_A_MOVED_BYTE = 12_000
"""While a byte crosses to the host or back: H200 650e12 over 54e9, A100 250e12 over 24e9."""
_HIDDEN_COPIES = 0.02
"""Share of a layer by which copies to the host that are hidden behind the computation still slow it down."""
_LAUNCHING_FLOPS = 3.5e12
"""What a GPU computes while a slow host launches a layer's forward and backward: 2.7 ms on one machine, 5.4 on another,
5 to 8 on a third (docs/log.md, 2026-11-25)."""
_TILE_LAUNCHING_FLOPS = 3.3e12
"""What a GPU computes while the host launches one tile of a layer's MLP, forward and backward: some 5 ms on a slow host
(docs/log.md, 2026-11-25: with tiles of 2,048 tokens a step of an 8B in NF4 takes a third longer)."""
_SMALLER_TILES, _SMALLER_LOSS_CHUNKS = 0.02, 0.05
"""Share by which the products of an MLP, or of the head, are slower, a halving of their rows each: 512 rows of the
head's gradient are 24 to 64 blocks for 132 multiprocessors (docs/log.md, 2026-11-26)."""
_FULL_LOSS_CHUNK, _FULL_TILE = 2048, 8192
"""Rows from which on a product of the head, or of an MLP, is at full speed."""


def step_work(shape: ModelShape, choices: Choices, config: RunConfig, device: Device | None = None) -> float:
    """A step of `choices` on the Triton engine, in FLOPs a token; `device` None stands for a GPU."""
    terms = memory_terms(shape, choices, config, device)
    layers = Counter(zip(choices.placement, layer_windows(shape), strict=True))
    placed = sum(
        count * policy_work(policy, terms, shape, choices, config, device, window=window)
        for (policy, window), count in layers.items()
    )
    return work_beside_placement(shape, choices, config, device) + placed


def work_beside_placement(
    shape: ModelShape, choices: Choices, config: RunConfig, device: Device | None = None
) -> float:
    """What `step_work` is where no layer computes anything again or moves anything."""
    T, D, V = choices.micro_batch * config.sequence_tokens, shape.hidden, shape.vocabulary
    of_layers = [_layer_work(shape, config, device, window) for window in layer_windows(shape)]
    started = _rates(device).a_start / T
    launched = is_gpu(device) and not records(shape, choices, config, device)
    waits = [max(0.0, _LAUNCHING_FLOPS / T - layer - started) if launched else 0.0 for layer in of_layers]
    loss_rows = min(choices.loss_chunk_tokens, T)
    of_head = 4.0 * D * V * (1 + _SMALLER_LOSS_CHUNKS * max(0.0, _FULL_LOSS_CHUNK / loss_rows - 1) / 2)
    of_tiles = 0.0
    if choices.mlp_chunk_tokens is not None:
        of_tiles = _tiles_work(shape, choices.mlp_chunk_tokens, launched=launched)
    of_host = float(D * element_bytes(config, device) * _FLOPS_A_MOVED_BYTE) if choices.host_embedding else 0.0
    dequantized = 0.0
    if config.quantization != "none":
        weights = (shape.layers - choices.resident_layers) * shape.linear_weights
        dequantized = weights * _FLOPS_A_DEQUANTIZED_WEIGHT / T
    return sum(of_layers) + shape.layers * started + sum(waits) + of_head + of_tiles + of_host + dequantized


def policy_work(
    policy: Policy,
    terms: MemoryTerms,
    shape: ModelShape,
    choices: Choices,
    config: RunConfig,
    device: Device | None = None,
    *,
    window: int | None = None,
) -> float:
    """What a layer's policy adds, in FLOPs a token: what is computed again, and copies.

    A copy is hidden behind the layer's forward, but for a small share of that, or costs by how much it outlasts it.

    Args:
        terms: of `choices`.
        window: how many tokens a query of the layer sees; None for all before it.
    """
    again = recompute_flops(shape, policy, config.sequence_tokens, choices.backend, window=window)
    if policy not in OFFLOADED or choices.backend == "peft":
        return again
    tokens = choices.micro_batch * config.sequence_tokens
    of_layer = _layer_work(shape, config, device, window)
    waits = max(0.0, terms.moved.get(policy, 0) / tokens * _FLOPS_A_MOVED_BYTE - of_layer / 2)
    return again + waits + _HIDDEN_COPIES * of_layer


def recompute_flops(
    shape: ModelShape, policy: Policy, sequence_tokens: int, backend: str = "eager", *, window: int | None = None
) -> float:
    """FLOPs a token and layer that `policy` spends again in the backward; norms and activations count as none.

    `mlp` repeats gate and up (2 FLOPs a weight), `full` also q, k, v, o and causal attention (2·S·Q: half of
    4·S·Q).  The fused layer repeats the down projection only where a norm stands behind it, stock checkpointing always.
    """
    sizes = shape.linear_sizes
    policy = OFFLOADED.get(policy, policy)
    if policy in ("keep", "light") or (backend == "peft" and policy == "mlp"):
        return 0.0
    names = list(shape.gate_up_names)
    if policy == "full":
        names = list(sizes)
        if backend != "peft" and shape.spec.post_mlp_norm is None:
            names.pop()  # the down projection
    flops = 2.0 * sum(sizes[name][0] * sizes[name][1] for name in names)
    attention = 2.0 * sequence_tokens * shape.heads * shape.head_dim * seen_share(window, sequence_tokens)
    return flops + (attention if policy == "full" else 0.0)


def layer_flops(shape: ModelShape, sequence_tokens: int, *, window: int | None = None) -> float:
    """FLOPs a token of a layer's products, forward and backward without recomputation.

    Base weights are frozen, so they cost 2 FLOPs a weight forward and 2 backward; causal attention costs 2·S·Q
    forward and 5·S·Q backward.
    """
    attention = 7.0 * sequence_tokens * shape.heads * shape.head_dim * seen_share(window, sequence_tokens)
    return 4.0 * shape.linear_weights + attention


def layer_windows(shape: ModelShape) -> list[int | None]:
    """How many tokens a query sees in each layer; None for all before it."""
    kinds = shape.settings.get("layer_types", ["sliding_attention"] * shape.layers)
    return [shape.window if kind == "sliding_attention" else None for kind in kinds]


def seen_share(window: int | None, tokens: int) -> float:
    """Scores under a window over those of causal attention: the queries behind the first `window` see that many."""
    if window is None or window >= tokens:
        return 1.0
    return (window * tokens - window * window / 2) / (tokens * tokens / 2)


def _layer_work(shape: ModelShape, config: RunConfig, device: Device | None, window: int | None) -> float:
    """A layer's products and traffic."""
    elements = _TRAFFIC_OF_HIDDEN * shape.hidden + _TRAFFIC_OF_MLP * shape.intermediate
    traffic = _rates(device).a_byte * element_bytes(config, device) * elements
    return layer_flops(shape, config.sequence_tokens, window=window) + traffic


def _tiles_work(shape: ModelShape, tile: int, *, launched: bool) -> float:
    """What MLPs by tiles of so many tokens cost more: smaller products, and where tiles are `launched` one by one, not
    replayed, how much longer the host takes for that than the GPU computes."""
    mlp_flops = 4.0 * (2 + shape.spec.gated) * shape.hidden * shape.intermediate * shape.layers
    waits = max(0.0, _TILE_LAUNCHING_FLOPS / tile * shape.layers - mlp_flops) if launched else 0.0
    return _SMALLER_TILES * mlp_flops * (_FULL_TILE / tile) / 2 + waits


def _rates(device: Device | None) -> _Rates:
    return _RATES["cuda" if is_gpu(device) else "cpu"]
