"""What a method of `fastft train --method` is; one of them is a file of this folder, and a row of its table."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastft.config import RunConfig, readable
from fastft.data.arithmetic import Split
from fastft.data.trl_rows import RowFormat
from fastft.errors import ConfigError

Examples = Callable[[Split, int, int], list[dict[str, Any]]]
"""(split, count, seed) → the embedded rows of a method."""

SFT_ONLY = {"packing": True, "response_only": False}
"""Fields of a run that only `sft` has, each with the value that is refused elsewhere."""


class MethodSettings(BaseModel):
    """A method's own settings, by TRL's names; what is not set has TRL's default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class OfferedSettings(MethodSettings):
    """What every method of TRL has."""

    disable_dropout: bool | None = None
    """Also of the adapter's own dropout."""


class SampledSettings(OfferedSettings):
    """What the methods share that train on what the model itself says."""

    num_generations: int | None = Field(None, ge=2)
    """Completions a prompt; `batch_size` counts completions."""
    num_generations_eval: int | None = Field(None, ge=1)
    max_completion_length: int | None = Field(None, ge=1)
    """In tokens."""
    temperature: float | None = Field(None, gt=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    beta: float | None = Field(None, ge=0)
    """Weight of the KL term."""
    num_iterations: int | None = Field(None, ge=1)
    """Updates with the same completions."""
    epsilon: float | None = Field(None, gt=0)
    epsilon_high: float | None = Field(None, gt=0)
    reward_weights: list[float] | None = None
    """One for each `reward`; all 1 without."""
    mask_truncated_completions: bool | None = None
    shuffle_dataset: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method: its rows, its trainer, its settings and its measure."""

    name: str
    trainer: str
    """`module:class`, imported when it is needed; empty for fastft's own loop."""
    arguments: str
    """The class of the trainer's arguments, likewise."""
    rows: RowFormat | None
    """None for those of `fastft.data.formats`."""
    examples: Examples | None
    """What `data = "embedded"` is; None likewise."""
    settings: type[MethodSettings]
    measures: tuple[str, ...]
    """On held-out rows, by the names under which the trainer's `evaluate` logs them, without `eval_`; of all but `loss`
    more is better."""
    learning_rate: float
    """Where the run sets none."""
    sequences: int = 1
    """How many sequences a row is."""
    least_sequences: int = 1
    """In a micro-batch."""
    masks: tuple[str, ...] = ()
    """The attention masks of a batch, whose sum is how many tokens it has; empty where the trainer counts itself."""
    task: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM"
    """PEFT's: whether the model has its head, or one that scores a sequence."""
    takes_rewards: bool = False
    adapts: bool = True
    """Whether the trainer is given a model without adapter and adds it: TRL's take one that is there for trained, and
    copy it as the reference."""
    policy: str | None = None
    """Under which name the trainer's model has the adapted one; None where it is that."""
    example_settings: dict[str, Any] = field(default_factory=dict)
    """For the embedded rows, where the run sets none."""

    def configured(self, config: RunConfig) -> RunConfig:
        """`config` with this method's defaults where it sets nothing.

        Raises:
            ConfigError: it sets what this method does not have.
        """
        self._refuse(config)
        update: dict[str, Any] = {}
        if "learning_rate" not in config.model_fields_set:
            update["learning_rate"] = self.learning_rate
        if config.data == "embedded":
            update["settings"] = {**self.example_settings, **config.settings}
        found = config.model_copy(update=update)
        self.settings_of(found)
        return found

    def settings_of(self, config: RunConfig) -> dict[str, Any]:
        """What the run sets of this method's settings, by TRL's names.

        Raises:
            ConfigError: an unknown one, with the closest that is known, or a value that is not allowed.
        """
        try:
            return self.settings.model_validate(config.settings).model_dump(exclude_unset=True)
        except ValidationError as error:
            raise readable(error, self.settings.model_fields, section="settings") from error

    def _refuse(self, config: RunConfig) -> None:
        if config.settings and not self.settings.model_fields:
            raise ConfigError(
                f"method {self.name} has no settings of its own", got=", ".join(config.settings),
                fix="leave them out, or choose the --method that they are for",
            )  # fmt: skip
        if config.reward and not self.takes_rewards:
            raise ConfigError(
                f"method {self.name} takes no reward function", got=", ".join(config.reward),
                allowed="--reward with grpo, rloo or ppo", fix="leave it out, or choose one of these methods",
            )  # fmt: skip
        if self.takes_rewards and not config.reward and config.data != "embedded":
            raise ConfigError(
                f"method {self.name} needs a reward function", got="none",
                allowed="FILE.py:function, of the signature of TRL's GRPO", fix="give one with --reward",
            )  # fmt: skip
        for name, refused in SFT_ONLY.items() if self.rows is not None else ():
            if getattr(config, name) == refused:
                raise ConfigError(
                    f"{name} is for method sft", got=f"{name} = {str(refused).lower()} with method {self.name}",
                    fix="leave it out",
                )  # fmt: skip
