"""How much memory a training step needs: arithmetic on the model's shape.

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
from fastft.memory.layer import (
    WORTH_MOVING_BYTES,
    forward_bytes,
    is_recorded,
    page_locked_bytes,
    saved_tensors,
    working_bytes,
)
from fastft.models.shapes import ModelShape
from fastft.plan import OFFLOADED, POLICIES, Choices, Policy

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes an element."""

# Bytes a weight.  NF4 and FP4: 4 bits, a uint8 absmax a block of 64, an fp32 a 256 of those (double quantization).
_WEIGHT_BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "fp4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
_OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0 + 8 / 256, "paged_adamw_8bit": 2.0 + 8 / 256}
"""Bytes of optimizer state a parameter: two moments in fp32, or in 8 bits with an fp32 scale a block of 256.  What is
paged leaves the device only where it must."""
_ADAPTER_BYTES = 4
"""Adapters, and their gradients, are fp32."""
_CPU_RUNTIME_BYTES = 460 * 2**20
"""Resident set of a process that imported torch, transformers and peft, measured on Linux (torch 2.13): on a CPU
the peak is the process's, so this is part of it."""


_GPU_RUNTIME_BYTES = 68 * 2**20
"""What PyTorch allocates for the library: cuBLAS's workspaces on Hopper, 32 MiB for each of two interfaces, and a few
tables.  Measured on an H200 as what stands between two steps beyond weights, adapters and states."""


_RECORDING_BYTES = 32 * 2**20
"""cuBLAS's workspace for the stream that is recorded: measured, with the tensors beside it, on an H200."""


