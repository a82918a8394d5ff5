"""How much memory a training step needs, and what recomputation costs: arithmetic on the model's shape.

Used where nothing was measured: the default under a memory cap, and pruning what the tuner need not try.  A
tuned plan rests on measured peaks, never on this alone.

Legend: T tokens of a micro-batch, D model, F feed-forward, Q = heads × head size, K = key-value heads × head
size, V vocabulary; `a` bytes an activation element.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

from fastft.config import RunConfig
from fastft.hardware import Device, resolve_dtype
from fastft.models.shapes import ModelShape
from fastft.plan import OFFLOADED, POLICIES, Choices, Policy

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes an element."""

# Bytes a weight.  NF4 and FP4: 4 bits, a uint8 absmax a block of 64, an fp32 a 256 of those (double quantization).
_WEIGHT_BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "fp4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
_OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0 + 8 / 256}
"""Bytes of optimizer state a parameter: two moments in fp32, or in 8 bits with an fp32 scale a block of 256."""
_ADAPTER_BYTES = 4
"""Adapters, and their gradients, are fp32."""
_FLOPS_A_MOVED_BYTE = 12_000
"""What a GPU computes while a byte crosses to the host or back: H200 650e12 over 54e9, A100 250e12 over 24e9."""
_CPU_RUNTIME_BYTES = 460 * 2**20
"""Resident set of a process that imported torch, transformers and peft, measured on Linux (torch 2.13): on a CPU
the peak is the process's, so this is part of it."""


@dataclass(frozen=True)
class MemoryTerms:
    """What a step's peak is made of, in bytes."""

    model: int
    """Weights, adapters, their gradients and the optimizer's states (and the process, on a CPU)."""
    saved: dict[Policy, int]
    """What one decoder layer keeps from its forward to its backward."""
    working: dict[Policy, int]
    """What the backward of one decoder layer needs while it runs: recomputed activations and gradients."""
    head: int
    """Final norm, a chunk of logits and its gradient."""
    moved: dict[Policy, int] = field(default_factory=dict)
    """What one decoder layer copies to the host and back; nothing where it is not named."""

    def peak(self, placement: Sequence[Policy]) -> int:
        """The highest sum along the backward, which frees what layers saved from the last layer to the first."""
        standing = self.model + sum(self.saved[policy] for policy in placement)
        highest = standing + self.head
        for policy in reversed(placement):
            highest = max(highest, standing + self.working[policy])
            standing -= self.saved[policy]
        return highest


