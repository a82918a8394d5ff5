"""A trainer of TRL's for a run of `fastft train`: the method's, unchanged, on the run's model, rows and choices.

TRL makes the adapter and the reference; the engine is put in afterwards, and the optimizer is the run's.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastft.config import RunConfig
from fastft.data.encoding import template_text
from fastft.data.trl_rows import TrlRows, check_rows, load_trl_rows
from fastft.errors import ConfigError, DataError, FastftError, ModelError
from fastft.hardware import Device
from fastft.plan import Choices, keeps_input_only
from fastft.training.loop import Loop, TokenCounter, training_arguments
from fastft.training.methods.method import Method

EMBEDDED_ROWS, EMBEDDED_PROMPTS = 4096, 512
"""Training rows of the embedded task; of prompts fewer, as each is answered several times."""
EVALUATED_ROWS = 128
"""Held-out rows of the embedded task."""

_EMBEDDED_REWARD = "fastft.data.calculations:right_answer"


def trl_loop(
    method: Method,
    config: RunConfig,
    choices: Choices,
    device: Device,
    output: Path,
    tell: Callable[[str], None],
    callbacks: Sequence[Any],
) -> Loop:
    """Load the model, check the rows and make the trainer.

    Args:
        method: what is trained.
        config: the run, as `method.configured` gives it.
        choices: of the plan or the default, in sequences; a row is `method.sequences` of them.
        device: where it trains.
        output: the folder of checkpoints.
        tell: gets one line about each thing worth knowing.
        callbacks: for the trainer.

    Raises:
        FastftError: whatever makes the run impossible.
    """
    import torch

    from fastft.models.loading import load_model, load_tokenizer, resolve_model, torch_dtype
    from fastft.training.optimizers import make_optimizer
    from fastft.training.session import adapter_config, add_adapters, put_in

    rows = _rows(method, config, config.data, "train")
    held_out = None if config.eval_data is None else _rows(method, config, config.eval_data, "test")
    resolved = resolve_model(config.model, offline=config.offline, trust_remote_code=config.trust_remote_code)
    tokenizer = load_tokenizer(resolved, offline=config.offline, trust_remote_code=config.trust_remote_code)
    if tokenizer is None:
        raise no_tokenizer(config)
    if config.chat_template is not None:
        tokenizer.chat_template = template_text(tokenizer, config.chat_template)
    dtype = torch_dtype(config.dtype, device)
    arguments = _arguments(method, config, choices, device, dtype, output)
    for each in (rows, held_out):
        if each is not None:
            _check_template(each, tokenizer)
            _check_prompts(method, config, arguments, each, tokenizer)
    given: dict[str, Any] = {}
    if method.takes_rewards:
        given["reward_funcs"] = _rewards(config, rows)
    torch.manual_seed(config.seed)  # of a head that is new
    model = load_model(
        resolved, dtype=dtype, device=device.kind, quantization=config.quantization, offline=config.offline,
        trust_remote_code=config.trust_remote_code, task=method.task,
    )  # fmt: skip
    stock = choices.backend == "peft"
    if not method.adapts:
        model = add_adapters(model, config, seed=config.seed)
        put_in(model, choices, strict=config.strict)
    elif stock and all(map(keeps_input_only, choices.placement)):
        arguments.gradient_checkpointing = True
        arguments.gradient_checkpointing_kwargs = {"use_reentrant": False}
    try:
        trainer = _load(method.trainer)(
            model=model,
            args=arguments,
            train_dataset=_dataset(rows),
            eval_dataset=None if held_out is None else _dataset(held_out),
            processing_class=tokenizer,
            peft_config=adapter_config(model, config, task=method.task) if method.adapts else None,
            callbacks=list(callbacks),
            **given,
        )
    except (ValueError, NotImplementedError) as error:
        raise _refused(method, error) from error
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            # TRL rounds what is trained on a quantized model to bf16, where small updates are lost; SFT's is in fp32.
            parameter.data = parameter.data.float()
    adapted = trainer.model if method.policy is None else getattr(trainer.model, method.policy)
    if method.adapts and not stock:
        put_in(adapted, choices, strict=config.strict)
        # Imported here: the step of a method is in the method's file, which is imported for its row too.
        from fastft.training import methods

        methods.put_in(trainer)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.optimizer = make_optimizer(
        config.optimizer, parameters, learning_rate=config.learning_rate, weight_decay=config.weight_decay
    )
    counter = None
    if method.masks:
        counter = trainer.data_collator = TokenCounter(trainer.data_collator, method.masks)
    tell(_told(rows, held_out))
    return Loop(
        trainer, adapted, tokenizer, torch.device(device.kind), counter, evaluates=held_out is not None
    )  # fmt: skip


def no_tokenizer(config: RunConfig) -> ModelError:
    """The error for a model that has none."""
    return ModelError(
        "a shipped shape has random weights and no tokenizer, so it cannot be fine-tuned", got=config.model,
        fix="give a model folder or a hub name; shapes are for tune and bench",
    )  # fmt: skip


def _load(place: str) -> Any:
    """`module:name`."""
    module, _, name = place.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"this method's trainer is not installed: {place}", got=str(error), fix="choose another --method"
        ) from error


def _rows(method: Method, config: RunConfig, data: str, split: Any) -> TrlRows:
    assert method.rows is not None
    assert method.examples is not None
    if data != "embedded":
        return load_trl_rows(Path(data), method.rows)
    count = EVALUATED_ROWS if split == "test" else EMBEDDED_PROMPTS if method.takes_rewards else EMBEDDED_ROWS
    made = method.examples(split, count, config.seed)
    return check_rows(((f"embedded {split}:{number}", row) for number, row in enumerate(made, 1)), method.rows)


def _dataset(rows: TrlRows) -> Any:
    import pyarrow
    from datasets import Dataset

    try:
        return Dataset.from_list(rows.rows)
    except (pyarrow.ArrowException, TypeError, ValueError) as error:
        raise DataError(
            "a column holds values of several kinds", got=str(error).splitlines()[0],
            fix="give each column one kind of value",
        ) from error  # fmt: skip


def _check_template(rows: TrlRows, tokenizer: Any) -> None:
    if rows.conversational and not tokenizer.chat_template:
        raise DataError(
            "the rows are messages and the tokenizer has no chat template", got=rows.places[0],
            fix="give one with --chat-template, or write the rows as texts",
        )  # fmt: skip


def _check_prompts(method: Method, config: RunConfig, arguments: Any, rows: TrlRows, tokenizer: Any) -> None:
    """Where the model itself answers, TRL cuts no prompt: one that leaves no room would need more than was planned."""
    if not method.takes_rewards:
        return
    # PPO's arguments have another name for it.
    answer: int = getattr(arguments, "max_completion_length", None) or arguments.response_length
    room = config.sequence_tokens - answer
    for row, where in zip(rows.rows, rows.places, strict=True):
        prompt = row["prompt"]
        if rows.conversational:
            encoded = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
        else:
            encoded = tokenizer(prompt)
        tokens = len(encoded["input_ids"])
        if tokens > room:
            raise DataError(
                f"{where}: prompt and completion have no room in sequence_tokens",
                got=f"a prompt of {tokens} tokens and a completion of up to {answer}", allowed=config.sequence_tokens,
                fix="raise sequence_tokens, or shorten the completion in the method's settings",
            )  # fmt: skip


def _arguments(method: Method, config: RunConfig, choices: Choices, device: Device, dtype: Any, output: Path) -> Any:
    settings = method.settings_of(config)
    given = training_arguments(config, choices, device, dtype, output)
    size = choices.micro_batch // method.sequences
    given |= {"per_device_train_batch_size": size, "per_device_eval_batch_size": size, "gradient_checkpointing": False}
    kind = _load(method.arguments)
    known = getattr(kind, "__dataclass_fields__", {})
    if "max_length" in known:
        given["max_length"] = config.sequence_tokens
    if "num_generations" in known:
        group = settings.get("num_generations") or known["num_generations"].default
        if config.batch_size % group:
            raise ConfigError(
                "num_generations does not divide batch_size, which counts completions",
                got=f"batch_size {config.batch_size}, num_generations {group}",
                fix="choose a divisor, so that a step has all completions of its prompts",
            )  # fmt: skip
        evaluated = settings.get("num_generations_eval") or group
        given["per_device_eval_batch_size"] = math.ceil(size / evaluated) * evaluated
    weights = settings.get("reward_weights")
    if weights is not None and len(weights) != max(1, len(config.reward)):
        raise ConfigError(
            "reward_weights are not one for each reward", got=len(weights), allowed=max(1, len(config.reward)),
            fix="give as many as there are --reward",
        )  # fmt: skip
    try:
        return kind(**{**given, **settings})
    except (ValueError, TypeError) as error:
        raise _refused(method, error) from error


def _refused(method: Method, error: Exception) -> FastftError:
    return ConfigError(
        f"{method.trainer.partition(':')[2]} refuses this run", got=(str(error).strip().splitlines() or ["?"])[0],
        fix="change the setting that it names",
    )  # fmt: skip


def _rewards(config: RunConfig, rows: TrlRows) -> list[Any]:
    from fastft.data.calculations import right_answer
    from fastft.training.rewards import checked, load_reward

    if not config.reward:
        return [checked(right_answer, _EMBEDDED_REWARD)]
    columns = [name for name in rows.rows[0] if name != "prompt"]
    return [load_reward(place, columns) for place in config.reward]


def _told(rows: TrlRows, held_out: TrlRows | None) -> str:
    """One line about the data."""
    return (
        f"data: {len(rows.rows)} rows with {', '.join(rows.rows[0])}"
        + (f"; not read: {', '.join(rows.dropped)}" if rows.dropped else "")
        + (f"; {len(held_out.rows)} held out" if held_out is not None else "")
    )
