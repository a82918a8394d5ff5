"""RunConfig: what a run is, from a TOML file and flags.

Three layers, the later wins: the defaults below, the TOML file, the flags.  An unknown key is refused with
the closest known one.  The same object drives `tune`, `train`, `bench` and the tuner's probes, so a plan
that was tuned for a run is found by that run.
"""

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fastft.errors import ConfigError, unknown_choice
from fastft.plan import Policy

_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "": 1}


def parse_bytes(text: str | int | float) -> int:
    """`"7.8GiB"`, `"800 MB"` or a plain number of bytes, as bytes.

    Raises:
        ConfigError: no number, an unknown unit, or nothing above zero.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].lower() not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(
            "memory_cap is not a size",
            got=str(text),
            allowed="a number with B, KB, MB, GB, KiB, MiB or GiB",
            fix="write it like 7.8GiB",
        )
    return round(float(match[1]) * _UNITS[match[2].lower()])


class LoraConfig(BaseModel):
    """The adapter, in PEFT's terms."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(default=16, ge=1, le=1024)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    targets: tuple[str, ...] | None = None
    """Names of linear layers; None is every one of the decoder layers."""
    rslora: bool = False

    @field_validator("targets")
    @classmethod
    def _some_targets(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is None:
            return None
        if not value:
            raise ValueError("names no module: an adapter without targets trains nothing")
        return tuple(sorted(set(value), key=value.index))


class RunConfig(BaseModel):
    """Everything that defines a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # What is trained
    method: Literal["sft", "dpo", "orpo", "kto", "reward", "grpo", "rloo", "ppo"] = "sft"
    """What is learned from the rows: `fastft.training.methods.METHODS`."""
    model: str = "tiny"
    """A local folder, a hub name, or a shipped shape (random weights)."""
    data: str = "embedded"
    """A JSONL file of instruction rows or ChatML messages, or of the method's rows; or `embedded`."""
    eval_data: str | None = None
    """Held-out rows: a file, or `embedded`; the method's measure on them is taken after training."""
    reward: tuple[str, ...] = ()
    """Reward functions of grpo, rloo and ppo, each as `FILE.py:function`; their rewards are summed."""
    settings: dict[str, Any] = {}
    """The method's own, in TRL's names: `beta`, `num_generations`, …; the method's file says which there are."""
    chat_template: str | None = None
    """A Jinja chat template, or a file that holds one; None takes the tokenizer's own."""
    output: str = "fastft-run"
    """The new folder that the adapter is saved to."""
    lora: LoraConfig = LoraConfig()

    # How it is trained: these change the result
    sequence_tokens: int = Field(default=1024, ge=8)
    """Longer samples are cut (and counted); packing fills rows up to it."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences per optimizer step, over all micro-batches and processes."""
    steps: int = Field(default=-1, ge=-1)
    """Optimizer steps; -1 follows `epochs`."""
    epochs: float = Field(default=1.0, gt=0)
    learning_rate: float = Field(default=2e-4, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = Field(default=0.0, ge=0)
    max_gradient_norm: float = Field(default=0.0, ge=0)
    """0 does not clip."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    packing: bool = False
    response_only: bool = True
    """Only the tokens of the answer are labels."""
    quantization: Literal["none", "nf4", "fp4", "int8"] = "none"
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of the frozen weights and the activations; auto is bf16 on a GPU that has it, fp32 on a CPU."""
    seed: int = 3407

    # How it is computed: none of these changes the result
    backend: Literal["auto", "triton", "eager", "peft"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    plan: str = "auto"
    """`auto` takes the cached plan, `none` the default, anything else is a plan file."""
    micro_batch: int | None = Field(default=None, ge=1)
    placement: Policy | None = None
    memory_cap: str | None = None
    """The fastest plan whose peak stays under it, e.g. `7.8GiB`."""
    strict: bool = False
    """An unfused module is an error instead of a line in the ledger."""

    # What is written along the way
    save_steps: int = Field(default=0, ge=0)
    """0 saves at the end only."""
    log_steps: int = Field(default=10, ge=1)
    resume: bool = False
    trust_remote_code: bool = False
    offline: bool = True
    """Only local files are read; false lets the hub client download."""

    @field_validator("memory_cap")
    @classmethod
    def _cap_is_a_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value)
        return value

    @model_validator(mode="after")
    def _batch_divides(self) -> "RunConfig":
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise ConfigError(
                "micro_batch does not divide batch_size",
                got=f"batch_size {self.batch_size}, micro_batch {self.micro_batch}",
                fix="choose a divisor, so that every optimizer step sees the same global batch",
            )
        return self

    @property
    def memory_cap_bytes(self) -> int | None:
        """`memory_cap` in bytes."""
        return None if self.memory_cap is None else parse_bytes(self.memory_cap)

    @classmethod
    def load(cls, path: Path | None = None, **flags: Any) -> "RunConfig":
        """Defaults, then the TOML file at `path`, then `flags` (those that are None are not set).

        `flags` are flat: `rank=8` and `lora={"rank": 8}` are the same.

        Raises:
            ConfigError: the file is missing or malformed, a key is unknown, or a value is not allowed.
        """
        values: dict[str, Any] = _read_toml(path) if path is not None else {}
        lora = values.get("lora", {})
        if not isinstance(lora, dict):
            raise ConfigError("lora is not a table", got=lora, fix="write it as a [lora] section")
        lora = dict(lora)
        for name, value in flags.items():
            if value is None:
                continue
            if name in LoraConfig.model_fields:
                lora[name] = value
            elif name == "lora" and isinstance(value, dict):
                lora.update(value)
            elif name == "settings" and isinstance(value, dict) and isinstance(values.get(name, {}), dict):
                values[name] = {**values.get(name, {}), **value}
            else:
                values[name] = value
        if lora:
            values["lora"] = lora
        return cls.of(values)

    @classmethod
    def of(cls, values: dict[str, Any]) -> "RunConfig":
        """Validate a nested dictionary; pydantic's errors become one `ConfigError`."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise readable(error, RunConfig.model_fields) from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration {path}", got=error.strerror or str(error), fix="check the path"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML", got=str(error), fix="correct the line it names") from error


def readable(error: ValidationError, fields: Iterable[str], *, section: str | None = None) -> ConfigError:
    """pydantic's first error as one of ours; `fields` are the known keys of what was validated, which is the table
    `section` of a TOML file, or the whole."""
    first = error.errors()[0]
    *parents, name = [str(part) for part in first["loc"]] or ["configuration"]
    path = ".".join([*([section] if section else []), *parents, name])
    if first["type"] == "extra_forbidden":
        known = LoraConfig.model_fields if parents == ["lora"] else fields
        unknown = unknown_choice(f"key '{path}'", name, known)
        return ConfigError(unknown.what, got=unknown.got, allowed=unknown.allowed, fix=unknown.fix)
    allowed = first.get("ctx", {}).get("expected")
    return ConfigError(
        f"{path} is not valid",
        got=first.get("input"),
        allowed=allowed if allowed else first["msg"].removeprefix("Value error, "),
        fix="correct the value",
    )
