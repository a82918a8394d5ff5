"""Plan: what to do, for what it holds, and how it was measured.

`PlanKey` names everything that can change which plan is the fastest; two runs with equal keys may share a
plan.  `Choices` is what a run follows.  `Plan` binds both to the evidence.  A plan is one canonical JSON
document with a checksum; `fastft.plan_store` keeps them.
"""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fastft.errors import PlanError
from fastft.files import canonical_json, sha256_of

PLAN_SCHEMA = 1
SEARCH_SPACE_VERSION = 3

Policy = Literal["keep", "light", "mlp", "full", "offload_mlp", "offload"]
POLICIES: tuple[Policy, ...] = ("keep", "light", "mlp", "full", "offload_mlp", "offload")
"""What a decoder layer saves for its backward, from most to least memory on the device (see `fastft.engine.layer`); the
last two save what `mlp` and `full` do, in host memory."""
OFFLOADED: dict[Policy, Policy] = {"offload_mlp": "mlp", "offload": "full"}
"""What is saved, and computed again, by the policies that use host memory."""


def keeps_input_only(policy: Policy) -> bool:
    """Whether a layer is computed again from its input: what stock gradient checkpointing does."""
    return OFFLOADED.get(policy, policy) == "full"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PlanKey(_Frozen):
    """For what a plan holds.  Any difference is a miss; `difference` names the fields."""

    device: str
    compute_capability: str | None
    multiprocessors: int | None
    device_memory_bytes: int
    versions: dict[str, str]
    """torch, triton, cuda, bitsandbytes ("none" where absent)."""
    kernels_sha256: str
    model_shape: dict[str, Any]
    """`ModelShape.sizes()`: the shape, not the name."""
    lora_rank: int
    lora_targets: list[str]
    lora_dropout: float
    quantization: Literal["none", "nf4", "fp4", "int8"]
    dtype: str
    sequence_tokens: int
    packing: bool
    global_batch: int
    """Sequences per optimizer step; micro-batch × accumulation equals it."""
    optimizer: str
    world_size: int
    memory_cap_bytes: int | None
    search_space: int = SEARCH_SPACE_VERSION

    @property
    def digest(self) -> str:
        """16 hex digits that name this key."""
        return sha256_of(self.model_dump())[:16]

    def difference(self, other: "PlanKey") -> dict[str, tuple[Any, Any]]:
        """The fields in which the two keys differ: name → (mine, the other's)."""
        mine, theirs = self.model_dump(), other.model_dump()
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}


LOSS_CHUNK_TOKENS = 2048
"""Labelled rows whose logits exist at a time, unless a plan says otherwise."""

_NOT_FOR_MODEL = {"backend", "micro_batch", "accumulation"}


class Choices(_Frozen):
    """What a run does.  None of it changes what is trained: batch, order, loss and gradients stay."""

    backend: str
    micro_batch: int = Field(ge=1)
    accumulation: int = Field(ge=1)
    placement: list[Policy] = Field(min_length=1)
    """One policy a decoder layer, from the first to the last."""
    attention: str = "auto"
    """An implementation of `fastft.kernels.attention`, or auto."""
    loss_chunk_tokens: int = Field(default=LOSS_CHUNK_TOKENS, ge=1)
    """Labelled rows whose logits exist at a time."""
    mlp_chunk_tokens: int | None = Field(default=None, ge=1)
    """About how many tokens a layer's MLP takes at a time, where its gate is not saved; None for all."""
    resident_layers: int = Field(default=0, ge=0)
    """So many layers, the first ones, keep their quantized weights dense as well."""
    host_embedding: bool = False
    """Whether the input embedding stays in host memory."""
    graphs: Literal["auto", "on", "off"] = "auto"
    """Whether CUDA graphs replay the layers; auto: where a step is small enough to be bound by its launches."""
    kernels: dict[str, list[int]] = {}
    """Launches other than the kernels' defaults: bucket → fields (see `fastft.kernels.launches`, which checks them)."""

    @property
    def for_model(self) -> dict[str, Any]:
        """All but the backend and how the batch is cut, by the names of `fastft.engine.patch.patch_model`."""
        return {name: getattr(self, name) for name in type(self).model_fields if name not in _NOT_FOR_MODEL}

    def summary(self) -> str:
        """One phrase for people: `triton, 4×2 sequences, placement 20×light + 12×full`."""
        runs: list[tuple[str, int]] = []
        for policy in self.placement:
            if runs and runs[-1][0] == policy:
                runs[-1] = (policy, runs[-1][1] + 1)
            else:
                runs.append((policy, 1))
        placement = " + ".join(f"{count}×{policy}" for policy, count in runs)
        more = [f", MLP by {self.mlp_chunk_tokens} tokens"] if self.mlp_chunk_tokens is not None else []
        more += [f", {self.resident_layers} layers dense"] if self.resident_layers else []
        more += [", embedding on the host"] if self.host_embedding else []
        more += [f", attention {self.attention}"] if self.attention != "auto" else []
        more += [f", loss by {self.loss_chunk_tokens} rows"] if self.loss_chunk_tokens != LOSS_CHUNK_TOKENS else []
        more += [f", graphs {self.graphs}"] if self.graphs != "auto" else []
        more += [f", tuned launches: {len(self.kernels)}"] if self.kernels else []
        return f"{self.backend}, {self.micro_batch}×{self.accumulation} sequences, placement {placement}{''.join(more)}"


