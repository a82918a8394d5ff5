"""How much memory a training step needs, and what recomputation costs: arithmetic on the model's shape.

Used where nothing was measured: the default under a memory cap (`fastft.memory.fitting`), and pruning what the tuner
need not try.  A tuned plan rests on measured peaks, never on this alone.

Legend: T tokens of a micro-batch, D model, F feed-forward, Q = heads × head size, K = key-value heads × head
size, V vocabulary; `a` bytes an activation element.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from fastft.config import RunConfig
from fastft.hardware import Device, resolve_dtype
from fastft.memory.layer import WORTH_MOVING_BYTES, saved_tensors, working_bytes
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
_CPU_RUNTIME_BYTES = 460 * 2**20
"""Resident set of a process that imported torch, transformers and peft, measured on Linux (torch 2.13): on a CPU
the peak is the process's, so this is part of it."""


_GPU_RUNTIME_BYTES = 68 * 2**20
"""What PyTorch allocates for the library: cuBLAS's workspaces on Hopper, 32 MiB for each of two interfaces, and a few
tables.  Measured on an H200 as what stands between two steps beyond weights, adapters and states."""


@dataclass(frozen=True)
class MemoryTerms:
    """What a step's peak is made of, in bytes."""

    model: int
    """Weights, adapters and the optimizer's states (and the process, on a CPU): what stands between two steps."""
    saved: dict[Policy, int]
    """What one decoder layer keeps on the device from its forward to its backward."""
    working: dict[Policy, int]
    """What the backward of one decoder layer needs while it runs: recomputed activations and gradients."""
    head: int
    """Final norm, a chunk of logits and its gradient."""
    gradients: int = 0
    """Of all adapters: they grow layer by layer, and are joined to one buffer at the end."""
    moved: dict[Policy, int] = field(default_factory=dict)
    """What one decoder layer copies to the host and back; nothing where it is not named."""

    def peak(self, placement: Sequence[Policy]) -> int:
        """The highest sum along the backward, which frees what layers saved from the last layer to the first."""
        return self.peak_of_runs([(policy, len(list(run))) for policy, run in groupby(placement)])

    def peak_of_runs(self, runs: Sequence[tuple[Policy, int]]) -> int:
        """`peak` of so many layers of each policy, from the first to the last."""
        layers = sum(count for _, count in runs)
        standing = self.model + sum(self.saved[policy] * count for policy, count in runs)
        # The last layer's share never leaves: it is needed again at once.
        highest, done = standing + self.head + self.moved.get(_last(runs), 0), 0
        for policy, count in reversed(runs):
            if not count:
                continue
            # Within a run the sum falls with each layer that is done or, where hardly anything is saved, rises with the
            # gradients: one of its ends is the highest.
            first = standing + self.gradients * done // layers
            standing -= self.saved[policy] * (count - 1)
            done += count
            last = standing + self.gradients * (done - 1) // layers
            highest = max(highest, max(first, last) + self.working[policy])
            standing -= self.saved[policy]
        return max(highest, self.model + 2 * self.gradients)


def _last(runs: Sequence[tuple[Policy, int]]) -> Policy:
    return next(policy for policy, count in reversed(runs) if count)


