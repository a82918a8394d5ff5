"""From a run to what it does: key, cached plan, shipped plan or default, and one line that says which.

What a run does without a plan is in `fastft.defaults`.
"""

import hashlib
import json
import os
import shlex
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastft import __version__
from fastft.cache import cache_folder
from fastft.config import LoraConfig, RunConfig
from fastft.defaults import default_for, require_backend
from fastft.errors import BackendError, ConfigError, ModelError, OutputError, PlanError
from fastft.files import canonical_json, write_atomically
from fastft.hardware import Device, kernels_sha256, resolve_dtype, soft_facts, software_versions
from fastft.models.shapes import SHAPES, SUPPORTED_FAMILIES, ModelShape
from fastft.plan import Choices, Plan, PlanKey
from fastft.plan_store import PlanStore, read_foreign_plan
from fastft.plans.shipped import ShippedPlans, choices_here
from fastft.plans.verification import Verification, Verifications
from fastft.units import age

KEY_VERSIONS = ("torch", "triton", "cuda", "bitsandbytes")
_NAMED_FIELDS = 3
"""Of those in which a plan missed; `fastft plan diff` names all."""


@dataclass(frozen=True)
class Resolution:
    """What a run does, and why."""

    plan: Plan | None
    """None where the default is used."""
    choices: Choices
    message: str
    """One line for people."""
    warnings: tuple[str, ...] = ()
    verified_for: PlanKey | None = None
    """This run's key where a shipped plan is followed as it is, so that training can verify it; else None."""