class Trial(_Frozen):
    """One candidate that the tuner ran, or tried to."""

    choices: Choices
    verdict: Literal["ok", "out_of_memory", "allocator_retry", "over_cap", "failed", "timeout", "parity_failed"]
    step_time_ms: list[float] = []
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    model_bytes: int | None = None
    detail: str = ""
    other_attention: list[str] = []
    """Implementations of attention that could have run in place of what `auto` takes here."""
    reused: bool = False
    """Whether an earlier tuning measured it, under another memory cap."""


class KernelTrial(_Frozen):
    """One launch of one kernel that the tuner ran, or tried to."""

    bucket: str
    """The name of a `fastft.kernels.launches.Bucket`."""
    launch: list[int]
    verdict: Literal["ok", "wrong", "failed", "too_large"]
    """wrong: its results are not the default's; too_large: the device cannot run it, so it was not tried."""
    microseconds: list[float] = []
    """A call, each time that it was measured."""
    detail: str = ""


class Evidence(_Frozen):
    """How the plan was found: everything tried, and the circumstances."""

    trials: list[Trial]
    kernels: list[KernelTrial] = []
    """A bucket's default comes first, the others in the order of their declaration."""
    default_tokens_per_second: float | None = None
    best_tokens_per_second: float | None = None
    seed: int = 0
    command: str = ""
    created_at: str = ""
    """ISO 8601, UTC."""
    seconds: float = 0.0
    """How long the tuning took."""
    out_of_time: bool = False
    """Whether it ended before everything was tried."""
    soft: dict[str, Any] = {}
    """What may differ with a warning only: driver version, power limit."""
    versions: dict[str, str] = {}


class Plan(_Frozen):
    """A key, the choices that were best for it, and the evidence."""

    schema_version: int = PLAN_SCHEMA
    key: PlanKey
    choices: Choices
    evidence: Evidence
    origin: Literal["tuned", "imported", "shipped"] = "tuned"
    model_name: str = ""
    """What the user called the model; for people only."""

    @model_validator(mode="after")
    def _consistent(self) -> "Plan":
        layers = self.key.model_shape.get("layers")
        if layers is not None and len(self.choices.placement) != layers:
            raise ValueError(f"placement names {len(self.choices.placement)} layers, the model has {layers}")
        if self.choices.micro_batch * self.choices.accumulation != self.key.global_batch:
            raise ValueError(
                f"micro_batch {self.choices.micro_batch} × accumulation {self.choices.accumulation} "
                f"is not the global batch {self.key.global_batch}"
            )
        return self

    @property
    def id(self) -> str:
        """`<key digest>-<choices digest>`: changes whenever what is done, or for what, changes."""
        return f"{self.key.digest}-{sha256_of(self.choices.model_dump())[:8]}"

    def to_json(self) -> str:
        """Canonical JSON with a checksum over everything else."""
        body = self.model_dump()
        return canonical_json({**body, "checksum": sha256_of(body)}) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: str) -> "Plan":
        """Parse and validate.

        Raises:
            PlanError: no JSON, another schema, a wrong checksum, or fields that make no sense.
        """
        fix = "remove it and run `fastft tune` again"
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:  # a JSONDecodeError, or a number too long for Python
            raise PlanError(f"plan {where} is not JSON", got=str(error)[:120], fix=fix) from error
        if not isinstance(body, dict):
            raise PlanError(f"plan {where} is not a JSON object", got=type(body).__name__, fix=fix)
        if body.get("schema_version") != PLAN_SCHEMA:
            raise PlanError(
                f"plan {where} has another schema", got=str(body.get("schema_version")), allowed=PLAN_SCHEMA,
                fix="use the fastft that wrote it, or run `fastft tune` again",
            )  # fmt: skip
        checksum = body.pop("checksum", None)
        try:
            if checksum != sha256_of(body):
                raise PlanError(f"plan {where} was changed or cut off", got="a wrong checksum", fix=fix)
            return cls.model_validate(body)
        except (ValidationError, ValueError) as error:
            detail = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
            field = ".".join(map(str, detail["loc"])) or "plan"
            raise PlanError(f"plan {where} is invalid", got=f"{field}: {detail['msg']}", fix=fix) from error
