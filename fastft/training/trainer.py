"""The trainer behind `fastft train`: plan → model → data → `transformers.Trainer` → adapter.

The loop, checkpoints, resuming and schedules are transformers'; what is fastft's is what runs inside a step, and that
the plan is followed and named in everything that is written.
"""

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.config import RunConfig
from fastft.defaults import divisors
from fastft.errors import DataError, ModelError, OutputError
from fastft.files import new_folder
from fastft.hardware import Device, detect_device
from fastft.plan import Choices
from fastft.plan_store import PlanStore
from fastft.planning import Resolution, model_shape, resolve
from fastft.plans.run_file import record_in_saves, run_facts
from fastft.plans.verification import Verifications
from fastft.units import gib

log = logging.getLogger("fastft")

EMBEDDED_ROWS = 4096
"""Training rows drawn from the embedded task's generator."""


@dataclass(frozen=True)
class TrainResult:
    """What `train` did."""

    output: Path
    steps: int
    loss: float
    """Mean over the steps since the last log line."""
    tokens_per_second: float
    """Tokens without padding over the loop's wall-clock time, logging and saving included."""
    seconds: float
    peak_bytes: int
    """Of memory, while training: the allocator's on a GPU, the resident set on a CPU."""
    allocator_retries: int
    """How often a GPU's allocator had to give cached blocks back to find memory; 0 on a CPU."""
    plan_id: str | None
    message: str
    """One line: what was followed and where the adapter is."""


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
    tell = on_event or (lambda line: log.info("%s", line))
    device = detect_device(config.device)
    resolution = resolve_run(config, device)
    tell(resolution.message)
    for warning in resolution.warnings:
        tell(f"warning: {warning}")
    output = _claim(config)
    try:
        return _train(config, resolution, device, output, tell, callbacks)
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
    resolution: Resolution,
    device: Device,
    output: Path,
    tell: Callable[[str], None],
    callbacks: Sequence[Any],
) -> TrainResult:
    import torch

    from fastft.measure.memory import PeakMemory
    from fastft.training.session import build_session

    session = build_session(config, resolution.choices)
    if session.tokenizer is None:
        raise ModelError(
            "a shipped shape has random weights and no tokenizer, so it cannot be fine-tuned", got=config.model,
            fix="give a model folder or a hub name; shapes are for tune and bench",
        )  # fmt: skip
    samples, collate = training_samples(config, session.tokenizer, tell)
    session.model.config.use_cache = False
    record_in_saves(session.model, run_facts(config, resolution.plan, resolution.choices))
    counter = _TokenCounter(collate)
    first_steps = _first_steps(resolution, device, tell)
    trainer = _trainer(
        config, session, resolution.choices, device, output, samples, counter,
        [*callbacks, *([first_steps] if first_steps else [])],
    )  # fmt: skip
    peak = PeakMemory(session.device)
    peak.start()
    started = time.perf_counter()
    try:
        done = trainer.train(resume_from_checkpoint=True if config.resume else None)
    except torch.OutOfMemoryError:
        if first_steps is not None:
            first_steps.out_of_memory()
        raise
    seconds = time.perf_counter() - started
    memory = peak.stop()
    save_adapter(session.model, session.tokenizer, output)
    tell("ledger: " + "; ".join(f"{count}× {path}" for path, count in session.ledger().items()))
    plan_id = resolution.plan.id if resolution.plan is not None else None
    rate = counter.tokens / seconds
    retries = memory.allocator_retries
    message = (
        f"adapter saved to {output}: {done.global_step} steps, loss {done.training_loss:.4f}, {rate:,.0f} tokens/s, "
        f"peak {gib(memory.peak_bytes)}" + (f", {retries} allocator retries" if retries else "")
    )
    return TrainResult(
        output, done.global_step, done.training_loss, rate, seconds, memory.peak_bytes, retries, plan_id, message
    )


def _first_steps(resolution: Resolution, device: Device, tell: Callable[[str], None]) -> Any:
    """The trainer's callback that verifies a shipped plan; None where nothing is to be verified, or cannot be."""
    from fastft.training import first_steps

    counters = first_steps.counters_for(device)
    if resolution.plan is None or resolution.verified_for is None or counters is None:
        return None
    return first_steps.FirstSteps(resolution.plan, resolution.verified_for, counters, Verifications(), tell)


