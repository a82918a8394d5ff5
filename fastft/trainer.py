"""TRL's `SFTTrainer` and transformers' `Trainer`, which also take the arguments that older tutorials print.

    from fastft import SFTTrainer, Trainer

They are today's trainers in all else.  What was renamed since is translated, and said once in a process:

    tokenizer                                       → processing_class
    dataset_text_field, packing, dataset_num_proc   → fields of SFTConfig
    max_seq_length                                  → SFTConfig.max_length
    TrainingArguments in SFTConfig's place          → SFTConfig with the same values
    rows as a list of dictionaries                  → datasets.Dataset
"""

import logging
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import transformers
import trl
from datasets import Dataset

from fastft.errors import ConfigError

log = logging.getLogger("fastft")

_RENAMED = {"max_seq_length": "max_length"}
_FIELDS = (
    "dataset_text_field", "max_seq_length", "max_length", "packing", "eval_packing", "dataset_num_proc",
    "dataset_kwargs", "neftune_noise_alpha", "model_init_kwargs", "completion_only_loss", "assistant_only_loss",
)  # fmt: skip
"""What `SFTTrainer` took itself, and `SFTConfig` takes today."""
_GONE = {
    "dataset_batch_size": "datasets are tokenized as a whole today",
    "num_of_sequences": "it estimated the length of a packed dataset, which is known today",
    "chars_per_token": "it estimated the length of a packed dataset, which is known today",
    "infinite": "set max_steps",
}
"""What had an effect once, and has none today."""
_said: set[str] = set()


class SFTTrainer(trl.SFTTrainer):
    """`trl.SFTTrainer`, which also takes the arguments of older releases and plain lists of rows."""

    def __init__(self, model: Any = None, args: Any = None, *more: Any, **given: Any) -> None:
        """As `trl.SFTTrainer`.

        Raises:
            ConfigError: an old and a new name for the same are given together, with two values.
        """
        _as_processing_class(given)
        args = _sft_config(args, {name: given.pop(name) for name in _FIELDS if name in given})
        for name in _GONE.keys() & given.keys():
            given.pop(name)
            _say(f"{name} has no effect: {_GONE[name]}")
        _as_datasets(given)
        super().__init__(model, args, *more, **given)


class Trainer(transformers.Trainer):
    """`transformers.Trainer`, which also takes `tokenizer`."""

    def __init__(self, model: Any = None, args: Any = None, *more: Any, **given: Any) -> None:
        """As `transformers.Trainer`, which takes a plain list of encoded rows as it is."""
        _as_processing_class(given)
        super().__init__(model, args, *more, **given)


def _as_processing_class(given: dict[str, Any]) -> None:
    if "tokenizer" not in given:
        return
    tokenizer = given.pop("tokenizer")
    other = given.get("processing_class")
    if other is not None and other is not tokenizer:
        raise ConfigError(
            "tokenizer and processing_class are the same argument", got="both", fix="pass processing_class"
        )
    given["processing_class"] = tokenizer
    _say("tokenizer is called processing_class today")


def _sft_config(args: Any, old: Mapping[str, Any]) -> Any:
    """`args` as an `SFTConfig`, with what the trainer itself was given by older names."""
    values = {_RENAMED.get(name, name): value for name, value in old.items() if value is not None}
    if isinstance(args, transformers.TrainingArguments) and not isinstance(args, trl.SFTConfig):
        known = {field.name for field in fields(trl.SFTConfig) if field.init}
        told = {field.name: getattr(args, field.name) for field in fields(args) if field.init and field.name in known}
        args = trl.SFTConfig(**told)
        _say("TrainingArguments are taken for an SFTConfig with the same values")
    if not values:
        return args
    if args is None:
        args = trl.SFTConfig(output_dir="trainer_output")
    defaults = {field.name: field.default for field in fields(args)}
    for name, value in values.items():
        set_there = getattr(args, name)
        if set_there not in (defaults.get(name), value):
            raise ConfigError(
                f"{name} is given twice", got=f"{value} beside {set_there} in the SFTConfig",
                fix="leave it in the SFTConfig",
            )  # fmt: skip
        setattr(args, name, value)
    told_names = ", ".join(name if name == _RENAMED.get(name, name) else f"{name} ({_RENAMED[name]})" for name in old)
    _say(f"{told_names}: fields of SFTConfig today")
    return args


def _as_datasets(given: dict[str, Any]) -> None:
    for name in ("train_dataset", "eval_dataset"):
        rows = given.get(name)
        if isinstance(rows, list):
            given[name] = Dataset.from_list(rows)


def _say(what: str) -> None:
    if what not in _said:
        _said.add(what)
        log.warning("%s", what)
