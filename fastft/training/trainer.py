"""The trainer behind `fastft train`: plan → model → data → `transformers.Trainer` → adapter.

The loop, checkpoints, resuming and schedules are transformers'; what is fastft's is what runs inside a step, and that
the plan is followed and named in everything that is written.  Methods other than `sft` have TRL's trainers
(`fastft.training.trl_loop`), which are transformers' too; all else is the same for them.
"""

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.config import RunConfig
from fastft.data.arithmetic import Split
from fastft.defaults import divisors
from fastft.errors import ConfigError, DataError, ModelError, OutputError
from fastft.files import new_folder
from fastft.hardware import Device, detect_device
from fastft.plan import Choices
from fastft.plan_store import PlanStore
from fastft.planning import Resolution, model_shape, resolve
from fastft.plans.run_file import record_in_saves, run_facts
from fastft.plans.verification import Verifications
from fastft.units import gib

if TYPE_CHECKING:
    from fastft.training.loop import Loop
    from fastft.training.methods.method import Method

log = logging.getLogger("fastft")

EMBEDDED_ROWS = 4096
"""Training rows drawn from the embedded task's generator."""
EVALUATED_ROWS = 128
"""Held-out rows, likewise."""


@dataclass(frozen=True)
class TrainResult:
    """What `train` did."""

    output: Path
    steps: int
    loss: float
    """Mean over the steps since the last log line."""
    tokens_per_second: float
    """Tokens without padding over the loop's wall-clock time, logging and saving included; 0 where a method's trainer
    does not count them."""
    seconds: float
    peak_bytes: int
    """Of memory, while training: the allocator's on a GPU, the resident set on a CPU."""
    allocator_retries: int
    """How often a GPU's allocator had to give cached blocks back to find memory; 0 on a CPU."""
    plan_id: str | None
    message: str
    """One line: what was followed and where the adapter is."""
    measure: dict[str, float] | None = None
    """The method's measures on the held-out rows, by their names; None where the run has no `eval_data`."""


def train(
    config: RunConfig, *, on_event: Callable[[str], None] | None = None, callbacks: Sequence[Any] = ()
) -> TrainResult:
    """Train an adapter as `config` says and save it to `config.output`, where stock PEFT can load it.

    Args:
        config: the run.
        on_event: gets one line about each thing worth knowing (the plan, the data, the ledger).
        callbacks: `transformers.TrainerCallback`s for the loop.

    Raises:
        FastftError: anything that makes the run impossible, found before training starts where that can be.
    """
    from fastft.training.methods import method_named

    tell = on_event or (lambda line: log.info("%s", line))
    device = detect_device(config.device)
    method = method_named(config.method)
    config = method.configured(config)
    resolution = _resolve_rows(config, method, device)
    tell(resolution.message)
    for warning in resolution.warnings:
        tell(f"warning: {warning}")
    output = _claim(config)
    try:
        return _train(config, method, resolution, device, output, tell, callbacks)
    except BaseException:
        if output.is_dir() and not any(output.iterdir()):
            output.rmdir()
        raise


def resolve_run(config: RunConfig, device: Device) -> Resolution:
    """The plan, or the default, of a run; a family that the engine does not know trains with backend peft.

    Raises:
        ModelError: such a family with another backend than peft.
    """
    try:
        return resolve(config, model_shape(config), device, PlanStore())
    except ModelError:
        if config.backend != "peft":
            raise
    from fastft.models.loading import resolve_model

    found = resolve_model(config.model, offline=config.offline, trust_remote_code=config.trust_remote_code)
    size = config.micro_batch or max(d for d in divisors(config.batch_size) if d <= 4)
    layers = getattr(found.config, "num_hidden_layers", 1)
    choices = Choices(
        backend="peft",
        micro_batch=size,
        accumulation=config.batch_size // size,
        placement=[config.placement or "light"] * layers,
    )
    return Resolution(plan=None, choices=choices, message=f"stock PEFT, {choices.summary()}")


