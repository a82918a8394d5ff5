"""What the tuner may try, declared in one place, each choice with its reason.

    backend       the fused engine of this device; stock PEFT, because it may win, and then it should
    micro-batch   divisors of the global batch: every optimizer step still sees the same samples
    placement     one policy for all layers; mixed placements are solved from what these measured
    the rest      loss and MLP chunks, dense copies of quantized weights, the embedding on the host: as arithmetic fits
                  them to the memory there is (`fastft.memory.fitting`), one candidate a micro-batch
    launches      those that the kernel search found (`kernels`), for every candidate of backend triton but the default

Then refinements, one change at a time of what leads (`refinements`), each kept if it is faster beyond the noise:

    placement     `keep` instead of `light`: what it gains is traffic, and small
    attention     the kernels that could run instead of the one that `auto` takes: their order by speed was measured on
                  one GPU and at few sizes
    graphs        recorded or not, against the rule of `auto`, whose limit is one GPU's too
    loss chunk    larger ones fill the device where the vocabulary is small; smaller ones cost it nothing where it is
                  large, and leave memory

How a LoRA linear adds its low-rank term is no choice: of the ways that `bench/kernels/lora_strategies.py` compares, the
one in `fastft/kernels/lora_linear`, "before", was never slower than "after", at any size; "packed" gained nothing and
"augmented" needs other weights in memory (docs/log.md, 2026-11-22, "Where to add an adapter").

Candidates are ordered by `forecast.forecast`: there may be time for the first ones only.  For stock PEFT the
placement says whether Hugging Face checkpoints: `light` is no, `full` is yes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from autotune.forecast import forecast
from fastft.config import RunConfig
from fastft.defaults import default_choices, default_for, divisors
from fastft.hardware import Device
from fastft.memory.fitting import fit
from fastft.memory.model import estimate_peak_bytes, memory_terms, records
from fastft.models.shapes import ModelShape
from fastft.plan import OFFLOADED, POLICIES, Choices, Policy, Trial

EffortName = Literal["quick", "full", "exhaustive"]

MODEL_ERROR = 1.3
"""A candidate is pruned unseen only if its estimated peak is beyond the limit by this factor: the model of memory
may be wrong by so much before a fast candidate is lost."""

FIT_SHARE = 0.97
"""Share of the limit to which choices are fitted by arithmetic, which is right within some per cent."""

MIXED_HEADROOM = 0.99
"""Share of the limit that a solved placement may use by a prediction that measured peaks corrected: it is no better."""

WORTH_TRYING = 0.005
"""A solved placement that is expected to gain less than this share over what was measured is not tried."""

MEMORY_VERDICTS = ("out_of_memory", "allocator_retry", "over_cap")


@dataclass(frozen=True)
class Effort:
    """How much time tuning may take."""

    minutes: float | None
    """By default, on a GPU; None for as long as it takes.  At 20 s a probe, 20 or 180 s for the kernels and 25 s for
    the check of the gradients, the probes below take so long."""
    probes: int | None
    """New measurements at most; None for no limit."""
    uniform_probes: int | None
    """So many of them for uniform candidates."""
    mixed_probes: int
    """So many for solved mixed placements."""
    refinements: int | None
    """So many for changes of what leads."""
    refined_values: int | None
    """How many values are tried a choice and time; None for all."""
    below: int
    """How many micro-batches smaller than the default's are tried."""
    above: int
    """How many larger ones."""
    eager_on_gpu: bool
    """Whether plain PyTorch is tried beside Triton."""
    finalists: int
    retime_rounds: int
    confirmations: int
    """How often leader and default are timed once more while the lead is within twice the noise."""
    warmup_steps: int
    timed_steps: int
    """Optimizer steps after the warm-up; at least 3."""
    timeout_seconds: float
    """For one probe, loading and compiling included."""
    launches: int | None
    """How many launches are tried a kernel, beside its default; None for all that are declared."""
    kernel_seconds: float
    """For the kernel search.  Most of it goes to the compiler."""

    @property
    def repetitions(self) -> int:
        """Measurements that the finalists take, at most."""
        return self.finalists * self.retime_rounds + 2 * self.confirmations

    @property
    def most_probes(self) -> float:
        """As `probes`, infinite for no limit."""
        return float("inf") if self.probes is None else self.probes


