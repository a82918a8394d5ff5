"""One gate, one repetition or one series of trials in a process of its own: `python -P -m bench.worker < request.json`.

A request is one JSON object on stdin; the answer is one line on stdout that begins with `MARKER` (libraries print
there too).  A repetition always answers with a `Record`: whatever goes wrong is its status and error.  What
cannot be answered from within, a crash, a kill or a timeout, becomes a record in `bench.runner`.
"""

import gc
import math
import random
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.arms import choices_for
from bench.messages import (
    MARKER,
    Answer,
    GateReply,
    GateRequest,
    RepetitionRequest,
    Request,
    TrialsRequest,
    identify,
)
from bench.provenance import utc_now
from bench.scenarios import Scenario
from bench.trial_file import TrialFile
from bench.weights import adapter_tensors, base_checksum, load_adapter
from fastft.errors import FastftError, MeasureError, ModelError
from fastft.files import canonical_json, write_atomically
from fastft.processes import die_with_parent, end_at_once, preload
from fastft.record import Accuracy, Record

if TYPE_CHECKING:
    from torch import Tensor

_TEST_SEED = 0
"""The held-out rows are the same for every seed: accuracies of different repetitions can then be averaged."""


def run_gate(request: GateRequest) -> GateReply:
    """The parity gate of one arm, on the scenario's first seed.

    Raises:
        FastftError: the arm cannot run here, or nothing could be compared.
    """
    from bench.parity import check_parity
    from fastft.hardware import detect_device, software_versions

    scenario = request.scenario
    config = scenario.run_config(scenario.seed(0))
    choices, plan_id = choices_for(request.arm, config, stock_micro_batch=scenario.stock_micro_batch)
    result = check_parity(config, choices, seed=config.seed, size=scenario.gate)
    return GateReply(
        parity=result.parity,
        reason=result.reason,
        setup=result.setup,
        choices=choices,
        plan_id=plan_id,
        device=asdict(detect_device(config.device)),
        versions=software_versions(),
    )


def run_trials(request: TrialsRequest) -> int:
    """Measure until all is done or the time is up; how many trials were appended to the file.

    Raises:
        FastftError: the model cannot be loaded, or the device does not answer any more.
    """
    started = time.monotonic()
    from bench.rig import Rig

    file, longest = TrialFile(request.file), 0.0
    rig = Rig(request.config)
    # What stands now stays; without it each of the many collections to come takes milliseconds instead of a second.
    gc.collect()
    gc.freeze()
    for count, choices in enumerate(request.choices):
        begun = time.monotonic()
        if request.seconds is not None and begun + longest > started + request.seconds:
            return count
        file.append(rig.measure(choices, warmup_steps=request.warmup_steps, timed_steps=request.timed_steps))
        rig.require_device()
        longest = max(longest, time.monotonic() - begun)
    return len(request.choices)


def run_repetition(request: RepetitionRequest) -> Record:
    """Train for the scenario's steps and measure; never raises, an error is the record's status."""
    identity = identify(request, started_at=utc_now())
    try:
        return Record(**identity, status="ok", **_measure(request))
    except Exception as error:
        traceback.print_exc()
        return Record(**identity, status="failed", error=one_line(error))


def one_line(error: BaseException) -> str:
    """An exception as one line of at most 500 characters; fastft's own errors need no class name."""
    text = str(error) if isinstance(error, FastftError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:500]


def _measure(request: RepetitionRequest) -> dict[str, Any]:
    """The measured fields of the record."""
    from fastft.measure.clocks import read_clocks
    from fastft.measure.steps import measure_steps
    from fastft.training.session import build_session

    scenario, choices = request.scenario, request.gate.choices
    seed = scenario.seed(request.repetition)
    config = scenario.run_config(seed).model_copy(update={"backend": choices.backend})
    _seed_everything(seed)
    session = build_session(config, choices, seed=seed)
    initial = _share_initial_adapter(session.model, request.initial_adapter)
    batches = list(make_batches(scenario, session.tokenizer, session.model.config.vocab_size, seed))

    clocks = {"before": read_clocks()}
    samples = measure_steps(session, batches)
    clocks["after"] = read_clocks()

    require_training(samples.loss, samples.gradient_norm, initial, adapter_tensors(session.model))
    return {
        "step_time_ms": list(samples.step_time_ms),
        "step_tokens": list(samples.step_tokens),
        "loss": list(samples.loss),
        "gradient_norm": list(samples.gradient_norm),
        "batch_sha256": list(samples.batch_sha256),
        "memory": samples.memory,
        "ledger": session.ledger(),
        "clocks": clocks,
        "model": _model_facts(session.model, scenario.config.model),
        # After the peak was read: generation needs memory too.
        "accuracy": _accuracy(scenario, session, initial, request.accuracy_before),
    }