def memory_terms(shape: ModelShape, choices: Choices, config: RunConfig, device: Device | None = None) -> MemoryTerms:
    """The terms for micro-batches of `choices.micro_batch` rows of `config.sequence_tokens` tokens.

    Args:
        shape: sizes of the model.
        choices: its backend, micro-batch and loss chunk count, its placement does not.
        config: dtype, quantization, adapter, optimizer and sequence length.
        device: decides what dtype "auto" is; None stands for a GPU with bf16.
    """
    dtype = resolve_dtype(config.dtype, device) if device is not None else config.dtype
    a = DTYPE_BYTES.get(dtype, 2)
    T = choices.micro_batch * config.sequence_tokens
    D, F, V = shape.hidden, shape.intermediate, shape.vocabulary
    linear_weights = shape.layers * sum(i * o for i, o in shape.linear_sizes.values())
    weight_bytes = _WEIGHT_BYTES.get(config.quantization, float(a))
    # bitsandbytes quantizes the decoder layers' linears; embeddings, head, norms and biases keep the dtype.
    base = linear_weights * weight_bytes + (shape.parameters - linear_weights) * a
    trainable = shape.lora_parameters(config.lora.rank, config.lora.targets or shape.spec.targets)
    # The fused layers read the adapters from a copy in their own dtype.
    copy_bytes = a if choices.backend != "peft" and a != _ADAPTER_BYTES else 0
    adapters = trainable * (2 * _ADAPTER_BYTES + copy_bytes + _OPTIMIZER_BYTES[config.optimizer])
    runtime = _CPU_RUNTIME_BYTES if device is not None and device.kind == "cpu" else 0
    dequantized = max(i * o for i, o in shape.linear_sizes.values()) * a if config.quantization != "none" else 0

    if choices.backend == "peft":
        everything = _stock_layer_bytes(shape, a)
        # Stock knows checkpointing or none; what the engine offloads stands for checkpointing here.
        checkpointed: dict[Policy, float] = dict.fromkeys(("full", *OFFLOADED), float(a * D))
        saved_per_token = dict.fromkeys(POLICIES, everything) | checkpointed
        # All logits at once: in the dtype, upcast, log-softmax and its gradient, all fp32.
        head = T * V * (a + 12)
        mlp_gradients = 2 + shape.spec.gated
    else:
        saved_per_token, everything = _fused_layer_bytes(shape, a, config.lora.rank)
        # Triton's gradients take the place of gate, up and their activation, unless one tensor must hold both.
        one_tensor = shape.spec.gated and len(shape.gate_up_names) == 1
        mlp_gradients = 1 + shape.spec.gated if choices.backend == "eager" else 2 * one_tensor
        # Triton's loss works in the logits' place, plain PyTorch's on fp32 copies.
        head = min(choices.loss_chunk_tokens, T) * V * (a if choices.backend == "triton" else a + 4)
    gradients = a * (3 * D + 2 * (shape.heads + shape.kv_heads) * shape.head_dim) + a * F * mlp_gradients
    # Of what goes to the host, the device holds one layer's share in use and one on its way.
    moving = {p: 0 if p not in OFFLOADED or choices.backend == "peft" else saved_per_token[p] for p in POLICIES}
    return MemoryTerms(
        model=math.ceil(base + adapters + runtime),
        saved={p: 0 if moving[p] else math.ceil(T * saved_per_token[p]) for p in POLICIES},
        working={
            p: math.ceil(T * (everything - saved_per_token[p] + 2 * moving[p] + gradients) + dequantized)
            for p in POLICIES
        },
        head=math.ceil(head + T * 3 * D * a),
        moved={p: math.ceil(T * size) for p, size in moving.items() if size},
    )


def estimate_peak_bytes(shape: ModelShape, choices: Choices, config: RunConfig, *, device: Device | None = None) -> int:
    """The peak of a training step in bytes, as a run of `choices` would measure it (see `record.Memory`)."""
    return memory_terms(shape, choices, config, device).peak(choices.placement)


def recompute_flops(shape: ModelShape, policy: Policy, sequence_tokens: int, backend: str = "eager") -> float:
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
    return flops + (2.0 * sequence_tokens * shape.heads * shape.head_dim if policy == "full" else 0.0)


def step_flops(shape: ModelShape, sequence_tokens: int) -> float:
    """FLOPs a token and layer of forward and backward without recomputation.

    Base weights are frozen, so they cost 2 FLOPs a weight forward and 2 backward; causal attention costs 2·S·Q
    forward and 5·S·Q backward.
    """
    weights = sum(i * o for i, o in shape.linear_sizes.values())
    return 4.0 * weights + 7.0 * sequence_tokens * shape.heads * shape.head_dim