EFFORTS: dict[EffortName, Effort] = {
    "quick": Effort(
        minutes=5, probes=11, uniform_probes=5, mixed_probes=2, refinements=3, refined_values=1,
        below=2, above=2, eager_on_gpu=False, finalists=2, retime_rounds=1, confirmations=1,
        warmup_steps=2, timed_steps=4, timeout_seconds=600, launches=3, kernel_seconds=20,
    ),
    "full": Effort(
        minutes=15, probes=29, uniform_probes=12, mixed_probes=4, refinements=8, refined_values=2,
        below=4, above=4, eager_on_gpu=True, finalists=3, retime_rounds=2, confirmations=2,
        warmup_steps=3, timed_steps=8, timeout_seconds=900, launches=None, kernel_seconds=180,
    ),
    "exhaustive": Effort(
        minutes=None, probes=None, uniform_probes=None, mixed_probes=24, refinements=None, refined_values=None,
        below=64, above=64, eager_on_gpu=True, finalists=6, retime_rounds=3, confirmations=3,
        warmup_steps=3, timed_steps=12, timeout_seconds=1800, launches=None, kernel_seconds=600,
    ),
}  # fmt: skip


def default_candidate(config: RunConfig, shape: ModelShape, device: Device) -> Choices:
    """What the run would do without a plan: the first candidate, which every other must beat."""
    return default_for(config, shape, device).choices


