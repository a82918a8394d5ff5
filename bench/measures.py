"""Measures: what each way to need less memory saves and what it costs, alone and all together.

    python -m bench measures llama-3-8b --quantization nf4 --seq-len 2048 --batch-size 4 --output runs/measures

All run on one loaded model, in turns.  The baseline is what a run does without plan and cap: `light` in every layer.
A measure that the run has no use for is left out: it would do what another one does, or nothing can do it here.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from bench.grid import describe, free, make_header
from bench.results import Result, facts
from bench.trial_file import TrialFile
from bench.trials import Deadline, Steps, measure_trials, numbered
from bench.turns import speed_over_turns, still_to_measure
from fastft.config import RunConfig
from fastft.defaults import default_choices, resolve_backend
from fastft.hardware import Device, detect_device
from fastft.memory.fitting import MLP_CHUNKS, SMALL_LOSS_CHUNK, host_limit, smallest
from fastft.memory.model import estimate_peak_bytes, memory_terms, records
from fastft.models.shapes import ModelShape
from fastft.plan import LOSS_CHUNK_TOKENS, Choices, Policy, Trial
from fastft.planning import model_shape

TRIALS, MEASURES_FILE = "measures.jsonl", "measures.json"
"""What an output folder holds: the trials, and the result."""
MEASURES_SCHEMA = 1
SMALL_MLP_CHUNK = min(MLP_CHUNKS)


@dataclass(frozen=True)
class Run:
    """What a measure is taken in."""

    config: RunConfig
    shape: ModelShape
    device: Device
    default: Choices
    """What it does without any measure."""

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.default.micro_batch * self.config.sequence_tokens

    @property
    def on_gpu(self) -> bool:
        """Whether there is a host beside the device."""
        return self.device.kind == "cuda"

    def changed(self, **values: Any) -> Choices:
        """The default with other values."""
        return self.default.model_copy(update=values)

    def everywhere(self, policy: Policy, **values: Any) -> Choices:
        """The default with one policy for all layers, and other values."""
        return self.changed(placement=[policy] * self.shape.layers, **values)


@dataclass(frozen=True)
class Measure:
    """One measure, or all."""

    description: str
    """What it does, in words."""
    apply: Callable[[Run], Choices]
    possible: Callable[[Run], bool] = lambda run: True
    """Whether it can be taken in a run, and changes something there."""


def _keeps_more(run: Run) -> bool:
    saved = memory_terms(run.shape, run.default, run.config, run.device).saved
    return saved["keep"] != saved["light"]


def _host_holds(policy: Policy) -> Callable[[Run], bool]:
    def holds(run: Run) -> bool:
        terms = memory_terms(run.shape, run.default, run.config, run.device)
        return run.on_gpu and terms.host([(policy, run.shape.layers)]) <= host_limit(run.device)

    return holds


MEASURES: dict[str, Measure] = {
    "light": Measure(
        "the default: the backward computes activations and some norms again", lambda run: run.default
    ),
    "keep": Measure(
        "every layer saves all that its backward reads", lambda run: run.everywhere("keep"), _keeps_more
    ),
    "mlp": Measure("the backward computes gate and up again too", lambda run: run.everywhere("mlp")),
    "full": Measure("every layer saves its input only", lambda run: run.everywhere("full")),
    "offload_mlp": Measure(
        "what mlp saves, in host memory", lambda run: run.everywhere("offload_mlp"), _host_holds("offload_mlp")
    ),
    "offload": Measure(
        "what full saves, in host memory", lambda run: run.everywhere("offload"), _host_holds("offload")
    ),
    "mlp_tiles": Measure(
        # Where gate and up are saved there is nothing to tile.
        f"as mlp, and the MLP takes {SMALL_MLP_CHUNK:,} tokens at a time",
        lambda run: run.everywhere("mlp", mlp_chunk_tokens=SMALL_MLP_CHUNK),
        # With dropout in its adapters an MLP runs whole.
        lambda run: run.tokens > SMALL_MLP_CHUNK and not run.config.lora.dropout,
    ),
    "small_loss": Measure(
        f"{SMALL_LOSS_CHUNK} rows of logits at a time",
        lambda run: run.changed(loss_chunk_tokens=SMALL_LOSS_CHUNK),
        lambda run: run.tokens > SMALL_LOSS_CHUNK,
    ),
    "host_embedding": Measure(
        "the input embedding in host memory",
        lambda run: run.changed(host_embedding=True),
        lambda run: run.on_gpu and not run.shape.tied_embeddings,
    ),
    "no_graphs": Measure(
        "no CUDA graphs",
        lambda run: run.changed(graphs="off"),
        lambda run: records(run.shape, run.default, run.config, run.device),
    ),
    "dense": Measure(
        "spends memory: quantized weights dense as well",
        lambda run: run.changed(resident_layers=run.shape.layers),
        lambda run: run.config.quantization != "none",
    ),
    "smallest": Measure(
        "everything that is predicted to save memory",
        lambda run: smallest(run.shape, run.default, run.config, device=run.device),
    ),
}  # fmt: skip
"""By name; the first is the baseline."""


def measures_of(config: RunConfig, shape: ModelShape, device: Device) -> dict[str, Choices]:
    """The choices of each measure that the run has a use for, by name; the baseline first.

    `config` gives no backend, micro-batch, placement or cap: those are the default's.
    """
    config = free(config)
    run = Run(config, shape, device, default_choices(config, shape, resolve_backend(config, device), device))
    found: dict[str, Choices] = {}
    for name, measure in MEASURES.items():
        if measure.possible(run):
            choices = _without_idle_chunks(measure.apply(run), run)
            if choices not in found.values():
                found[name] = choices
    return found


def _without_idle_chunks(choices: Choices, run: Run) -> Choices:
    """The same choices by the names of the default, where a chunk is all there is: else two would differ by name."""
    idle: dict[str, Any] = {}
    if choices.loss_chunk_tokens >= run.tokens:
        idle["loss_chunk_tokens"] = LOSS_CHUNK_TOKENS
    if (choices.mlp_chunk_tokens or 0) >= run.tokens or run.config.lora.dropout:
        idle["mlp_chunk_tokens"] = None
    return choices.model_copy(update=idle)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MeasureResult(_Frozen):
    """One measure over all turns."""

    name: str
    description: str
    choices: Choices
    summary: str
    verdict: str
    """`ok`, or what else became of the first trial that was not (`fastft.plan.Trial`)."""
    detail: str
    tokens_per_second: float | None
    """By the median step of all turns; None where one of them was not ok."""
    turn_tokens_per_second: list[float]
    """Of each turn that came to its end: they show how far these agree."""
    step_time_ms: list[float]
    peak_bytes: int | None
    """The highest of all turns; where it ran out of memory, how far it came."""
    predicted_peak_bytes: int
    """What the memory model says, which knows nothing of the measurement."""


class Measures(Result):
    """`measures.json`."""

    measures: int = MEASURES_SCHEMA
    turns: int
    """How often each was to be measured; where the time was up before, some were measured less often."""
    results: list[MeasureResult] = Field(min_length=1)
    """The first is the baseline."""

    @property
    def complete(self) -> bool:
        """Whether every measure had all its turns."""
        return all(one.verdict != "ok" or len(one.turn_tokens_per_second) == self.turns for one in self.results)


def compare_measures(
    config: RunConfig, folder: Path, *, turns: int, steps: Steps, deadline: Deadline, say: Callable[[str], None]
) -> Measures | None:
    """Measure what `folder/measures.jsonl` does not hold yet, and write `folder/measures.json`.

    Args:
        config: the run; what it pins and its cap do not count.
        folder: made where it is missing.
        turns: how often each measure is measured, in an order that is reversed from turn to turn.
        deadline: nothing is begun that would not end by then.
        say: called with one line of text a measurement.

    Returns:
        What was written; None where the time was up before every measure had one turn.  Calling again goes on from
        there.

    Raises:
        ConfigError: the file is of another run, or of other steps.
        FastftError: as `trials.measure_trials`.
    """
    config, device = free(config), detect_device(config.device)
    shape = model_shape(config)
    wanted = measures_of(config, shape, device)
    names = {choices.model_dump_json(): name for name, choices in wanted.items()}
    file = TrialFile(folder / TRIALS)
    header = file.begin(make_header(config, shape, device, {"steps": asdict(steps)}))
    missing, total = still_to_measure(list(wanted.values()), turns, _settled(file.trials())), len(wanted) * turns
    if missing:
        say(f"measures: {len(wanted)}, {turns} times; {len(missing)} measurements to go")
    show = numbered(say, total - len(missing), total)
    measure_trials(
        config, missing, file, steps=steps, deadline=deadline,
        on_trial=lambda trial: show(f"{names[trial.choices.model_dump_json()]}: {describe(trial)}"),
    )  # fmt: skip
    trials = file.trials()
    if not names.keys() <= {trial.choices.model_dump_json() for trial in trials}:
        return None
    result = Measures(
        **facts(config, device, header), turns=turns,
        results=[
            _result(
                name, [trial for trial in trials if trial.choices == choices], turns, config,
                estimate_peak_bytes(shape, choices, config, device=device),
            )
            for name, choices in wanted.items()
        ],
    )  # fmt: skip
    result.write(folder / MEASURES_FILE)
    return result


def _settled(trials: Sequence[Trial]) -> list[Trial]:
    """Those that need not be tried again by the next call: a failure may have been the machine's."""
    return [trial for trial in trials if trial.verdict != "failed"]


def _result(
    name: str, trials: Sequence[Trial], turns: int, config: RunConfig, predicted_peak_bytes: int
) -> MeasureResult:
    settled = _settled(trials)
    if len(settled) >= turns:
        trials = settled[:turns]  # what failed before was tried again
    first_bad = next((trial for trial in trials if trial.verdict != "ok"), None)
    return MeasureResult(
        name=name,
        description=MEASURES[name].description,
        choices=trials[0].choices,
        summary=trials[0].choices.summary(),
        verdict="ok" if first_bad is None else first_bad.verdict,
        detail="" if first_bad is None else first_bad.detail,
        tokens_per_second=speed_over_turns(trials, config),
        turn_tokens_per_second=[trial.tokens_per_second for trial in trials if trial.tokens_per_second is not None],
        step_time_ms=[time for trial in trials for time in trial.step_time_ms],
        peak_bytes=max((trial.peak_bytes for trial in trials if trial.peak_bytes is not None), default=None),
        predicted_peak_bytes=predicted_peak_bytes,
    )
