"""What the tuner may try, declared in one place, each choice with its reason.

    backend       the fused engine of this device; stock PEFT, because it may win, and then it should
    micro-batch   divisors of the global batch: every optimizer step still sees the same samples
    placement     one policy for all layers; mixed placements are solved from what these measured
    the rest      loss and MLP chunks, dense copies of quantized weights, the embedding on the host: as arithmetic fits
                  them to the memory there is (`fastft.memory.fitting`), one candidate a micro-batch
    launches      those that the kernel search found (`kernels`), for every candidate of backend triton but the default

For stock PEFT the placement says whether Hugging Face checkpoints: `light` is no, `full` is yes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fastft.config import RunConfig
from fastft.hardware import Device
from fastft.memory.fitting import fit
from fastft.memory.model import estimate_peak_bytes, memory_terms
from fastft.models.shapes import ModelShape
from fastft.plan import OFFLOADED, POLICIES, Choices, Policy, Trial
from fastft.planning import divisors, without_plan

EffortName = Literal["quick", "full", "exhaustive"]

MODEL_ERROR = 1.3
"""A candidate is pruned unseen only if its estimated peak is beyond the limit by this factor: the model of memory
may be wrong by so much before a fast candidate is lost."""

FIT_SHARE = 0.97
"""Share of the limit to which choices are fitted by arithmetic, which is right within some per cent."""

MEMORY_VERDICTS = ("out_of_memory", "allocator_retry", "over_cap")


@dataclass(frozen=True)
class Effort:
    """How much time tuning may take."""

    below: int
    """How many micro-batches smaller than the default's are tried."""
    above: int
    """How many larger ones."""
    eager_on_gpu: bool
    """Whether plain PyTorch is tried beside Triton."""
    keep_at_best: int
    """At how many of the best micro-batches `keep` is tried."""
    mixed_confirmations: int
    """How many solved mixed placements are measured."""
    finalists: int
    retime_rounds: int
    warmup_steps: int
    timed_steps: int
    """Optimizer steps after the warm-up; at least 3."""
    timeout_seconds: float
    """For one probe, loading and compiling included."""
    launches: int | None
    """How many launches are tried a kernel, beside its default; None for all that are declared."""
    kernel_seconds: float
    """For the kernel search.  Most of it goes to the compiler."""


EFFORTS: dict[EffortName, Effort] = {
    "quick": Effort(
        below=2, above=2, eager_on_gpu=False, keep_at_best=1, mixed_confirmations=2, finalists=3, retime_rounds=1,
        warmup_steps=2, timed_steps=4, timeout_seconds=600, launches=3, kernel_seconds=20,
    ),
    "full": Effort(
        below=4, above=4, eager_on_gpu=True, keep_at_best=2, mixed_confirmations=4, finalists=4, retime_rounds=2,
        warmup_steps=3, timed_steps=8, timeout_seconds=900, launches=None, kernel_seconds=180,
    ),
    "exhaustive": Effort(
        below=64, above=64, eager_on_gpu=True, keep_at_best=64, mixed_confirmations=8, finalists=6, retime_rounds=3,
        warmup_steps=3, timed_steps=12, timeout_seconds=1800, launches=None, kernel_seconds=600,
    ),
}  # fmt: skip


def default_candidate(config: RunConfig, shape: ModelShape, device: Device) -> Choices:
    """What the run would do without a plan: the first candidate, which every other must beat."""
    return without_plan(config, shape, device, "default").choices


def candidates(config: RunConfig, shape: ModelShape, device: Device, effort: EffortName = "quick") -> list[Choices]:
    """Every uniform candidate in the order of trying, the default first, without what cannot fit.

    Cheap placements come before expensive ones and small micro-batches before large ones, so that a failure for
    lack of memory rules out what needs more (`why_skip`).
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
        for size in sizes if default.backend != "peft" else []:
            rows = default.model_copy(update={"micro_batch": size, "accumulation": config.batch_size // size})
            fitted = fit(int(FIT_SHARE * limit), shape, rows, config, device=device)
            if fitted is not None and fitted.choices not in found:
                found.append(fitted.choices)
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
        for size in sizes[-2:]:
            add(default.backend, size, "keep")
        return found
    more: list[Policy] = ["keep", "mlp", "full"]
    if device.kind == "cuda":
        more += OFFLOADED
    for backend in fused:
        for policy in more:
            for size in sizes:
                add(backend, size, policy)
    for size in sizes if effort != "quick" else [default.micro_batch]:
        add("peft", size, "full")
    return found


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
    - `keep` is tried at the best micro-batches only.
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
    if policy == "keep":
        ran = [
            t
            for t in same_backend
            if t.verdict == "ok" and t.tokens_per_second and uniform_policy(t.choices) == "light"
        ]
        ran.sort(key=lambda trial: trial.tokens_per_second or 0.0, reverse=True)
        best = [trial.choices.micro_batch for trial in ran[: EFFORTS[effort].keep_at_best]]
        if candidate.micro_batch not in best:
            return "this micro-batch is not among the best"
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
