"""The choices that fit a memory cap and do the least work, by arithmetic on the model's shape.

What may be given up for memory; what each costs is in `fastft.memory.work`:

    a layer's placement     it computes activations again, or moves them to the host and back
    loss chunk, MLP chunk   smaller products
    host embedding          a row a token crosses the bus
    CUDA graphs             the host launches every kernel
    resident layers         memory that is left over keeps quantized weights dense: they are not dequantized again

Used where nothing was measured.  A tuned plan rests on measured peaks and times.
"""

from collections.abc import Iterator
from itertools import combinations, product

from fastft.config import RunConfig
from fastft.hardware import Device
from fastft.memory.model import dense_layer_bytes, estimate_peak_bytes, is_gpu, memory_terms, records
from fastft.memory.work import policy_work, step_work, work_beside_placement
from fastft.models.shapes import ModelShape
from fastft.plan import OFFLOADED, Choices, Policy

SMALL_LOSS_CHUNK = 512
"""Rows of logits at a time where the default's would not fit: a vocabulary of 128k takes 0.4 GiB then, not 1.5."""
MLP_CHUNKS = (8192, 2048)
"""Tokens of an MLP at a time that are tried where the whole does not fit: products of so many rows still fill a GPU."""
DEVICE_SHARE = 0.92
"""Of a device's memory: what is left is for the allocator's rounding and for other users of the device."""
EXACT = 0.988
"""By how much a prediction may be under (docs/log.md, 2026-11-25)."""
HOST_SHARE = 0.75
"""Of the host's memory, at most so much is page-locked: the rest of the machine lives there too."""


def fit(
    cap_bytes: int, shape: ModelShape, choices: Choices, config: RunConfig, *, device: Device | None = None
) -> Choices | None:
    """`choices` with what does the least work of all that is predicted to fit `cap_bytes`; None if nothing does.

    Backend, micro-batch and attention stay, and the placement where `config` gives one.
    """
    options = [
        (work_beside_placement(shape, option, config, device), option)
        for option in _options(shape, choices, config, device)
    ]
    best: tuple[float, Choices] | None = None
    for beside_placement, option in sorted(options, key=lambda pair: pair[0]):
        if best is not None and beside_placement >= best[0]:
            break
        if config.placement is not None:
            placement: list[Policy] | None = [config.placement] * shape.layers
            option = option.model_copy(update={"placement": placement})
            if estimate_peak_bytes(shape, option, config, device=device) > cap_bytes:
                placement = None
        else:
            placement = best_placement_under(cap_bytes, shape, option, config, device=device)
        if placement is None:
            continue
        found = option.model_copy(update={"placement": placement})
        work = step_work(shape, found, config, device)
        if best is None or work < best[0]:
            best = work, found
    return None if best is None else _with_residents(cap_bytes, shape, best[1], config, device)


def smallest(shape: ModelShape, choices: Choices, config: RunConfig, *, device: Device | None = None) -> Choices:
    """`choices` with everything given up for memory; chunks are small even where they are not what binds."""
    on_gpu = is_gpu(device) and choices.backend != "peft"
    options = list(_options(shape, choices, config, device))
    to_host = memory_terms(shape, choices, config, device).host([("offload", shape.layers)])
    policy: Policy = config.placement or ("offload" if on_gpu and to_host <= host_limit(device) else "full")
    placed = [option.model_copy(update={"placement": [policy] * shape.layers}) for option in options]

    def need(option: Choices) -> tuple[int, int, int]:
        peak = estimate_peak_bytes(shape, option, config, device=device)
        tokens = option.micro_batch * config.sequence_tokens
        return peak, option.loss_chunk_tokens, option.mlp_chunk_tokens or tokens

    return min(placed, key=need)