def _resolve_rows(config: RunConfig, method: "Method", device: Device) -> Resolution:
    """The plan, or the default, of a run whose rows are `method.sequences` sequences each.

    What is planned is how sequences are computed, so a plan is for as many of them as a step has.

    Raises:
        FastftError: as `resolve_run`; a batch that cannot be cut into the micro-batches that the method needs.
    """
    per_row, least = method.sequences, method.least_sequences
    micro = None if config.micro_batch is None else config.micro_batch * per_row
    sequences = config.batch_size * per_row
    if sequences % least or (micro is not None and micro < least):
        raise ConfigError(
            f"method {method.name} compares the rows of a micro-batch, so it needs {least}",
            got=f"batch_size {config.batch_size}, micro_batch {config.micro_batch}",
            fix=f"choose a batch_size that {least} divides, and no smaller micro_batch",
        )  # fmt: skip
    asked = config.model_copy(update={"batch_size": sequences, "micro_batch": micro})
    found = resolve_run(asked, device)
    if found.choices.micro_batch % least:
        found = resolve_run(asked.model_copy(update={"micro_batch": least}), device)
    return found


def _claim(config: RunConfig) -> Path:
    output = Path(config.output)
    if not config.resume:
        return new_folder(output, what="output")
    if not any(output.glob("checkpoint-*")):
        raise OutputError(
            "there is nothing to resume from", got=str(output), allowed="a folder with checkpoint-* in it",
            fix="train once with --save-steps, or drop --resume",
        )  # fmt: skip
    return output


def _train(
    config: RunConfig,
    method: "Method",
    resolution: Resolution,
    device: Device,
    output: Path,
    tell: Callable[[str], None],
    callbacks: Sequence[Any],
) -> TrainResult:
    import torch

    from fastft.engine.patch import ledger_of
    from fastft.measure.memory import PeakMemory
    from fastft.training.trl_loop import trl_loop

    choices = resolution.choices
    # A plan promises the peak of SFT; what other methods need beside would unmake it for all runs.
    first_steps = _first_steps(resolution, device, tell) if method.rows is None else None
    callbacks = [*callbacks, *([first_steps] if first_steps else [])]
    if method.rows is None:
        loop = _sft_loop(config, choices, device, output, tell, callbacks)
    else:
        loop = trl_loop(method, config, choices, device, output, tell, callbacks)
    record_in_saves(loop.model, run_facts(config, resolution.plan, choices))
    tokens = loop.count()
    peak = PeakMemory(loop.device)
    peak.start()
    started = time.perf_counter()
    try:
        done = loop.trainer.train(resume_from_checkpoint=True if config.resume else None)
    except torch.OutOfMemoryError:
        if first_steps is not None:
            first_steps.out_of_memory()
        raise
    seconds = time.perf_counter() - started
    memory = peak.stop()
    save_adapter(loop.model, loop.tokenizer, output)
    ledger = ledger_of(loop.model)
    counts = ledger.counts() if ledger is not None else {"model: stock": 1}
    tell("ledger: " + "; ".join(f"{count}× {path}" for path, count in counts.items()))
    measure = None
    if loop.evaluates:
        found = loop.trainer.evaluate()
        measure = {name: float(found[f"eval_{name}"]) for name in method.measures}
    plan_id = resolution.plan.id if resolution.plan is not None else None
    rate = tokens() / seconds
    retries = memory.allocator_retries
    message = (
        f"adapter saved to {output}: {done.global_step} steps, loss {done.training_loss:.4f}, "
        + (f"{rate:,.0f} tokens/s, " if rate else "")
        + f"peak {gib(memory.peak_bytes)}"
        + (f", {retries} allocator retries" if retries else "")
        + ("; held out: " if measure else "")
        + ", ".join(f"{name} {value:.4f}" for name, value in (measure or {}).items())
    )
    return TrainResult(
        output, done.global_step, done.training_loss, rate, seconds, memory.peak_bytes, retries, plan_id, message,
        measure,
    )  # fmt: skip


def _first_steps(resolution: Resolution, device: Device, tell: Callable[[str], None]) -> Any:
    """The trainer's callback that verifies a shipped plan; None where nothing is to be verified, or cannot be."""
    from fastft.training import first_steps

    counters = first_steps.counters_for(device)
    if resolution.plan is None or resolution.verified_for is None or counters is None:
        return None
    return first_steps.FirstSteps(resolution.plan, resolution.verified_for, counters, Verifications(), tell)


