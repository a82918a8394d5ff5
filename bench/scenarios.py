"""Scenarios: what the bench measures.

A scenario fixes everything that two arms must share to be comparable: model, data, batch, steps, seeds.
`SCENARIOS` holds the built-in ones; `load_scenario` reads another one from a TOML file:

    name = "mine"
    arms = ["peft", "eager"]
    steps = 20                    # counted, after warmup_steps = 2 others
    data = "rows"                 # or "random": full rows of random tokens

    [config]                      # what `fastft train` reads, without steps and seed
    model = "tiny"
    batch_size = 16
    [config.lora]
    rank = 8

    [accuracy]                    # optional, with the embedded data: exact match before and after
    rows = 128
"""

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bench.arms import find_arm
from fastft.config import LoraConfig, RunConfig
from fastft.errors import ConfigError, unknown_choice
from fastft.plan import POLICIES


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AccuracyCheck(_Frozen):
    """Exact match on held-out rows of the embedded task, before and after training."""

    rows: int = Field(default=128, ge=1)
    max_new_tokens: int = Field(default=64, ge=1)
    batch_size: int = Field(default=32, ge=1)


class GateSize(_Frozen):
    """How large the parity gate's model and batch are."""

    layers: int | None = Field(default=None, ge=len(POLICIES))
    """Depth of the copy that the gate runs on, widths unchanged; None is the whole model.

    At least one layer for each placement policy, so that every policy an arm uses is checked.

    Only a shipped shape can be cut: its weights are random anyway.
    """
    sequence_tokens: int = Field(default=512, ge=8)
    """Upper bound; the run's own sequence length counts where it is shorter."""


class Scenario(_Frozen):
    """One comparison.  Every arm sees the same model, initial adapter and batches."""

    name: str = Field(min_length=1)
    description: str = ""
    config: RunConfig
    arms: tuple[str, ...] = Field(default=("peft", "eager", "triton"), min_length=1)
    stock_micro_batch: int | None = Field(default=None, ge=1)
    """What a stock arm puts on the device at a time; None is the whole batch.  It must divide the batch size."""
    repetitions: int = Field(default=3, ge=1)
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    """Repetition r uses `seeds[r % len(seeds)]` for the adapter, the data and the order."""
    warmup_steps: int = Field(default=2, ge=0)
    """Steps before the counted ones.  They train too; no statistic counts them."""
    steps: int = Field(ge=1)
    """Counted optimizer steps."""
    data: Literal["rows", "random"] = "rows"
    """`rows` are those of `config.data`; `random` are full rows of random tokens, every one a label."""
    accuracy: AccuracyCheck | None = None
    gate: GateSize = GateSize()
    timeout_seconds: float = Field(default=1800.0, gt=0)
    """Of one process: a gate or a repetition."""

    @field_validator("arms")
    @classmethod
    def _known_arms(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for arm in value:
            find_arm(arm)
        if len(set(value)) != len(value):
            raise ConfigError("an arm is named twice", got=", ".join(value), fix="name each arm once")
        return value

    @model_validator(mode="after")
    def _learns_before_it_is_judged(self) -> "Scenario":
        if self.accuracy is not None and (self.data == "random" or self.config.data != "embedded"):
            raise ConfigError(
                "accuracy is measured on the embedded task only",
                got=f"data {self.data}, config.data {self.config.data}",
                fix="leave accuracy out, or train on the embedded data",
            )  # fmt: skip
        if self.stock_micro_batch is not None and self.config.batch_size % self.stock_micro_batch:
            raise ConfigError(
                "stock_micro_batch does not divide batch_size",
                got=f"batch_size {self.config.batch_size}, stock_micro_batch {self.stock_micro_batch}",
                fix="choose a divisor, so that every arm's optimizer step sees the same global batch",
            )
        if self.total_steps < 2:
            # The first step moves B alone (A's gradient is zero while B is), so nothing proves that A trains.
            raise ConfigError(
                "a repetition of one step cannot show that every adapter tensor trains",
                got=f"warmup_steps {self.warmup_steps}, steps {self.steps}", allowed="2 in all or more",
                fix="raise steps",
            )  # fmt: skip
        return self

    @property
    def total_steps(self) -> int:
        """Optimizer steps of one repetition."""
        return self.warmup_steps + self.steps

    def seed(self, repetition: int) -> int:
        """The seed of a repetition."""
        return self.seeds[repetition % len(self.seeds)]

    def run_config(self, seed: int) -> RunConfig:
        """The configuration of one repetition: `config` with the scenario's steps and this seed."""
        return self.config.model_copy(update={"steps": self.total_steps, "seed": seed})

    def changed(
        self,
        *,
        arms: tuple[str, ...] | None = None,
        repetitions: int | None = None,
        config: dict[str, Any] | None = None,
    ) -> "Scenario":
        """This scenario with other arms, repetitions or configuration values (flat, as flags are).

        Raises:
            ConfigError: an unknown arm, key or value.
        """
        values = self.model_dump()
        values["arms"] = self.arms if arms is None else arms
        values["repetitions"] = self.repetitions if repetitions is None else repetitions
        run = values.pop("config")
        for name, value in (config or {}).items():
            _refuse_own_keys({name}, "the override")
            target = run["lora"] if name in LoraConfig.model_fields else run
            target[name] = value
        return _validate({**values, "config": RunConfig.of(run)}, "the scenario")


# The recipe of the embedded model's card (fastft/models/tiny/README.md).
_EMBEDDED_STEPS = 200
_EMBEDDED_WARMUP = 10
_EMBEDDED_CONFIG = RunConfig(
    model="tiny", data="embedded", batch_size=16, sequence_tokens=256, learning_rate=2e-3, schedule="constant",
    optimizer="adamw",
)  # fmt: skip


def _speed(
    name: str, model: str, batch_size: int, stock_micro_batch: int, sequence_tokens: int, description: str
) -> Scenario:
    """A shipped shape with random weights on random tokens: speed and memory, nothing to learn.

    Everything else is `RunConfig`'s default, so `fastft tune MODEL --sequence-tokens N` makes the plan for it.
    """
    return Scenario(
        name=name,
        description=description,
        config=RunConfig(model=model, batch_size=batch_size, sequence_tokens=sequence_tokens),
        stock_micro_batch=stock_micro_batch,
        arms=("peft", "peft+checkpointing", "triton"),
        warmup_steps=2,
        steps=6,
        data="random",
        gate=GateSize(layers=6, sequence_tokens=512),
    )


def _tuned(name: str, description: str, **config: Any) -> Scenario:
    """What the plan is worth: the run as `fastft tune` with the same flags knows it, against its default."""
    return Scenario(
        name=name,
        description=f"{description}: the tuned plan against the default.  Report it with --baseline triton+default.",
        config=RunConfig(**config),
        arms=("triton+default", "triton"),
        warmup_steps=2,
        steps=6,
        data="random",
        gate=GateSize(layers=6, sequence_tokens=512),
    )


SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            name="embedded",
            description="The embedded model learns the embedded data: speed, memory and accuracy on any machine.",
            config=_EMBEDDED_CONFIG,
            warmup_steps=_EMBEDDED_WARMUP,
            steps=_EMBEDDED_STEPS - _EMBEDDED_WARMUP,
            accuracy=AccuracyCheck(rows=128),
        ),
        Scenario(
            name="embedded-quick",
            description="The same work for a few steps, without accuracy: does the bench run here?",
            config=_EMBEDDED_CONFIG,
            repetitions=2,
            warmup_steps=1,
            steps=4,
        ),
        _speed(
            "llama-3-8b", "llama-3-8b", 16, 4, 2048,
            "Llama-3-8B's shape, 16 × 2,048 random tokens a step; stock in micro-batches of 4.",
        ),
        _tuned(
            "llama-3-8b-nf4", "Llama-3-8B's shape in NF4, 4 × 2,048 random tokens a step",
            model="llama-3-8b", quantization="nf4", batch_size=4, sequence_tokens=2048, optimizer="adamw_8bit",
        ),
        _tuned(
            "llama-3-8b-short", "Llama-3-8B's shape, 1 × 1,024 random tokens a step",
            model="llama-3-8b", batch_size=1, sequence_tokens=1024,
        ),
        _tuned(
            "llama-3-8b-long", "Llama-3-8B's shape, 1 × 32,768 random tokens a step",
            model="llama-3-8b", batch_size=1, sequence_tokens=32768,
        ),
        _speed(
            "qwen2-1.5b", "qwen2-1.5b", 16, 4, 2048,
            "Qwen2-1.5B's shape, 16 × 2,048 random tokens a step; stock in micro-batches of 4.",
        ),
        _speed(
            "qwen2-1.5b-small-batch", "qwen2-1.5b", 1, 1, 1024,
            "Qwen2-1.5B's shape, 1 × 1,024 random tokens a step: launches, not arithmetic, set the pace.",
        ),
    )
}  # fmt: skip
"""The built-in scenarios by name."""