def best_placement_under(
    cap_bytes: int, shape: ModelShape, choices: Choices, config: RunConfig, *, device: Device | None = None
) -> list[Policy] | None:
    """The placement with the least work whose estimated peak is at most `cap_bytes`; None if none is.

    The layers that save most come last: the peak is at the start of the backward, when every layer's share is
    still held, and a last layer that recomputes nothing adds no buffers just then.  `keep` is not used: what it
    gains over `light` is for measurement to say.  Host memory is used on a GPU only, and no more than `host_limit`; of
    two placements that compute the same again, the one that moves less.
    """
    terms = memory_terms(shape, choices, config, device)
    layers = shape.layers
    if choices.backend == "peft":
        # Stock checkpoints all layers or none.
        uniform: list[list[Policy]] = [[policy] * layers for policy in ("light", "full")]
        return next((placement for placement in uniform if terms.peak(placement) <= cap_bytes), None)
    ladder: list[Policy] = ["light", "mlp", "full"]
    if is_gpu(device):
        ladder += OFFLOADED
    flops = {policy: policy_work(policy, terms, shape, choices, config, device) for policy in ladder}
    best: tuple[float, int, list[tuple[Policy, int]]] | None = None
    for three in combinations(ladder, min(3, len(ladder))):
        small_first = sorted(three, key=lambda policy: (terms.saved[policy], -flops[policy]))
        for first in range(layers + 1):
            for second in range(layers - first + 1):
                runs = list(zip(small_first, (first, second, layers - first - second), strict=True))
                price = sum(count * flops[policy] for policy, count in runs)
                moved = sum(count for policy, count in runs if policy in OFFLOADED)
                if best is not None and (price, moved) >= best[:2]:
                    continue
                if terms.peak_of_runs(runs) <= cap_bytes and terms.host(runs) <= host_limit(device):
                    best = (price, moved, runs)
    return None if best is None else [policy for policy, count in best[2] for _ in range(count)]


def room_under(cap_bytes: int | None, device: Device) -> int:
    """What a prediction may come to, in bytes, so that the run stays under the cap and on the device."""
    of_device = device.memory_bytes * DEVICE_SHARE
    return int(of_device if cap_bytes is None else min(cap_bytes * EXACT, of_device))


def host_limit(device: Device | None) -> float:
    """How much host memory may be page-locked, in bytes; infinite where the host is not known."""
    host = None if device is None else device.host_memory_bytes
    return float("inf") if host is None else HOST_SHARE * host


def _options(shape: ModelShape, choices: Choices, config: RunConfig, device: Device | None) -> Iterator[Choices]:
    """All choices beside the placement."""
    if choices.backend == "peft":
        yield choices
        return
    tokens = choices.micro_batch * config.sequence_tokens
    modes = [choices.graphs, *(["off"] if records(shape, choices, config, device) else [])]
    homes = [False, *([True] if is_gpu(device) and not shape.tied_embeddings else [])]
    loss_chunks = dict.fromkeys((choices.loss_chunk_tokens, min(choices.loss_chunk_tokens, SMALL_LOSS_CHUNK)))
    mlp_chunks = (None, *(chunk for chunk in MLP_CHUNKS if chunk < tokens))
    for graphs, host, loss_chunk, mlp_chunk in product(modes, homes, loss_chunks, mlp_chunks):
        yield choices.model_copy(
            update={
                "host_embedding": host,
                "loss_chunk_tokens": loss_chunk,
                "mlp_chunk_tokens": mlp_chunk,
                "resident_layers": 0,
                "graphs": graphs,
            }
        )


def _with_residents(
    cap_bytes: int, shape: ModelShape, choices: Choices, config: RunConfig, device: Device | None
) -> Choices:
    """Choices that fit, with as many layers' weights dense as the memory that is left over holds."""
    if config.quantization == "none" or choices.backend == "peft":
        return choices
    left = cap_bytes - estimate_peak_bytes(shape, choices, config, device=device)
    count = min(shape.layers, left // dense_layer_bytes(shape, config, device))
    # One that stays needs no place to be dequantized to, but another layer still may: counted for all alike.
    return choices.model_copy(update={"resident_layers": int(count)})