@dataclass(frozen=True)
class MemoryTerms:
    """What a step's peak is made of, in bytes."""

    model: int
    """Weights, adapters and the optimizer's states (and the process, on a CPU): what stands between two steps."""
    saved: dict[Policy, int]
    """What one decoder layer keeps on the device from its forward to its backward."""
    working: dict[Policy, int]
    """What the backward of one decoder layer needs while it runs beside what it saved: recomputed activations and
    gradients."""
    head: int
    """Final norm, a chunk of logits and its gradient."""
    gradients: int = 0
    """Of all adapters: they grow layer by layer, and are joined to one buffer at the end."""
    moved: dict[Policy, int] = field(default_factory=dict)
    """What one decoder layer copies to the host and back; nothing where it is not named."""
    hosted: dict[Policy, int] = field(default_factory=dict)
    """What the host keeps for that."""
    forward: dict[Policy, int] = field(default_factory=dict)
    """What the forward of one decoder layer has made when it ends, whatever of it is saved; nothing where it is not
    named."""
    recording: int = 0
    """What CUDA graphs take beside all that while they are recorded: tensors of their own.  Later a recording's
    intermediates do not count as allocated, and its adapters' gradients stand instead, which are fewer."""

    def host(self, runs: Sequence[tuple[Policy, int]]) -> int:
        """The page-locked host memory that so many layers of each policy take."""
        return sum(count * self.hosted.get(policy, 0) for policy, count in runs)

    def peak(self, placement: Sequence[Policy]) -> int:
        """The highest sum along forward and backward, which frees what layers saved from the last to the first."""
        return self.peak_of_runs([(policy, len(list(run))) for policy, run in groupby(placement)])

    def peak_of_runs(self, runs: Sequence[tuple[Policy, int]]) -> int:
        """`peak` of so many layers of each policy, from the first to the last."""
        runs = [run for run in runs if run[1]]
        layers = sum(count for _, count in runs)
        standing = self.model + self.recording + sum(self.saved[policy] * count for policy, count in runs)
        # The last layer's share never leaves: it is needed again at once.
        highest, done = standing + self.head + self.moved.get(runs[-1][0], 0), 0
        for place in range(len(runs) - 1, -1, -1):
            policy, count = runs[place]
            saved, own = self.saved[policy], self.moved.get(policy, 0)
            before = self.moved.get(runs[place - 1][0], 0) if place else 0
            # In a layer's forward, what the one before it moves is still leaving; in its backward, on its way back.
            highest = max(highest, standing - saved + self.forward.get(policy, 0) + (own if count > 1 else before))
            # Within a run the sum falls with each layer that is done or, where hardly anything is saved, rises with the
            # gradients: one of its ends is the highest.
            working = self.working[policy] + own
            if count > 1:
                second = standing - saved * (count - 2) + self.gradients * (done + count - 2) // layers
                highest = max(highest, max(standing + self.gradients * done // layers, second) + working + own)
            standing -= saved * (count - 1)
            done += count
            highest = max(highest, standing + self.gradients * (done - 1) // layers + working + before)
            standing -= saved
        return max(highest, self.model + self.recording + 2 * self.gradients)


def memory_terms(shape: ModelShape, choices: Choices, config: RunConfig, device: Device | None = None) -> MemoryTerms:
    """The terms for micro-batches of `choices.micro_batch` rows of `config.sequence_tokens` tokens.

    Args:
        shape: sizes of the model.
        choices: all but its placement counts.
        config: dtype, quantization, adapter, optimizer and sequence length.
        device: decides what dtype "auto" is; None stands for a GPU with bf16.
    """
    a = element_bytes(config, device)
    T = choices.micro_batch * config.sequence_tokens
    D, V, sizes = shape.hidden, shape.vocabulary, shape.linear_sizes.values()
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
        dequantized = max(map(math.prod, sizes)) * a if config.quantization != "none" else 0
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
    leaving = {
        p: [math.ceil(T * size) for size in saved[p] if p in OFFLOADED and T * size >= WORTH_MOVING_BYTES]
        for p in POLICIES
    }
    moved = {p: sum(sizes_of_layer) for p, sizes_of_layer in leaving.items()}
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
    forward = {
        p: math.ceil(T * moment.per_token + dense * math.prod(moment.weight))
        for p, moment in forward_bytes(shape, a, config.lora.rank, T, choices.mlp_chunk_tokens).items()
    }
    # The layers' input, output and the gradient that comes in.
    recording = T * 3 * D * a + _RECORDING_BYTES if records(shape, choices, config, device) else 0
    return MemoryTerms(
        model=model,
        saved={p: math.ceil(T * sum(saved[p])) - moved[p] for p in POLICIES},
        working={p: math.ceil(size) for p, size in working.items()},
        # Final norm's input and output, the labelled rows of that, and their gradient.
        head=math.ceil(head + T * 4 * D * a),
        gradients=gradients,
        moved={p: size for p, size in moved.items() if size},
        hosted={p: sum(map(page_locked_bytes, found)) for p, found in leaving.items() if found},
        forward=forward,
        recording=recording,
    )


def element_bytes(config: RunConfig, device: Device | None = None) -> int:
    """Of an activation; `device` None stands for a GPU with bf16."""
    dtype = resolve_dtype(config.dtype, device) if device is not None else config.dtype
    return DTYPE_BYTES.get(dtype, 2)


def is_gpu(device: Device | None) -> bool:
    """Whether the device is one; None stands for a GPU."""
    return device is None or device.kind == "cuda"


def records(shape: ModelShape, choices: Choices, config: RunConfig, device: Device | None = None) -> bool:
    """Whether a run of `choices` replays CUDA graphs, if its batches allow it."""
    if choices.backend == "peft" or config.lora.dropout or not is_gpu(device):
        return False
    return is_recorded(choices.graphs, choices.micro_batch * config.sequence_tokens, shape.linear_weights)


def _base_bytes(shape: ModelShape, choices: Choices, config: RunConfig, a: int) -> float:
    """The frozen weights on the device."""
    linear_weights = shape.layers * shape.linear_weights
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


def dense_layer_bytes(shape: ModelShape, config: RunConfig, device: Device | None = None) -> int:
    """The linear weights of one decoder layer in the dtype of the activations."""
    return shape.linear_weights * element_bytes(config, device)


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