def training_samples(
    config: RunConfig, tokenizer: Any, tell: Callable[[str], None], *, held_out: bool = False
) -> tuple[list[Any], Callable[..., Any]]:
    """The training samples (examples, or packs of them) and the function that makes a batch of some; those of
    `eval_data` if `held_out`.

    Raises:
        DataError: the data cannot be read or encoded.
    """
    from functools import partial

    from fastft.data.collation import collate, collate_packs
    from fastft.data.encoding import encode
    from fastft.data.packing import pack
    from fastft.data.sources import load_conversations

    data = config.eval_data if held_out and config.eval_data is not None else config.data
    split: Split = "test" if held_out and data == "embedded" else "train"  # a file is its own training split
    count = EVALUATED_ROWS if held_out else EMBEDDED_ROWS
    conversations = load_conversations(data, split=split, count=count, seed=config.seed)
    encoded = encode(
        conversations,
        tokenizer,
        max_tokens=config.sequence_tokens,
        response_only=config.response_only,
        chat_template=config.chat_template,
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise DataError("the tokenizer has neither a pad nor an eos token", got=config.model, fix="set one of them")
    tell(
        f"{'held out' if held_out else 'data'}: {len(encoded.examples)} samples, {encoded.tokens:,} tokens, "
        f"{encoded.labelled_tokens:,} labelled"
        + (f", {encoded.truncated} cut at {config.sequence_tokens} tokens" if encoded.truncated else "")
        + (f", {encoded.dropped} dropped" if encoded.dropped else "")
    )
    if not config.packing:
        return list(encoded.examples), partial(collate, pad_token_id=pad)
    packs = pack(encoded.examples, max_tokens=config.sequence_tokens, seed=config.seed)
    return list(packs), partial(collate_packs, pad_token_id=pad)


def _sft_loop(
    config: RunConfig,
    choices: Choices,
    device: Device,
    output: Path,
    tell: Callable[[str], None],
    callbacks: Sequence[Any],
) -> "Loop":
    """The loop of method sft."""
    import torch
    import transformers

    from fastft.engine.clipping import clip_gradients_
    from fastft.training.loop import Loop, TokenCounter, training_arguments
    from fastft.training.session import build_session
    from fastft.training.trl_loop import no_tokenizer

    session = build_session(config, choices)
    if session.tokenizer is None:
        raise no_tokenizer(config)
    samples, collate = training_samples(config, session.tokenizer, tell)
    held_out = None
    if config.eval_data is not None:
        held_out, _ = training_samples(config, session.tokenizer, tell, held_out=True)
    session.model.config.use_cache = False
    counter = TokenCounter(collate)

    class Trainer(transformers.Trainer):
        """Clips all gradients at once."""

        def _clip_grad_norm(self, model: Any) -> torch.Tensor:
            self.accelerator.unscale_gradients()
            return clip_gradients_(session.parameters, self.args.max_grad_norm or float("inf"))

        def _get_grad_norm(self, model: Any, grad_norm: torch.Tensor | None = None) -> torch.Tensor:
            return self._clip_grad_norm(model) if grad_norm is None else grad_norm

    arguments = transformers.TrainingArguments(
        **training_arguments(config, choices, device, session.dtype, output),
        per_device_eval_batch_size=choices.micro_batch,
        prediction_loss_only=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    trainer = Trainer(
        model=session.model,
        args=arguments,
        train_dataset=samples,
        eval_dataset=held_out,
        data_collator=lambda samples: session.told(counter(samples)),
        optimizers=(session.optimizer, None),
        callbacks=list(callbacks),
    )
    return Loop(trainer, session.model, session.tokenizer, session.device, counter, evaluates=held_out is not None)


def save_adapter(model: Any, tokenizer: Any, output: Path) -> None:
    """Save adapter, run file and tokenizer into `output`; `adapter_config.json` appears last, when all is there.

    Raises:
        OutputError: the disk is full or the folder cannot be written; what stood there still does.
    """
    temporary: Path | None = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=output))
        # A trainer may have added others, for a reference or a value.
        model.save_pretrained(temporary, selected_adapters=["default"])
        tokenizer.save_pretrained(temporary)
        files = sorted(temporary.iterdir(), key=lambda file: file.name == "adapter_config.json")
        for file in files:
            file.replace(output / file.name)
    except (OSError, RuntimeError) as error:
        # safetensors reports a full disk as a RuntimeError of its own.
        raise OutputError(
            f"cannot save the adapter to {output}", got=str(error).splitlines()[0][:200],
            fix="free some space and train again with --resume if there are checkpoints",
        ) from error  # fmt: skip
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