def model_shape(config: RunConfig, cache: Path | None = None) -> ModelShape:
    """The shape of `config.model`, without loading weights, and where possible without importing torch.

    Shipped shapes are a table.  For a local folder the shape is remembered in the cache folder under a hash of
    its `config.json`, because reading one through Hugging Face takes seconds of imports.

    Args:
        cache: the cache folder, default `cache.cache_folder()`.

    Raises:
        ModelError: the model is not found, or its family has no layer specification and hence no plans.
    """
    if config.model in SHAPES and not Path(config.model).is_dir():
        return SHAPES[config.model]
    folder = Path(str(files("fastft.models") / "tiny")) if config.model == "tiny" else Path(config.model)
    memo: Path | None = None
    try:
        content = (folder / "config.json").read_bytes()
        version = software_versions()["transformers"].encode()
        digest = hashlib.sha256(version + b"\0" + content).hexdigest()
        memo = (cache or cache_folder()) / "shapes" / f"{digest[:32]}.json"
        return ModelShape(**json.loads(memo.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        pass  # no local config.json, or nothing remembered yet, or a file that is no shape: resolve it
    from fastft.models.loading import resolve_model

    resolved = resolve_model(config.model, offline=config.offline, trust_remote_code=config.trust_remote_code)
    if resolved.shape is None:
        raise ModelError(
            "plans are for supported model types only", got=getattr(resolved.config, "model_type", config.model),
            allowed=SUPPORTED_FAMILIES, fix="train it with --backend peft --plan none",
        )  # fmt: skip
    if memo is not None:
        with suppress(OutputError):
            write_atomically(memo, canonical_json(resolved.shape.as_dict()) + "\n")
    return resolved.shape


def plan_key(config: RunConfig, shape: ModelShape, device: Device) -> PlanKey:
    """For what a plan of this run holds.

    Two roundings make the key say what matters: memory is in whole GiB, because its last megabytes change with
    the driver or the kernel; and a CPU's cores stand where a GPU's multiprocessors do.
    """
    versions = software_versions()
    return PlanKey(
        device=device.name,
        compute_capability=device.compute_capability,
        multiprocessors=device.multiprocessors if device.kind == "cuda" else device.cores,
        device_memory_bytes=max(1, round(device.memory_bytes / 2**30)) * 2**30,
        versions={name: versions[name] for name in KEY_VERSIONS},
        kernels_sha256=kernels_sha256(),
        model_shape=shape.sizes(),
        lora_rank=config.lora.rank,
        lora_targets=sorted(config.lora.targets or shape.spec.targets),
        lora_dropout=config.lora.dropout,
        quantization=config.quantization,
        dtype=resolve_dtype(config.dtype, device),
        sequence_tokens=config.sequence_tokens,
        packing=config.packing,
        global_batch=config.batch_size,
        optimizer=config.optimizer,
        world_size=_world_size(),
        memory_cap_bytes=config.memory_cap_bytes,
    )


def resolve(
    config: RunConfig, shape: ModelShape, device: Device, store: PlanStore, shipped: ShippedPlans | None = None
) -> Resolution:
    """Follow `config.plan`: the cached plan, a shipped one, a plan file, or the default; then what the run pins itself.

    Args:
        store: the user's plans; a plan in it comes before a shipped one.
        shipped: None takes those that come with fastft.

    Raises:
        PlanError: a plan file that is invalid or for another run (the message names the fields), or a cap that
            the model alone exceeds.
        BackendError: a backend was asked for that cannot run here.
    """
    if config.backend != "auto":
        require_backend(config.backend, device)
    if config.plan == "none":
        return _without_plan(config, shape, device, "no plan, as asked")
    key = plan_key(config, shape, device)
    if config.plan != "auto":
        plan = read_foreign_plan(Path(config.plan))
        if plan.key != key:
            raise PlanError(
                f"plan {plan.id} is for another run",
                got="; ".join(describe_difference(plan.key, key)),
                fix=f"tune this run: {tune_command(config)}",
            )
        require_backend(plan.choices.backend, device)
        return _follow(plan, config, device)
    cached = store.load(key)
    if cached is not None:
        problem = _why_not(cached, device)
        if problem is not None:
            return _without_plan(config, shape, device, problem)
        return _follow(cached, config, device)
    nearest = _nearest(key, store)
    hint = f"find a faster one once: {tune_command(config)}"
    found = (shipped or ShippedPlans()).load(key)
    if found is None:
        return _without_plan(config, shape, device, "no plan for this run yet" + nearest, hint=hint)
    verification = Verifications(store.cache).load(key, found)
    problem = _why_not(found, device)
    if verification is not None and verification.verdict == "rejected":
        problem = (
            f"plan {found.id}, shipped with fastft {__version__}, was rejected on this machine "
            f"{age(verification.created_at)} ({verification.detail})"
        )
    if problem is not None:
        return _without_plan(config, shape, device, problem + nearest, hint=hint)
    return _follow_shipped(found, config, device, key, verification, nearest)


def describe_difference(theirs: PlanKey, mine: PlanKey) -> list[str]:
    """One phrase a differing field, nested ones by their path: `versions.torch: plan 2.12.0, this run 2.13.0`."""
    phrases = []
    for name, (old, new) in theirs.difference(mine).items():
        if isinstance(old, dict) and isinstance(new, dict):
            inner = [field for field in sorted({*old, *new}) if old.get(field) != new.get(field)]
            phrases += [f"{name}.{field}: plan {old.get(field)}, this run {new.get(field)}" for field in inner]
        elif name == "kernels_sha256":
            phrases.append(f"{name}: plan {old[:12]}, this run {new[:12]}")
        else:
            phrases.append(f"{name}: plan {old}, this run {new}")
    return phrases


def soft_difference(plan: Plan) -> list[str]:
    """What differs from when the plan was tuned but does not unmake it: driver version, power limit."""
    if plan.key.compute_capability is None or not plan.evidence.soft:
        return []
    now = soft_facts()
    return [
        f"{name} was {plan.evidence.soft[name]} when the plan was tuned and is {now[name]} now"
        for name in sorted(plan.evidence.soft)
        if name in now and now[name] != plan.evidence.soft[name]
    ]


def tune_command(config: RunConfig) -> str:
    """The command that tunes exactly this run: `fastft tune` with every flag that is part of the key, and with those
    that let it find the model."""
    words = ["fastft", "tune", config.model]
    names = (
        "sequence_tokens", "batch_size", "optimizer", "packing", "quantization", "dtype", "device", "memory_cap",
        "offline", "trust_remote_code",
    )  # fmt: skip
    pairs: list[tuple[str, Any, Any]] = [
        (name, getattr(config, name), RunConfig.model_fields[name].default) for name in names
    ]
    pairs += [
        (name, getattr(config.lora, name), LoraConfig.model_fields[name].default)
        for name in ("rank", "dropout", "targets")
    ]
    for name, value, default in pairs:
        if value == default:
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, ",".join(value) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)


def _without_plan(config: RunConfig, shape: ModelShape, device: Device, why: str, *, hint: str = "") -> Resolution:
    default = default_for(config, shape, device)
    limit = f"; estimated under {default.limit}" if default.limit else ""
    message = f"{why}{limit}: default {default.choices.summary()}" + (f"; {hint}" if hint else "")
    return Resolution(plan=None, choices=default.choices, message=message, warnings=default.warnings)


def _follow(plan: Plan, config: RunConfig, device: Device) -> Resolution:
    choices, pinned = _pinned(plan.choices, config)
    message = f"plan {plan.id}: {choices.summary()}; {plan.origin} {age(plan.evidence.created_at)}{_speeds(plan)}"
    return Resolution(
        plan=plan, choices=choices, message=message + _own(pinned), warnings=tuple(soft_difference(plan))
    )  # fmt: skip


def _follow_shipped(
    plan: Plan, config: RunConfig, device: Device, key: PlanKey, verification: Verification | None, nearest: str
) -> Resolution:
    choices, pinned = _pinned(choices_here(plan, key), config)
    message = (
        f"plan {plan.id}: {choices.summary()}; shipped with fastft {__version__}, made on {plan.key.device} "
        f"{age(plan.evidence.created_at)}{_speeds(plan)}; {describe_verification(verification)}{nearest}"
    )
    return Resolution(
        plan=plan, choices=choices, message=message + _own(pinned), warnings=tuple(soft_difference(plan)),
        verified_for=None if pinned else key,
    )  # fmt: skip


def describe_verification(verification: Verification | None) -> str:
    """One phrase: `verified on this machine 2 days ago`."""
    if verification is None:
        return "not verified on this machine yet"
    return f"{verification.verdict} on this machine {age(verification.created_at)}"


def _speeds(plan: Plan) -> str:
    best, default = plan.evidence.best_tokens_per_second, plan.evidence.default_tokens_per_second
    if best is None:
        return ""
    return f" at {best:,.0f} tokens/s" + (f" (default {default:,.0f})" if default is not None else "")


def _own(pinned: list[str]) -> str:
    return f"; this run itself sets {', '.join(pinned)}" if pinned else ""


def _why_not(plan: Plan, device: Device) -> str | None:
    """Why a plan cannot be followed on this device, or None."""
    try:
        require_backend(plan.choices.backend, device)
    except (BackendError, ConfigError) as error:
        return f"plan {plan.id} cannot run here ({error})"
    return None


def _nearest(key: PlanKey, store: PlanStore) -> str:
    """The cached plan for this model that missed by the fewest fields, and these; empty if there is none."""
    misses = [(describe_difference(plan.key, key), plan) for plan in store.entries()
              if plan.key.model_shape == key.model_shape]  # fmt: skip
    if not misses:
        return ""
    phrases, plan = min(misses, key=lambda miss: len(miss[0]))
    more = f" and {len(phrases) - _NAMED_FIELDS} more" if len(phrases) > _NAMED_FIELDS else ""
    return f" (the nearest of yours, {plan.id}, differs: {'; '.join(phrases[:_NAMED_FIELDS])}{more})"


def _pinned(choices: Choices, config: RunConfig) -> tuple[Choices, list[str]]:
    """`choices` with what the run gives explicitly, and what that changed."""
    wanted: dict[str, Any] = {}
    if config.backend != "auto":
        wanted["backend"] = config.backend
    if config.micro_batch is not None:
        wanted |= {"micro_batch": config.micro_batch, "accumulation": config.batch_size // config.micro_batch}
    if config.placement is not None:
        wanted["placement"] = [config.placement] * len(choices.placement)
    changed = [name for name, value in wanted.items() if getattr(choices, name) != value and name != "accumulation"]
    shown = [f"{name} = {getattr(config, name)}" for name in changed]
    return choices.model_copy(update=wanted), shown


def _world_size() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdigit() and int(text) > 0 else 1
