"""Flags from `RunConfig`: one for each field, with its name, type and default.

A field that is added to `RunConfig` becomes a flag of `fastft train` by itself; what it means is said here.
"""

import functools
import inspect
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer

from fastft.config import LoraConfig, RunConfig
from fastft.errors import ConfigError

Verb = TypeVar("Verb", bound=Callable[..., None])

HELP: dict[str, str] = {
    # What is trained
    "method": "What is learned from the rows; docs/methods.md says which rows each takes.",
    "model": "A local folder, a hub name (owner/name), or tiny.",
    "data": "A JSONL or parquet file of instruction rows, chat messages or the method's rows, or embedded.",
    "eval_data": "Held-out rows, a file or embedded: the method's measure on them is told after training.",
    "reward": "A reward function for grpo, rloo and ppo; several are summed.",
    "settings": "A setting of the method in TRL's name, like beta=0.1; [settings] in the file.",
    "output": "The new folder that the adapter is saved to.",
    "chat_template": "A Jinja template, or its file, instead of the tokenizer's own.",
    "rank": "Rank of the adapter.",
    "alpha": "The adapter's output is scaled by alpha / rank.",
    "dropout": "Dropout on the adapter's input.",
    "targets": "The linear layers that get an adapter.",
    "rslora": "Scale by alpha / √rank.",
    # How it is trained: these change the result
    "sequence_tokens": "Longer samples are cut; packing fills rows up to it.",
    "batch_size": "Sequences per optimizer step, over all micro-batches.",
    "steps": "Optimizer steps; -1 follows --epochs.",
    "epochs": "Passes over the data.",
    "learning_rate": "Peak learning rate.",
    "warmup_steps": "Steps of linear warm-up.",
    "schedule": "What the learning rate does after the warm-up.",
    "weight_decay": "Decoupled weight decay of AdamW.",
    "max_gradient_norm": "Gradients are clipped to this norm; 0 does not clip.",
    "optimizer": "AdamW with 32-bit or 8-bit state; paged, where it may leave the GPU.",
    "packing": "Several samples in one row; none sees another.",
    "response_only": "Only the tokens of the answer are labels.",
    "quantization": "Of the frozen weights.",
    "dtype": "Of weights and activations; auto is bf16 on a GPU that has it, fp32 on a CPU.",
    "seed": "Of the adapter, the order of the samples and the embedded data.",
    # How it is computed: none of these changes the result
    "backend": "auto takes the plan's, else triton on a GPU and eager on a CPU; peft is stock.",
    "device": "auto takes the first GPU, else the CPU.",
    "plan": "auto takes the cached plan, none the default; else a plan file.",
    "micro_batch": "Sequences at a time, instead of the plan's.",
    "placement": "What every layer keeps for its backward, instead of the plan's.",
    "memory_cap": "The fastest way whose peak stays under it, like 7.8GiB.",
    "strict": "A module that cannot run fused is an error.",
    # Files and network
    "save_steps": "Save a checkpoint every so many steps; 0 saves at the end only.",
    "log_steps": "Log the loss every so many steps.",
    "resume": "Go on from the last checkpoint in the output folder.",
    "trust_remote_code": "Run code from the model's repository.",
    "offline": "Read local files only; --no-offline lets the hub client download.",
}
"""Field → what it means, in the order of the help."""

ALIASES = {"sequence_tokens": ("--seq-len",)}

REPEATED = {"reward": "FILE.py:function", "settings": "NAME=VALUE"}
"""Flags that may be given several times, and what each is given."""

KEY_FLAGS = (
    "sequence_tokens", "batch_size", "rank", "dropout", "targets", "optimizer", "packing", "quantization", "dtype",
    "device", "memory_cap", "trust_remote_code", "offline",
)  # fmt: skip
"""What a plan is for, and what is needed to find the model."""

JsonFlag = Annotated[bool, typer.Option("--json", help="Print data as JSON on stdout.")]
OutputFlag = Annotated[Path | None, typer.Option("--output", help="The new folder for what this writes.")]


def all_flags() -> tuple[str, ...]:
    """Every field of a run, the adapter's among them."""
    fields = {*RunConfig.model_fields, *LoraConfig.model_fields} - {"lora"}
    return (*(name for name in HELP if name in fields), *sorted(fields - HELP.keys()))


def run_flags(*names: str, defaults: bool = True) -> Callable[[Verb], Verb]:
    """Give a verb that takes `**run` the flags of these fields.  A flag that is not given is None.

    `defaults` says whether the help shows the defaults of `RunConfig`.
    """

    def decorate(verb: Verb) -> Verb:
        @functools.wraps(verb)
        def command(**given: Any) -> None:
            verb(**{name: _parsed(name, value) for name, value in given.items()})

        own = [p for p in inspect.signature(verb).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        added = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(name, defaults)
            )
            for name in names
        ]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + added
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command  # type: ignore[return-value]

    return decorate


def _parsed(name: str, value: Any) -> Any:
    if name == "targets" and value is not None:
        return tuple(word.strip() for word in value.split(",") if word.strip())
    if name in REPEATED:
        return (dict(map(_setting, value)) if name == "settings" else tuple(value)) if value else None
    return value


def _setting(text: str) -> tuple[str, Any]:
    """`NAME=VALUE`; the value as TOML has it, or as it stands."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError("a setting is not NAME=VALUE", got=text, fix="write it like --settings beta=0.1")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value


def _annotation(name: str, show_default: bool) -> Any:
    """The parameter that typer makes a flag of."""
    field = (LoraConfig if name in LoraConfig.model_fields else RunConfig).model_fields[name]
    kind = _without_none(field.annotation)
    flag = "--" + name.replace("_", "-")
    declarations = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag, *ALIASES.get(name, ())]
    metavar = None
    if name in REPEATED:
        metavar = REPEATED[name]
    elif get_origin(kind) is Literal:
        metavar = "|".join(get_args(kind))
    elif get_origin(kind) is tuple:
        metavar = "A,B,…"
    elif kind is not bool:
        metavar = f"<{kind.__name__}>"
    # `RunConfig` parses and judges all values: the file's and the flags' get the same errors.
    kind = bool if kind is bool else list[str] if name in REPEATED else str
    text = f"{HELP.get(name, '')}{_default(field.default) if show_default else ''}"
    return Annotated[kind | None, typer.Option(*declarations, help=text, metavar=metavar, show_default=False)]


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, UnionType):
        return next(part for part in get_args(annotation) if part is not NoneType)
    return annotation


def _default(value: Any) -> str:
    if value is None or value in ((), {}):
        return ""
    if isinstance(value, bool):
        return f" (default: {'on' if value else 'off'})"
    return f" (default: {', '.join(value) if isinstance(value, tuple) else value})"