def candidates(config: RunConfig, shape: ModelShape, device: Device, effort: EffortName = "quick") -> list[Choices]:
    """Every uniform candidate in the order of trying, the default first, without what cannot fit.

    The order is that of the forecast: the best of each micro-batch first, then the second of each, and so on.  What may
    not fit comes last, and stock PEFT, of which no forecast is known before it ran, comes third at the latest.
    """
    level = EFFORTS[effort]
    limit = memory_limit(config, device)
    default = default_candidate(config, shape, device)
    unbound = config.memory_cap is None
    found = [default]

    def add(backend: str, micro_batch: int, policy: Policy) -> None:
        choices = default.model_copy(
            update={
                "backend": backend,
                "micro_batch": micro_batch,
                "accumulation": config.batch_size // micro_batch,
                "placement": [policy] * shape.layers,
            }
        )
        saved = memory_terms(shape, choices, config, device).saved
        if policy == "keep" and saved["keep"] == saved["light"]:
            return  # the same thing by another name
        fits = estimate_peak_bytes(shape, choices, config, device=device) <= limit * MODEL_ERROR
        if fits and choices not in found:
            found.append(choices)

    sizes = _micro_batches(config.batch_size, default.micro_batch, level, device, unbound=unbound)
    fused = [default.backend] if default.backend != "peft" else []
    if config.quantization != "none" or not unbound:
        # Not from the default: it may have given up for its own micro-batch what another need not.
        free = default_choices(config, shape, default.backend, device)
        for size in sizes if default.backend != "peft" else []:
            rows = free.model_copy(update={"micro_batch": size, "accumulation": config.batch_size // size})
            fitted = fit(int(FIT_SHARE * limit), shape, rows, config, device=device)
            if fitted is not None and fitted not in found:
                found.append(fitted)
    if device.kind == "cuda" and level.eager_on_gpu and "eager" not in fused:
        fused.append("eager")
    for backend in fused:
        for size in sizes:
            add(backend, size, "light")
    # Stock once in quick: whether it wins at all shows at the default's micro-batch.
    for size in sizes if effort != "quick" else [default.micro_batch]:
        add("peft", size, "light")
    if device.kind == "cpu" and effort == "quick" and unbound:
        # A CPU's few megabytes never bind, and recomputing more can only cost time.
        return _ordered(found, config, shape, device)
    more: list[Policy] = ["mlp", "full"]
    if effort == "exhaustive":
        more.append("keep")  # else tried from what leads
    if device.kind == "cuda":
        more += OFFLOADED
    for backend in fused:
        for policy in more:
            for size in sizes:
                add(backend, size, policy)
    for size in sizes if effort != "quick" else [default.micro_batch]:
        add("peft", size, "full")
    return _ordered(found, config, shape, device)


def _ordered(found: Sequence[Choices], config: RunConfig, shape: ModelShape, device: Device) -> list[Choices]:
    limit = memory_limit(config, device)

    def too_large(choices: Choices) -> bool:
        return estimate_peak_bytes(shape, choices, config, device=device) > limit

    def expected(choices: Choices) -> float:
        return forecast(choices, config, shape, device)

    default, *others = found
    alike: Counter[tuple[str, int]] = Counter()
    promise: dict[str, tuple[bool, int, float]] = {}
    for choices in sorted(others, key=lambda choices: (too_large(choices), expected(choices))):
        kind = choices.backend, choices.micro_batch
        promise[choices.model_dump_json()] = too_large(choices), alike[kind], expected(choices)
        alike[kind] += 1
    others.sort(key=lambda choices: promise[choices.model_dump_json()])
    stock = next((choices for choices in others if choices.backend == "peft"), None)
    if stock is not None and others.index(stock) > 1:
        others.remove(stock)
        others.insert(1, stock)
    return [default, *others]


LOSS_CHUNKS = (512, 1024, 2048, 4096, 8192)
"""Labelled rows at a time that are tried."""
FALLBACK_ATTENTION = "sdpa"
"""It runs its forward again in the backward, so that nothing is faster only where its kernel is: not tried in quick."""


def refinements(
    leader: Trial, config: RunConfig, shape: ModelShape, device: Device, effort: EffortName
) -> list[Choices]:
    """What differs from the leading choices in one thing and is predicted to fit, the greatest expected gain first."""
    choices, most = leader.choices, EFFORTS[effort].refined_values
    if choices.backend == "peft":
        return []
    tokens, chunk = choices.micro_batch * config.sequence_tokens, choices.loss_chunk_tokens
    # A chunk beyond the micro-batch's rows is as good as all rows.
    chunks = {min(other, tokens): other for other in reversed(LOSS_CHUNKS)}
    chunks.pop(min(chunk, tokens), None)
    larger, smaller = (sorted(c for c in chunks.values() if (c > chunk) is up) for up in (True, False))
    kernels = [name for name in ("auto", *leader.other_attention) if effort != "quick" or name != FALLBACK_ATTENTION]
    modes = [choices.model_copy(update={"graphs": mode}) for mode in ("auto", "off", "on")]
    recorded = records(shape, choices, config, device)
    # With the norms of most families `keep` is `light` by another name.
    saved = memory_terms(shape, choices, config, device).saved
    keeps = saved["keep"] != saved["light"]
    values: dict[str, list[Any]] = {
        "placement": [["keep"] * shape.layers] if keeps and uniform_policy(choices) == "light" else [],
        "attention": [name for name in kernels if name != choices.attention],
        "graphs": [mode.graphs for mode in modes if records(shape, mode, config, device) != recorded][:1],
        "loss_chunk_tokens": larger + smaller[::-1],
    }
    found = [choices.model_copy(update={name: value}) for name, of_name in values.items() for value in of_name[:most]]
    limit, before = memory_limit(config, device), estimate_peak_bytes(shape, choices, config, device=device)
    return [
        other
        for other in found
        if (leader.peak_bytes or 0) + estimate_peak_bytes(shape, other, config, device=device) - before <= limit
    ]


def memory_limit(config: RunConfig, device: Device) -> int:
    """The bytes that a run may use: the cap, and never more than the device has."""
    cap = config.memory_cap_bytes
    return device.memory_bytes if cap is None else min(cap, device.memory_bytes)


def uniform_policy(choices: Choices) -> Policy | None:
    """The one policy of a uniform placement; None for a mixed one."""
    return choices.placement[0] if len(set(choices.placement)) == 1 else None


_WEIGHED = {"micro_batch", "accumulation", "placement", "kernels"}
"""What `why_skip` compares, and launches, which change a step by less than that; all else must be equal."""


def why_skip(candidate: Choices, trials: Sequence[Trial], effort: EffortName) -> str | None:
    """Why a uniform candidate need not be tried after `trials`; None if it should be.

    - What needs at least the memory of something that had too little has too little.
    - What recomputes more than something that ran at the same micro-batch is slower (not assumed in exhaustive).
    """
    policy = uniform_policy(candidate)
    if policy is None:
        return None
    rank = POLICIES.index(policy)  # from most to least memory
    recomputed = POLICIES.index(OFFLOADED.get(policy, policy))
    alike = candidate.model_dump(exclude=_WEIGHED)
    same_backend = [t for t in trials if uniform_policy(t.choices) and t.choices.model_dump(exclude=_WEIGHED) == alike]
    for trial in same_backend:
        other = POLICIES.index(trial.choices.placement[0])
        if trial.verdict in MEMORY_VERDICTS and trial.choices.micro_batch <= candidate.micro_batch and other >= rank:
            return f"needs more memory than {trial.choices.summary()}, which had too little"
        if (
            effort != "exhaustive"
            and trial.verdict == "ok"
            and trial.choices.micro_batch == candidate.micro_batch
            and trial.choices.placement[0] not in OFFLOADED
            and (other < recomputed or (policy in OFFLOADED and other == recomputed))
        ):
            more = "recomputes more" if other < recomputed else "moves more"
            return f"{more} than {trial.choices.summary()}, which fits"
    return None


def _micro_batches(batch_size: int, default: int, level: Effort, device: Device, *, unbound: bool) -> list[int]:
    """Divisors around the default's, ascending."""
    sizes = divisors(batch_size)
    place = sizes.index(default)
    below, above = level.below, level.above
    if device.kind != "cuda":
        # A CPU is filled by few tokens: its default is large already, and larger ones only cost memory.  Smaller ones
        # gain some per cent on the full rows of a probe and lose more on the shorter ones of real data.
        above = 0
        below = 0 if unbound and level is EFFORTS["quick"] else below
    return sizes[max(0, place - below) : place + above + 1]
