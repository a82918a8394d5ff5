"""The choices that fit a memory cap and do the least extra work, by arithmetic on the model's shape.

What may be given up for memory, and what it costs, in FLOPs a token:

    a layer's placement     what it computes again (`memory.model.recompute_flops`), or waits for the bus
    loss chunk, MLP chunk   smaller products, which run a little slower
    host embedding          a row a token crosses the bus, once a step
    CUDA graphs             without them the host's launches bind a small step
    resident layers         memory that is left over keeps quantized weights dense: they are not dequantized again

Used where nothing was measured.  A tuned plan rests on measured peaks and times.
"""

from collections.abc import Iterator
from itertools import combinations, product
from typing import NamedTuple

from fastft.config import RunConfig
from fastft.hardware import Device, resolve_dtype
from fastft.memory.model import (
    DTYPE_BYTES,
    MemoryTerms,
    dense_layer_bytes,
    estimate_peak_bytes,
    memory_terms,
    recompute_flops,
    records,
    step_flops,
)
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
_FLOPS_A_MOVED_BYTE = 12_000
"""What a GPU computes while a byte crosses to the host or back: H200 650e12 over 54e9, A100 250e12 over 24e9."""
_LAUNCHING_FLOPS = 2.5e12
"""What a GPU computes while a slow host launches a layer's forward and backward: 2.7 ms on one machine, 5 to 8 on
another (docs/log.md, 2026-11-25: with layers of 2.25e12 a step without graphs takes 0 to 40 % longer, half of them 11 %
or more)."""
_TILE_LAUNCHING_FLOPS = 3.3e12
"""What a GPU computes while the host launches one tile of a layer's MLP, forward and backward: some 5 ms on a slow host
(docs/log.md, 2026-11-25: with tiles of 2,048 tokens a step of an 8B in NF4 takes a third longer)."""
_SMALLER_PRODUCTS = 0.02
"""Share by which products in chunks are assumed slower, a halving of their rows each."""


class Fitted(NamedTuple):
    """Choices that fit, and their price."""

    choices: Choices
    extra_flops: float
    """Beyond the model's own, a token of one step over all layers."""


def fit(
    cap_bytes: int, shape: ModelShape, choices: Choices, config: RunConfig, *, device: Device | None = None
) -> Fitted | None:
    """`choices` with what does the least extra work of all that is predicted to fit `cap_bytes`; None if nothing does.

    Backend, micro-batch and attention stay, and the placement where `config` gives one.
    """
    best: Fitted | None = None
    for option, price in sorted(_options(shape, choices, config, device), key=lambda pair: pair[1]):
        if best is not None and price >= best.extra_flops:
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
        again = (recompute_flops(shape, p, config.sequence_tokens, choices.backend) for p in placement)
        found = Fitted(option.model_copy(update={"placement": placement}), price + sum(again))
        if best is None or found.extra_flops < best.extra_flops:
            best = found
    return None if best is None else best._replace(choices=_with_residents(cap_bytes, shape, best, config, device))


def smallest(shape: ModelShape, choices: Choices, config: RunConfig, *, device: Device | None = None) -> Choices:
    """`choices` with everything given up for memory; chunks are small even where they are not what binds."""
    on_gpu = (device is None or device.kind == "cuda") and choices.backend != "peft"
    options = [option for option, _ in _options(shape, choices, config, device)]
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
    """The placement with the least recomputation whose estimated peak is at most `cap_bytes`; None if none is.

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
    if device is None or device.kind == "cuda":
        ladder += OFFLOADED
    flops = {policy: _layer_price(policy, terms, shape, choices, config) for policy in ladder}
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


def _layer_price(policy: Policy, terms: MemoryTerms, shape: ModelShape, choices: Choices, config: RunConfig) -> float:
    """FLOPs a token that the policy spends again; a copy is hidden behind a layer's forward, or costs by how much it
    outlasts that."""
    tokens = choices.micro_batch * config.sequence_tokens
    hidden = step_flops(shape, config.sequence_tokens) / 2
    waits = max(0.0, terms.moved.get(policy, 0) / tokens * _FLOPS_A_MOVED_BYTE - hidden)
    return recompute_flops(shape, policy, config.sequence_tokens, choices.backend) + waits


def _options(
    shape: ModelShape, choices: Choices, config: RunConfig, device: Device | None
) -> Iterator[tuple[Choices, float]]:
    """All choices beside the placement, with what each costs."""
    if choices.backend == "peft":
        yield choices, 0.0
        return
    tokens = choices.micro_batch * config.sequence_tokens
    a = DTYPE_BYTES.get(resolve_dtype(config.dtype, device) if device is not None else config.dtype, 2)
    on_gpu = device is None or device.kind == "cuda"
    of_host = float(shape.hidden * a * _FLOPS_A_MOVED_BYTE)
    of_launches = max(0.0, _LAUNCHING_FLOPS / tokens - step_flops(shape, config.sequence_tokens)) * shape.layers
    recorded = records(shape, choices, config, device)
    of_graphs = {choices.graphs: 0.0, **({"off": of_launches} if recorded else {})}
    of_homes = {False: 0.0, **({True: of_host} if on_gpu and not shape.tied_embeddings else {})}
    for (graphs, price), (host, more) in product(of_graphs.items(), of_homes.items()):
        launched = on_gpu and (graphs == "off" or not recorded)
        for loss_chunk in dict.fromkeys((choices.loss_chunk_tokens, min(choices.loss_chunk_tokens, SMALL_LOSS_CHUNK))):
            halvings = (choices.loss_chunk_tokens / loss_chunk - 1) / 2
            of_loss = _SMALLER_PRODUCTS * halvings * 4.0 * shape.hidden * shape.vocabulary
            for mlp_chunk in (None, *(chunk for chunk in MLP_CHUNKS if chunk < tokens)):
                of_mlp = 0.0 if mlp_chunk is None else _tiles_price(shape, mlp_chunk, launched=launched)
                yield (
                    choices.model_copy(
                        update={
                            "host_embedding": host,
                            "loss_chunk_tokens": loss_chunk,
                            "mlp_chunk_tokens": mlp_chunk,
                            "resident_layers": 0,
                            "graphs": graphs,
                        }
                    ),
                    price + more + of_loss + of_mlp,
                )


def _tiles_price(shape: ModelShape, mlp_chunk: int, *, launched: bool) -> float:
    """FLOPs a token for MLPs by tiles of `mlp_chunk` tokens: smaller products, and where tiles are `launched` one by
    one, not replayed, how much longer the host takes for that than the GPU computes."""
    mlp_flops = 4.0 * (2 + shape.spec.gated) * shape.hidden * shape.intermediate * shape.layers
    waits = max(0.0, _TILE_LAUNCHING_FLOPS / mlp_chunk * shape.layers - mlp_flops) if launched else 0.0
    return _SMALLER_PRODUCTS * mlp_flops * (8192 / mlp_chunk) / 2 + waits


def _with_residents(
    cap_bytes: int, shape: ModelShape, fitted: Fitted, config: RunConfig, device: Device | None
) -> Choices:
    """The fitted choices, with as many layers' weights dense as the memory that is left over holds."""
    choices = fitted.choices
    if config.quantization == "none" or choices.backend == "peft":
        return choices
    left = cap_bytes - estimate_peak_bytes(shape, choices, config, device=device)
    count = min(shape.layers, left // dense_layer_bytes(shape, config, device))
    # One that stays needs no place to be dequantized to, but another layer still may: counted for all alike.
    return choices.model_copy(update={"resident_layers": int(count)})