def make_batches(scenario: Scenario, tokenizer: Any, vocabulary_size: int, seed: int) -> "Iterator[dict[str, Tensor]]":
    """The global batches of one repetition, one a step: a function of scenario and seed, not of the arm."""
    from fastft.data.collation import collate, collate_packs
    from fastft.data.encoding import encode
    from fastft.data.packing import pack
    from fastft.data.sources import global_batches, load_conversations, random_batch

    config, steps = scenario.config, scenario.total_steps
    if scenario.data == "random":
        for step in range(steps):
            # A stride above any number of steps: two seeds share no batch.
            yield random_batch(vocabulary_size, config.batch_size, config.sequence_tokens, seed=seed * 1_000_003 + step)
        return
    conversations = load_conversations(config.data, split="train", count=steps * config.batch_size, seed=seed)
    encoded = encode(conversations, tokenizer, max_tokens=config.sequence_tokens, response_only=config.response_only)
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if config.packing:
        packs = pack(encoded.examples, max_tokens=config.sequence_tokens, seed=seed)
        for rows in global_batches(packs, batch_size=config.batch_size, steps=steps, seed=seed):
            yield collate_packs(rows, pad_token_id=pad_token_id)
        return
    for examples in global_batches(encoded.examples, batch_size=config.batch_size, steps=steps, seed=seed):
        yield collate(examples, pad_token_id=pad_token_id)


def require_training(
    loss: list[float], gradient_norm: list[float], before: "dict[str, Tensor]", after: "dict[str, Tensor]"
) -> None:
    """Refuse a repetition that did not train.

    Raises:
        MeasureError: a loss or gradient norm that is not finite, a gradient norm of zero, or an adapter tensor
            that is the same after all steps.
    """
    import torch

    for name, values in (("loss", loss), ("gradient norm", gradient_norm)):
        wrong = next((step for step, value in enumerate(values, 1) if not math.isfinite(value)), None)
        if wrong is not None:
            raise MeasureError(
                f"the {name} of step {wrong} is not finite", got=values[wrong - 1], fix="lower the learning rate"
            )
    still = next((step for step, value in enumerate(gradient_norm, 1) if value <= 0), None)
    if still is not None or not gradient_norm:
        raise MeasureError("the run does not train", got=f"gradient norm 0 in step {still}", allowed="above 0")
    unchanged = [name for name in before if torch.equal(before[name], after[name])]
    if unchanged:
        raise MeasureError(
            "the run does not train all of the adapter",
            got=f"{len(unchanged)} of {len(before)} tensors unchanged, among them {unchanged[0]}",
            allowed="every tensor changes",
        )


def _seed_everything(seed: int) -> None:
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _share_initial_adapter(model: Any, file: Path) -> "dict[str, Tensor]":
    """Start from the adapter in `file`; the first process of a seed writes its own there, as PEFT initialised it."""
    from safetensors.torch import load, save

    if file.exists():
        load_adapter(model, load(file.read_bytes()))
    else:
        write_atomically(file, save(adapter_tensors(model)))
    return adapter_tensors(model)


def _model_facts(model: Any, name: str) -> dict[str, Any]:
    from fastft.models.shapes import shape_of

    try:
        shape = shape_of(model.config).as_dict()
    except ModelError:  # stock PEFT trains families that the engine does not know
        shape = {"family": getattr(model.config, "model_type", "unknown")}
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"name": name, **shape, "trainable_parameters": trainable, "frozen_checksum": base_checksum(model)}


def _accuracy(scenario: Scenario, session: Any, initial: "dict[str, Tensor]", before: float | None) -> Accuracy | None:
    """Exact match after training and, if not known yet, before: with the initial adapter put back, which adds zero."""
    check = scenario.accuracy
    if check is None:
        return None
    from fastft.data.arithmetic import generate
    from fastft.training.accuracy import evaluate_exact_match

    rows = generate("test", check.rows, seed=_TEST_SEED)

    def evaluate() -> float:
        return evaluate_exact_match(
            session.model, session.tokenizer, rows, max_new_tokens=check.max_new_tokens, batch_size=check.batch_size
        )

    after = evaluate()
    if before is None:
        load_adapter(session.model, initial)
        before = evaluate()
    return Accuracy(before=before, after=after, samples=len(rows))


def main() -> int:
    """Answer the request on stdin; the exit code is 0 whenever there is an answer."""
    die_with_parent()
    preload()
    try:
        request = Request.validate_json(sys.stdin.buffer.read())
        if isinstance(request, GateRequest):
            answer = Answer(gate=run_gate(request))
        elif isinstance(request, TrialsRequest):
            answer = Answer(trials=run_trials(request))
        else:
            answer = Answer(record=run_repetition(request))
    except Exception as error:
        traceback.print_exc()
        answer = Answer(error=one_line(error))
    # The line break ends whatever a library left unfinished on stdout.
    print(f"\n{MARKER}{canonical_json(answer.model_dump(mode='json'))}", flush=True)
    return 0


if __name__ == "__main__":
    end_at_once(main())