def memory_terms(shape: ModelShape, choices: Choices, config: RunConfig, device: Device | None = None) -> MemoryTerms:
    """The terms for micro-batches of `choices.micro_batch` rows of `config.sequence_tokens` tokens.

    Args:
        shape: sizes of the model.
        choices: all but its placement counts.
        config: dtype, quantization, adapter, optimizer and sequence length.
        device: decides what dtype "auto" is; None stands for a GPU with bf16.
    """
    dtype = resolve_dtype(config.dtype, device) if device is not None else config.dtype
    a = DTYPE_BYTES.get(dtype, 2)
    T = choices.micro_batch * config.sequence_tokens
    D, V = shape.hidden, shape.vocabulary
    fused = choices.backend != "peft"
    trainable = shape.lora_parameters(config.lora.rank, config.lora.targets or shape.spec.targets)
    # The fused layers read the adapters from a copy in their own dtype.
    copy_bytes = a if fused and a != _ADAPTER_BYTES else 0
    adapters = trainable * (_ADAPTER_BYTES + copy_bytes + _OPTIMIZER_BYTES[config.optimizer])
    runtime = _CPU_RUNTIME_BYTES if device is not None and device.kind == "cpu" else _GPU_RUNTIME_BYTES
    model = math.ceil(_base_bytes(shape, choices, config, a) + adapters + runtime)
    gradients = trainable * _ADAPTER_BYTES
    if not fused:
        everything = _stock_layer_bytes(shape, a)
        # Stock knows checkpointing or none; what the engine offloads stands for checkpointing here.
        checkpointed: dict[Policy, float] = dict.fromkeys(("full", *OFFLOADED), float(a * D))
        stock = dict.fromkeys(POLICIES, everything) | checkpointed
        d_layer = a * (3 * D + 2 * (shape.heads + shape.kv_heads) * shape.head_dim)
        d_layer += a * shape.intermediate * (2 + shape.spec.gated)
        dequantized = max(i * o for i, o in shape.linear_sizes.values()) * a if config.quantization != "none" else 0
        return MemoryTerms(
            model=model,
            saved={p: math.ceil(T * stock[p]) for p in POLICIES},
            working={p: math.ceil(T * (everything - stock[p] + d_layer) + dequantized) for p in POLICIES},
            # All logits at once: in the dtype, upcast, log-softmax and its gradient, all fp32.
            head=math.ceil(T * V * (a + 12) + T * 3 * D * a),
            gradients=gradients,
        )
    saved = saved_tensors(shape, a, config.lora.rank)
    moments = working_bytes(shape, a, choices.backend, T, choices.mlp_chunk_tokens)
    moved = {
        p: math.ceil(T * sum(size for size in saved[p] if p in OFFLOADED and T * size >= WORTH_MOVING_BYTES))
        for p in POLICIES
    }
    # A dense copy is needed only where the weight is not dense already.
    dense = a if config.quantization != "none" and choices.resident_layers < shape.layers else 0
    # Beside a layer's own gradient, the one that came into the last layer stays until all are done.
    incoming = 2 * a * D
    working = {
        p: max(T * (moment.per_token + incoming) + dense * math.prod(moment.weight) for moment in found)
        for p, found in moments.items()
    }
    # Triton's loss works in the logits' place, plain PyTorch's on fp32 copies.
    head = min(choices.loss_chunk_tokens, T) * V * (a if choices.backend == "triton" else a + 4)
    return MemoryTerms(
        model=model,
        saved={p: math.ceil(T * sum(saved[p])) - moved[p] for p in POLICIES},
        # Of what goes to the host, the device holds one layer's share in use and one on its way.
        working={p: math.ceil(size) + 2 * moved[p] for p, size in working.items()},
        # Final norm's input and output, the labelled rows of that, and their gradient.
        head=math.ceil(head + T * 4 * D * a),
        gradients=gradients,
        moved={p: size for p, size in moved.items() if size},
    )


def _base_bytes(shape: ModelShape, choices: Choices, config: RunConfig, a: int) -> float:
    """The frozen weights on the device."""
    linear_weights = shape.layers * sum(i * o for i, o in shape.linear_sizes.values())
    # bitsandbytes quantizes the decoder layers' linears; embeddings, head, norms and biases keep the dtype.
    others = (shape.parameters - linear_weights) * a
    if choices.host_embedding:
        others -= shape.vocabulary * shape.hidden * a
    quantized = config.quantization != "none"
    dense = linear_weights / shape.layers * a * min(choices.resident_layers, shape.layers) if quantized else 0.0
    return linear_weights * _WEIGHT_BYTES.get(config.quantization, float(a)) + dense + others


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


def dense_layer_bytes(shape: ModelShape, config: RunConfig, device: Device | None = None) -> int:
    """The linear weights of one decoder layer in the dtype of the activations."""
    dtype = resolve_dtype(config.dtype, device) if device is not None else config.dtype
    return sum(i * o for i, o in shape.linear_sizes.values()) * DTYPE_BYTES.get(dtype, 2)


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