def training_samples(
    config: RunConfig, tokenizer: Any, tell: Callable[[str], None]
) -> tuple[list[Any], Callable[..., Any]]:
    """The training samples (examples, or packs of them) and the function that makes a batch of some.

    Raises:
        DataError: the data cannot be read or encoded.
    """
    from functools import partial

    from fastft.data.collation import collate, collate_packs
    from fastft.data.encoding import encode
    from fastft.data.packing import pack
    from fastft.data.sources import load_conversations

    conversations = load_conversations(config.data, split="train", count=EMBEDDED_ROWS, seed=config.seed)
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
        f"data: {len(encoded.examples)} samples, {encoded.tokens:,} tokens, {encoded.labelled_tokens:,} labelled"
        + (f", {encoded.truncated} cut at {config.sequence_tokens} tokens" if encoded.truncated else "")
        + (f", {encoded.dropped} dropped" if encoded.dropped else "")
    )
    if not config.packing:
        return list(encoded.examples), partial(collate, pad_token_id=pad)
    packs = pack(encoded.examples, max_tokens=config.sequence_tokens, seed=config.seed)
    return list(packs), partial(collate_packs, pad_token_id=pad)


class _TokenCounter:
    """A collator that counts the real tokens of each batch, and knows how many batches were trained.

    The loader makes batches ahead of the loop, some that it never comes to.
    """

    def __init__(self, collate: Callable[..., dict[str, Any]]) -> None:
        self._collate = collate
        self._tokens: list[int] = []
        self.trained = 0

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        batch = self._collate(samples)
        mask = batch.get("attention_mask")
        self._tokens.append(int(mask.sum()) if mask is not None else batch["input_ids"].numel())
        return batch

    @property
    def tokens(self) -> int:
        """Of the batches that were trained."""
        return sum(self._tokens[: self.trained])


def _trainer(
    config: RunConfig,
    session: Any,
    choices: Choices,
    device: Device,
    output: Path,
    samples: list[Any],
    counter: _TokenCounter,
    callbacks: list[Any],
) -> Any:
    import sys

    import torch
    import transformers

    from fastft.engine.clipping import clip_gradients_

    class Count(transformers.TrainerCallback):
        def on_substep_end(self, *_: Any, **__: Any) -> None:
            counter.trained += 1

        on_step_end = on_substep_end  # a step's last micro-batch

    class Loop(transformers.Trainer):
        """Clips all gradients at once."""

        def _clip_grad_norm(self, model: Any) -> torch.Tensor:
            self.accelerator.unscale_gradients()
            return clip_gradients_(session.parameters, self.args.max_grad_norm or float("inf"))

        def _get_grad_norm(self, model: Any, grad_norm: torch.Tensor | None = None) -> torch.Tensor:
            return self._clip_grad_norm(model) if grad_norm is None else grad_norm

    arguments = transformers.TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=choices.micro_batch,
        gradient_accumulation_steps=choices.accumulation,
        max_steps=config.steps,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        # transformers' `constant` has no warm-up.
        lr_scheduler_type="constant_with_warmup" if config.schedule == "constant" else config.schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_gradient_norm,
        bf16=session.dtype == torch.bfloat16,
        fp16=session.dtype == torch.float16,
        use_cpu=device.kind == "cpu",
        seed=config.seed,
        logging_steps=config.log_steps,
        # A loss that is no number is to be seen, and to look for one the host would wait for the device at every step.
        logging_nan_inf_filter=False,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=device.kind == "cuda",
        # From pinned memory; the host then does not wait for the step before to copy a batch.
        accelerator_config={"non_blocking": device.kind == "cuda"},
        disable_tqdm=not sys.stderr.isatty(),
        label_names=["labels"],
    )
    return Loop(
        model=session.model,
        args=arguments,
        train_dataset=samples,
        data_collator=lambda samples: session.told(counter(samples)),
        optimizers=(session.optimizer, None),
        callbacks=[Count(), *callbacks],
    )


def save_adapter(model: Any, tokenizer: Any, output: Path) -> None:
    """Save adapter, run file and tokenizer into `output`; `adapter_config.json` appears last, when all is there.

    Raises:
        OutputError: the disk is full or the folder cannot be written; what stood there still does.
    """
    temporary: Path | None = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=output))
        model.save_pretrained(temporary)
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