def best_placement_under(
    cap_bytes: int, shape: ModelShape, choices: Choices, config: RunConfig, *, device: Device | None = None
) -> list[Policy] | None:
    """The placement with the least recomputation whose estimated peak is at most `cap_bytes`; None if none is.

    The layers that save most come last: the peak is at the start of the backward, when every layer's share is
    still held, and a last layer that recomputes nothing adds no buffers just then.  `keep` is not used: what it
    gains over `light` is for measurement to say.  Host memory is used on a GPU only; of two placements that compute
    the same again, the one that moves less.
    """
    terms = memory_terms(shape, choices, config, device)
    layers = shape.layers
    if choices.backend == "peft":
        # Stock checkpoints all layers or none.
        uniform: list[list[Policy]] = [[policy] * layers for policy in ("light", "full")]
        return next((placement for placement in uniform if terms.peak(placement) <= cap_bytes), None)
    ladder: list[Policy] = ["light", "mlp", "full"]
    if device is None or device.kind == "cuda":
        ladder += OFFLOADED
    T = choices.micro_batch * config.sequence_tokens
    # A copy is hidden behind a layer's forward, or costs by how much it outlasts it.
    hidden = step_flops(shape, config.sequence_tokens) / 2
    flops = {
        policy: recompute_flops(shape, policy, config.sequence_tokens, choices.backend)
        + max(0.0, terms.moved.get(policy, 0) / T * _FLOPS_A_MOVED_BYTE - hidden)
        for policy in ladder
    }
    best: tuple[float, int, list[Policy]] | None = None
    for three in combinations(ladder, min(3, len(ladder))):
        small_first = sorted(three, key=lambda policy: (terms.saved[policy], -flops[policy]))
        for first in range(layers + 1):
            for second in range(layers - first + 1):
                counts = (first, second, layers - first - second)
                placement = [p for p, count in zip(small_first, counts, strict=True) for _ in range(count)]
                price = sum(count * flops[p] for p, count in zip(small_first, counts, strict=True))
                moved = sum(p in OFFLOADED for p in placement)
                if (best is None or (price, moved) < best[:2]) and terms.peak(placement) <= cap_bytes:
                    best = (price, moved, placement)
    return None if best is None else best[2]


def _fused_layer_bytes(shape: ModelShape, a: int, rank: int) -> tuple[dict[Policy, float], float]:
    """Bytes a token that one engine layer saves, by policy, the twin of `fastft.engine.layer.SAVED`; and what it has
    at hand in its backward.

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
    full = a * (D + (len(spec.qkv) + len(spec.gate_up) + 2) * rank)
    mlp = full + a * ((streams - 1) * D + 2 * Q + 2 * K) + 4 * shape.heads + 4 * norms
    light = mlp + a * (1 + spec.gated) * F
    heads = 0 if spec.head_norms is None else Q + K
    given = D * (1 + (spec.mlp_norm is not None))
    between = D * (spec.post_attention_norm is not None or spec.mlp_norm is None)
    keep = light + a * (heads + between + given * (spec.norm_kind == "layer"))
    # The norms' outputs, and the activation or its gradient.
    at_hand = light + a * (heads + between + given + F)
    saved: dict[Policy, float] = {"keep": keep, "light": light, "mlp": mlp, "full": float(full)}
    return saved | {offloaded: saved[of] for offloaded, of in OFFLOADED.items()}, float(at_hand)


def _stock_layer_bytes(shape: ModelShape, a: int) -> float:
    """Bytes a token that one layer of stock PEFT saves: what autograd holds of Hugging Face's modules.

    Both norms' inputs in fp32; q, k, v, attention's output and log-sum-exp; gate, its activation, up; and every
    adapter's input, which autocast copies for each adapter anew (fp32 models share it).  Frozen weights need no
    input.  Measured against 8192 tokens of Llama-3-8B's shape in bf16 on an H200: 80 GiB, this says 83.
    """
    D, F = shape.hidden, shape.intermediate
    Q, K = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    spec = shape.spec
    copies = len(spec.qkv) + len(spec.gate_up)
    adapter_inputs = (min(2, copies) * D if a == 4 else copies * D) + Q + F
    norms = len(spec.norms) - len(spec.head_norms or ())
    head_norms = 0 if spec.head_norms is None else Q + K
    activations = (1 + 2 * spec.gated) * F
    return 4 * (norms * D + head_norms) + a * (2 * Q + 2 * K + activations + adapter_inputs) + 4 * shape.heads
