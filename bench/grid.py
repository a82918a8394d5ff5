"""The grid: every configuration of a run that the stated axes have, measured; what a tuned plan is judged against.

    python -m bench grid qwen2-1.5b --seq-len 2048 --batch-size 8 --output runs/grid

    micro-batch     every divisor of the batch size up to a bound
    placement       every policy for all layers, and every two policies, the one that saves less first, changing after
                    each 1/n of the layers
    loss chunk, MLP chunk, CUDA graphs, dense copies of quantized weights, embedding on the host: the values named
    stock PEFT      with and without gradient checkpointing, at each micro-batch

Nothing is ruled out by a prediction: what has too little memory is measured to have too little.  Two configurations
that do the same thing under two names count once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

from bench.provenance import provenance, utc_now
from bench.trial_file import Header, TrialFile
from bench.trials import Deadline, Steps, measure_trials, numbered
from fastft.config import RunConfig
from fastft.defaults import default_for, divisors
from fastft.errors import ConfigError, unknown_choice
from fastft.hardware import Device, detect_device
from fastft.memory.fitting import SMALL_LOSS_CHUNK
from fastft.memory.model import memory_terms, records
from fastft.models.shapes import ModelShape
from fastft.plan import OFFLOADED, POLICIES, Choices, Policy, Trial
from fastft.planning import model_shape, plan_key
from fastft.units import gib

GRAPH_MODES = ("auto", "off")
GRID = "grid.jsonl"
"""What the file is called in an output folder."""

# L layers


@dataclass(frozen=True, kw_only=True)
class Axes:
    """What the grid varies."""

    most_micro_batch: int | None = None
    """The largest micro-batch; None knows no bound but the batch size."""
    parts: int = 4
    """Mixed placements change from one policy to the other after each 1/`parts` of the layers."""
    loss_chunks: tuple[int, ...] = (2048, SMALL_LOSS_CHUNK)
    mlp_chunks: tuple[int | None, ...] = (None, 2048)
    """None is the whole MLP at once."""
    graphs: tuple[str, ...] = ("auto",)
    """`off` beside `auto` where that records CUDA graphs: slower launches, and no memory that recordings hold."""
    dense_parts: int = 2
    """Of a quantized model, none, each 1/`dense_parts` and all of the layers keep their weights dense as well."""
    stock: bool = True
    """Whether stock PEFT is part of it."""

    def __post_init__(self) -> None:
        for mode in self.graphs:
            if mode not in GRAPH_MODES:
                raise unknown_choice("graphs", mode, GRAPH_MODES)
        for name in ("most_micro_batch", "parts", "dense_parts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is not valid", got=value, allowed="1 or more", fix="leave it out")
        for name in ("loss_chunks", "mlp_chunks"):
            values = getattr(self, name)
            if not values or any(value is not None and value < 1 for value in values):
                raise ConfigError(
                    f"{name} is not valid", got=str(values), allowed="numbers of tokens", fix="write it like 2048,512"
                )


def configurations(config: RunConfig, shape: ModelShape, device: Device, axes: Axes) -> list[Choices]:
    """Every configuration once, the coarse ones first, so that a grid that is cut short is still one.

    `config` gives no micro-batch, placement or cap; backend and all else that no axis names are the default's.
    """
    default = default_for(free(config), shape, device).choices
    found: dict[str, tuple[tuple[int, int], Choices]] = {}
    most = axes.most_micro_batch or config.batch_size
    for size in (d for d in divisors(config.batch_size) if d <= most):
        rows = default.model_copy(update={"micro_batch": size, "accumulation": config.batch_size // size})
        if default.backend != "peft":
            for detail, choices in _fused(rows, config, shape, device, axes):
                found.setdefault(choices.model_dump_json(), (detail, choices))
        if axes.stock or default.backend == "peft":
            for policy in ("light", "full"):
                stock = Choices(
                    backend="peft", micro_batch=size, accumulation=rows.accumulation, placement=[policy] * shape.layers
                )
                found.setdefault(stock.model_dump_json(), ((0, 0), stock))
    return [choices for _, choices in sorted(found.values(), key=lambda pair: pair[0])]


def free(config: RunConfig) -> RunConfig:
    """`config` without what it pins itself, and without its cap: what tuner and grid are free to choose."""
    return config.model_copy(
        update={"backend": "auto", "micro_batch": None, "placement": None, "plan": "none", "memory_cap": None}
    )


def is_uniform(choices: Choices) -> bool:
    """Whether all layers have the same policy."""
    return len(set(choices.placement)) == 1


def _fused(
    rows: Choices, config: RunConfig, shape: ModelShape, device: Device, axes: Axes
) -> Iterator[tuple[tuple[int, int], Choices]]:
    """(how far from coarse, choices) of the fused engine at one micro-batch."""
    L, tokens = shape.layers, rows.micro_batch * config.sequence_tokens
    on_gpu = device.kind == "cuda"
    dense = _cuts(L, axes.dense_parts, ends=True) if config.quantization != "none" else {0: 0}
    hosts = (False, True) if on_gpu and not shape.tied_embeddings else (False,)
    loss_chunks = dict.fromkeys(min(chunk, tokens) for chunk in axes.loss_chunks)
    graphs = axes.graphs if records(shape, rows, config, device) else (rows.graphs,)
    others = list(
        product(enumerate(loss_chunks), enumerate(axes.mlp_chunks), enumerate(graphs), enumerate(dense), hosts)
    )
    for fineness, placement in placements(_policies(rows, config, shape, device), L, axes.parts):
        for (loss_at, loss), (mlp_at, mlp), (graphs_at, mode), (dense_at, layers), host in others:
            # An MLP is taken by tiles where gate and up are not saved, dropout does not forbid it, and there is more
            # than one.
            if mlp is not None and (mlp >= tokens or config.lora.dropout or set(placement) <= {"keep", "light"}):
                continue
            yield (
                ((loss_at > 0) + (mlp_at > 0) + (graphs_at > 0) + (dense_at > 0) + host, fineness),
                rows.model_copy(
                    update={
                        "placement": placement,
                        # The number that the run would write, where it changes nothing.
                        "loss_chunk_tokens": rows.loss_chunk_tokens if loss == tokens else loss,
                        "mlp_chunk_tokens": mlp,
                        "graphs": mode,
                        "resident_layers": layers,
                        "host_embedding": host,
                    }
                ),
            )


def placements(policies: Sequence[Policy], layers: int, parts: int) -> Iterator[tuple[int, list[Policy]]]:
    """(how fine, one policy a layer): all uniform placements, and all of two policies, what saves least first."""
    for policy in policies:
        yield 0, [policy] * layers
    ordered = [policy for policy in reversed(POLICIES) if policy in policies]  # as the tuner's solver orders them
    for first, second in combinations(ordered, 2):
        for count, fineness in _cuts(layers, parts, ends=False).items():
            yield fineness, [first] * count + [second] * (layers - count)


def _policies(rows: Choices, config: RunConfig, shape: ModelShape, device: Device) -> list[Policy]:
    saved = memory_terms(shape, rows, config, device).saved
    return [
        policy
        for policy in POLICIES
        if not (policy in OFFLOADED and device.kind != "cuda")
        # With the norms of most families `keep` is `light` by another name.
        and not (policy == "keep" and saved["keep"] == saved["light"])
    ]


def _cuts(layers: int, parts: int, *, ends: bool) -> dict[int, int]:
    """Numbers of layers at each 1/`parts`, rounded, and how fine each is (halves before quarters); with the ends or
    without, and none twice."""
    found: dict[int, int] = {0: 0, layers: 1} if ends else {}
    for part in sorted(range(1, parts), key=lambda part: (parts / 2 != part, part)):
        count = round(part * layers / parts)
        if 0 < count < layers:
            found.setdefault(count, 1 if 2 * part == parts else 2)
    return found


@dataclass(frozen=True)
class Grid:
    """A grid, as far as it was measured."""

    header: Header
    trials: list[Trial]
    """One a configuration, in the order of `configurations`; what failed is not tried again by the same call."""
    total: int
    """Configurations that the axes have."""

    @property
    def complete(self) -> bool:
        """Whether every configuration has its trial."""
        return len(self.trials) == self.total


def measure_grid(
    config: RunConfig,
    folder: Path,
    *,
    axes: Axes,
    steps: Steps,
    deadline: Deadline,
    say: Callable[[str], None],
) -> Grid:
    """Measure what `folder/grid.jsonl` does not hold yet.

    Args:
        config: the run; what it pins and its cap do not count.
        folder: made where it is missing.
        deadline: no configuration is begun that would not end by then.
        say: called with one line of text a configuration.

    Raises:
        ConfigError: the file is of another run or of other axes.
        FastftError: as `trials.measure_trials`.
    """
    config, device = free(config), detect_device(config.device)
    shape = model_shape(config)
    wanted = configurations(config, shape, device, axes)
    file = TrialFile(folder / GRID)
    header = file.begin(make_header(config, shape, device, {**asdict(axes), "steps": asdict(steps)}))
    known = measured(file)
    missing = [choices for choices in wanted if choices.model_dump_json() not in known]
    done = len(wanted) - len(missing)
    if missing:
        say(f"grid: {len(wanted)} configurations, {done} measured before")
    show = numbered(say, done, len(wanted))
    measure_trials(
        config, missing, file, steps=steps, deadline=deadline, on_trial=lambda trial: show(describe(trial))
    )  # fmt: skip
    known = measured(file, failures=True)
    trials = [known[name] for choices in wanted if (name := choices.model_dump_json()) in known]
    return Grid(header, trials, len(wanted))


def make_header(config: RunConfig, shape: ModelShape, device: Device, settings: dict[str, Any]) -> Header:
    """The header of a file of trials that is begun now."""
    made = provenance()
    # As JSON has it: tuples are lists there.
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return Header(
        key=plan_key(config, shape, device), config=config, settings=plain,
        git_commit=made.git_commit, command=made.command, started_at=utc_now(),
    )  # fmt: skip


def measured(file: TrialFile, *, failures: bool = False) -> dict[str, Trial]:
    """The last trial of each configuration, by its JSON; failures, which may have been the machine's, only if asked."""
    known = {trial.choices.model_dump_json(): trial for trial in file.trials()}
    return {name: trial for name, trial in known.items() if failures or trial.verdict != "failed"}


def describe(trial: Trial) -> str:
    """A trial as one line."""
    outcome = trial.verdict.replace("_", " ")
    if trial.verdict == "ok":
        outcome = f"{trial.tokens_per_second or 0:,.0f} tokens/s, peak {gib(trial.peak_bytes or 0)}"
    elif trial.detail:
        outcome += f": {trial.detail.splitlines()[0][:160]}"
    return f"{trial.choices.summary()}: {outcome}"