def load_scenario(name_or_path: str | Path) -> Scenario:
    """A built-in scenario, or one from a TOML file.

    Raises:
        ConfigError: neither a known name nor a file; no TOML; an unknown key; a value that is not allowed.
    """
    name = str(name_or_path)
    if name in SCENARIOS:
        return SCENARIOS[name]
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.is_file():
        return _from_toml(path)
    raise unknown_choice("scenario", name, SCENARIOS)


def _from_toml(path: Path) -> Scenario:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read the scenario {path}", got=error.strerror or str(error), fix="check the path"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML", got=str(error), fix="correct the line it names") from error
    config = values.pop("config", {})
    if not isinstance(config, dict):
        raise ConfigError(f"config in {path} is not a table", got=config, fix="write it as a [config] section")
    _refuse_own_keys(set(config), str(path))
    return _validate({"name": path.stem, **values, "config": RunConfig.of(config)}, str(path))


def _refuse_own_keys(keys: set[str], where: str) -> None:
    """`steps`, `epochs` and `seed` have one place, the scenario; a second one would be ignored in silence."""
    for key in ("steps", "epochs", "seed"):
        if key in keys:
            raise ConfigError(
                f"the scenario itself sets config's {key}", got=f"{key} in the configuration of {where}",
                fix="use the scenario's own steps, warmup_steps and seeds",
            )  # fmt: skip


def _validate(values: dict[str, Any], where: str) -> Scenario:
    """Build a scenario; pydantic's errors become one `ConfigError`."""
    try:
        return Scenario.model_validate(values)
    except ValidationError as error:
        # A misspelt key is often two errors: it is unknown, and the one that was meant is missing.
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        *parents, name = [str(part) for part in first["loc"]] or ["scenario"]
        if first["type"] == "extra_forbidden":
            sections: dict[str, type[BaseModel]] = {"accuracy": AccuracyCheck, "gate": GateSize}
            fields = sections.get(parents[0] if parents else "", Scenario).model_fields
            raise unknown_choice(f"key '{'.'.join([*parents, name])}' in {where}", name, fields) from error
        raise ConfigError(
            f"{'.'.join([*parents, name])} in {where} is not valid",
            got="nothing" if first["type"] == "missing" else first.get("input"),
            allowed=first["msg"],
            fix="correct the value",
        ) from error
