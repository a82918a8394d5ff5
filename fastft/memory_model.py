"""How much memory a training step needs, and what recomputation costs: arithmetic on the model's shape.

Used where nothing was measured: the default under a memory cap, and pruning what the tuner need not try.  A
tuned plan rests on measured peaks, never on this alone.

Legend: T tokens of a micro-batch, D model, F feed-forward, Q = heads × head size, K = key-value heads × head
size, V vocabulary; `a` bytes an activation element.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastft.config import RunConfig
from fastft.hardware import Device, resolve_dtype
from fastft.models.shapes import ModelShape
from fastft.plan import POLICIES, Choices, Policy

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes an element."""

# Bytes a weight.  NF4 and FP4: 4 bits, a uint8 absmax a block of 64, an fp32 a 256 of those (double quantization).
_WEIGHT_BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "fp4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
_OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0 + 8 / 256}
"""Bytes of optimizer state a parameter: two moments in fp32, or in 8 bits with an fp32 scale a block of 256."""
_ADAPTER_BYTES = 4
"""Adapters, and their gradients, are fp32."""
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
    trainable = shape.lora_parameters(config.lora.rank, config.lora.targets)
    adapters = trainable * (2 * _ADAPTER_BYTES + _OPTIMIZER_BYTES[config.optimizer])
    runtime = _CPU_RUNTIME_BYTES if device is not None and device.kind == "cpu" else 0
    dequantized = max(i * o for i, o in shape.linear_sizes.values()) * a if config.quantization != "none" else 0

    if choices.backend == "peft":
        everything = _stock_layer_bytes(shape, a)
        saved_per_token = dict.fromkeys(POLICIES, everything) | {"full": float(a * D)}
        # All logits at once: in the dtype, upcast, log-softmax and its gradient, all fp32.
        head = T * V * (a + 12)
    else:
        saved_per_token = _fused_layer_bytes(shape, a, config.lora.rank)
        everything = saved_per_token["keep"]
        head = min(choices.loss_chunk_tokens, T) * V * (a + 4)
    gradients = a * (3 * F + 3 * D + 2 * (shape.heads + shape.kv_heads) * shape.head_dim)
    return MemoryTerms(
        model=math.ceil(base + adapters + runtime),
        saved={policy: math.ceil(T * saved_per_token[policy]) for policy in POLICIES},
        working={
            policy: math.ceil(T * (everything - saved_per_token[policy] + gradients) + dequantized)
            for policy in POLICIES
        },
        head=math.ceil(head + T * 3 * D * a),
    )


def estimate_peak_bytes(shape: ModelShape, choices: Choices, config: RunConfig, *, device: Device | None = None) -> int:
    """The peak of a training step in bytes, as a run of `choices` would measure it (see `record.Memory`)."""
    return memory_terms(shape, choices, config, device).peak(choices.placement)


def recompute_flops(shape: ModelShape, policy: Policy, sequence_tokens: int, backend: str = "eager") -> float:
    """FLOPs a token and layer that `policy` spends again in the backward; norms and activations count as none.

    `mlp` repeats gate and up (2 FLOPs a weight), `full` also q, k, v, o and causal attention (2·S·Q: half of
    4·S·Q).  The fused layer never repeats the down projection, stock checkpointing does.
    """
    sizes = shape.linear_sizes
    if policy in ("keep", "light") or (backend == "peft" and policy == "mlp"):
        return 0.0
    names = ["gate_proj", "up_proj"]
    if policy == "full":
        names += ["q_proj", "k_proj", "v_proj", "o_proj"]
        names += ["down_proj"] if backend == "peft" else []
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
    gains over `light` is for measurement to say.
    """
    terms = memory_terms(shape, choices, config, device)
    layers = shape.layers
    ladder: tuple[Policy, ...] = ("light", "full") if choices.backend == "peft" else ("light", "mlp", "full")
    flops = {policy: recompute_flops(shape, policy, config.sequence_tokens, choices.backend) for policy in ladder}
    if choices.backend == "peft":
        # Stock checkpoints all layers or none.
        uniform: list[list[Policy]] = [[policy] * layers for policy in ladder]
        return next((placement for placement in uniform if terms.peak(placement) <= cap_bytes), None)
    best: tuple[float, int, list[Policy]] | None = None
    for full in range(layers + 1):
        for mlp in range(layers - full + 1):
            counts: tuple[tuple[Policy, int], ...] = (("full", full), ("mlp", mlp), ("light", layers - full - mlp))
            placement = [policy for policy, count in counts for _ in range(count)]
            price = full * flops["full"] + mlp * flops["mlp"]
            if (best is None or (price, full) < best[:2]) and terms.peak(placement) <= cap_bytes:
                best = (price, full, placement)
    return None if best is None else best[2]


def _fused_layer_bytes(shape: ModelShape, a: int, rank: int) -> dict[Policy, float]:
    """Bytes a token that one engine layer saves, by policy; the twin of `fastft.engine.layer.SAVED`.

    full: x.  mlp: x, q, k, v, attention's output and log-sum-exp, x after attention, the adapters' narrow
    intermediates.  light: mlp, gate, up and theirs.  keep: light, both norms' outputs, the activation.  The
    statistics of norms and softmax are fp32.
    """
    D, F = shape.hidden, shape.intermediate
    Q, K = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    mlp = a * (2 * D + 2 * Q + 2 * K + 4 * rank) + 4 * shape.heads + 8
    light = mlp + a * (2 * F + 3 * rank)
    return {"keep": light + a * (2 * D + F), "light": light, "mlp": mlp, "full": float(a * D)}


def _stock_layer_bytes(shape: ModelShape, a: int) -> float:
    """Bytes a token that one layer of stock PEFT saves: what autograd holds of Hugging Face's modules.

    Both norms' inputs in fp32; q, k, v, attention's output and log-sum-exp; gate, its activation, up; and every
    adapter's input, which autocast copies for each adapter anew (fp32 models share it).  Frozen weights need no
    input.  Measured against 8192 tokens of Llama-3-8B's shape in bf16 on an H200: 80 GiB, this says 83.
    """
    D, F = shape.hidden, shape.intermediate
    Q, K = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    adapter_inputs = (2 * D if a == 4 else 5 * D) + Q + F
    return 4 * 2 * D + a * (2 * Q + 2 * K + 3 * F + adapter_inputs) + 4 * shape.heads
