"""Peers: Unsloth, stock PEFT and fastft on the same work, each in a process of its own.

    python -m bench peers qwen2-1.5b --seq-len 2048 --batch-size 4 --optimizer adamw_8bit --output runs/peers

What a user of each would write: a plain loop around the model, as `bench.peer_loop` has it.  Without recomputation, or
with each implementation's own checkpointing; fastft then gets no more memory than a peer took, so the peers run first
in every turn.
"""

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from shutil import copyfile
from statistics import median
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from bench.peer_loop import IMPLEMENTATIONS, MARKER
from bench.results import Result, facts
from bench.trials import Steps
from bench.worker_process import last_words
from fastft.config import RunConfig
from fastft.errors import ConfigError, MeasureError, unknown_choice
from fastft.files import new_folder
from fastft.hardware import Device, detect_device, resolve_dtype
from fastft.models.spec import SPECS
from fastft.processes import WaitingProcess
from fastft.siblings import ROOT
from fastft.units import gib

if TYPE_CHECKING:
    from fastft.models.loading import ResolvedModel

PEERS = "peers.json"
PEERS_SCHEMA = 1
OURS = "fastft"
SAME_LOSS, SAME_SIZE = 0.01, 0.1
"""By how much the first loss, and the loaded model's bytes, may differ from fastft's, as a fraction.  Before the first
update the loss depends on the frozen weights alone, and 16 bits round it; of random weights it says little, so the size
must tell whether they were quantized alike."""

Recomputation = Literal["none", "own"]


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LoopRequest(_Message):
    """What `bench.peer_loop` is asked."""

    implementation: str
    model: str
    """A local folder."""
    quantization: str
    dtype: str
    """bf16, with autocast, or fp32."""
    device: str
    recomputation: Recomputation
    memory_cap_bytes: int | None
    """fastft's alone."""
    rank: int
    alpha: float
    dropout: float
    targets: list[str]
    optimizer: str
    learning_rate: float
    batch_size: int
    sequence_tokens: int
    vocabulary: int
    seed: int
    warmup_steps: int
    timed_steps: int


class LoopAnswer(_Message):
    """What it answers."""

    version: str
    step_time_ms: list[float]
    """Of the timed steps."""
    loss: list[float]
    """Of every step."""
    model_bytes: int | None
    """What stands before the first step; None on a CPU, as the next."""
    peak_bytes: int | None
    """The most that the allocator handed out, in all steps."""
    trainable_parameters: int
    batches_sha256: str


class PeerRun(_Message):
    """One implementation in one turn."""

    implementation: str
    turn: int
    memory_cap_bytes: int | None
    answer: LoopAnswer | None
    """None where it failed."""
    problem: str
    """Why it failed, or in what it did other work than fastft; else empty."""


class Peers(Result):
    """`peers.json`."""

    peers: int = PEERS_SCHEMA
    recomputation: Recomputation
    steps: dict[str, int]
    runs: list[PeerRun]

    def of(self, implementation: str) -> list[LoopAnswer]:
        """What it answered, by turn."""
        found = [run.answer for run in self.runs if run.implementation == implementation]
        return [answer for answer in found if answer is not None]

    def tokens_per_second(self, implementation: str) -> float | None:
        """By the median step of all turns."""
        times = [time for answer in self.of(implementation) for time in answer.step_time_ms]
        tokens = self.config.batch_size * self.config.sequence_tokens
        return 1000.0 * tokens / median(times) if times else None

    def peak_bytes(self, implementation: str) -> int | None:
        """The highest of all turns."""
        return max((a.peak_bytes for a in self.of(implementation) if a.peak_bytes is not None), default=None)


def compare_peers(
    config: RunConfig,
    folder: Path,
    *,
    implementations: Sequence[str],
    recomputation: Recomputation,
    unsloth_python: str,
    steps: Steps,
    turns: int,
    timeout_seconds: float,
    say: Callable[[str], None],
) -> Peers:
    """Run every implementation in every turn and write `folder/peers.json` after each.

    Args:
        config: the work; of its memory cap fastft alone knows.
        folder: a new or empty folder.
        implementations: some of `IMPLEMENTATIONS`; fastft runs last.
        recomputation: none, or each implementation's own checkpointing; with the latter, and without a cap, fastft's is
            Unsloth's first peak, or the lowest peak of the peers where it did not run.
        unsloth_python: the interpreter that has Unsloth.
        timeout_seconds: for one run.
        say: called with a line of text a run.

    Raises:
        ConfigError: an unknown implementation, or work that a peer cannot do.
        ModelError: the model is not found.
        OutputError: `folder` is not empty or cannot be written.
    """
    from fastft.models.loading import resolve_model

    ordered = _ordered(implementations)
    device, resolved = detect_device(config.device), resolve_model(config.model, offline=True)
    request = _request(config, device, resolved, recomputation, steps)
    new_folder(folder, what="output")
    runs: list[PeerRun] = []
    with _checkpoint(resolved, request, folder) as model:
        for turn in range(turns):
            for implementation in ordered:
                cap = config.memory_cap_bytes or (_cap(runs) if recomputation == "own" else None)
                its_own = {"memory_cap_bytes": cap if implementation == OURS else None}
                asked = request.model_copy(update={"implementation": implementation, "model": model, **its_own})
                python = unsloth_python if implementation == "unsloth" else sys.executable
                log = folder / "logs" / f"{implementation}-{turn}.log"
                runs.append(_run(asked, turn, python, log, timeout_seconds))
                result = Peers(
                    **facts(config, device), recomputation=recomputation,
                    steps={"warmup": steps.warmup, "timed": steps.timed}, runs=_judged(runs),
                )  # fmt: skip
                result.write(folder / PEERS)
                say(f"[{len(runs)}/{turns * len(ordered)}] {_in_words(result.runs[-1], config)}")
    return result


def _ordered(implementations: Sequence[str]) -> list[str]:
    for name in implementations:
        if name not in IMPLEMENTATIONS:
            raise unknown_choice("implementation", name, IMPLEMENTATIONS)
    return sorted(dict.fromkeys(implementations), key=lambda name: name == OURS)


def _request(
    config: RunConfig, device: Device, resolved: "ResolvedModel", recomputation: Recomputation, steps: Steps
) -> LoopRequest:
    """All but the implementation and its cap.

    Raises:
        ConfigError: what not every implementation does: another quantization than NF4, fp16, rows of several documents,
            a model of the hub's cache.
    """
    dtype = resolve_dtype(config.dtype, device)
    if resolved.kind == "hub":
        raise ConfigError("peers load local folders only", got=resolved.name, fix="give the folder of its snapshot")
    if dtype == "fp16":
        raise ConfigError("peers train in bf16 or fp32", got="fp16", allowed="bf16 on a GPU, fp32 on a CPU")
    if config.quantization not in ("none", "nf4"):
        raise ConfigError("peers are compared unquantized or in NF4", got=config.quantization, allowed="none, nf4")
    if config.packing:
        raise ConfigError("peers are compared on rows of one length", got="packing", fix="leave --packing out")
    family = resolved.config.model_type
    targets = config.lora.targets or (SPECS[family].targets if family in SPECS else None)
    if targets is None:
        raise ConfigError(
            f"which linear layers of family {family} get an adapter is not known", got="no targets",
            fix="name them with --targets",
        )  # fmt: skip
    return LoopRequest(
        implementation=OURS, model="", quantization=config.quantization, dtype=dtype, device=device.kind,
        recomputation=recomputation, memory_cap_bytes=None, rank=config.lora.rank, alpha=config.lora.alpha,
        dropout=config.lora.dropout, targets=list(targets), optimizer=config.optimizer,
        learning_rate=config.learning_rate, batch_size=config.batch_size, sequence_tokens=config.sequence_tokens,
        vocabulary=int(resolved.config.vocab_size), seed=config.seed, warmup_steps=steps.warmup,
        timed_steps=steps.timed,
    )  # fmt: skip


@contextmanager
def _checkpoint(resolved: "ResolvedModel", request: LoopRequest, folder: Path) -> Iterator[str]:
    """A folder that every implementation can load: the model's own, or for a shape one with random weights, which is
    gone afterwards."""
    if resolved.kind == "folder":
        yield resolved.source
        return
    from fastft.measure.memory import release_cached
    from fastft.models.loading import DTYPES, load_model

    with tempfile.TemporaryDirectory(dir=folder, prefix="model-") as place:
        model = load_model(resolved, dtype=DTYPES[request.dtype], device=request.device)
        model.save_pretrained(place, max_shard_size="4GB")
        del model
        release_cached()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            copyfile(str(files("fastft.models") / "tiny" / name), Path(place) / name)
        yield place


def _cap(runs: Sequence[PeerRun]) -> int | None:
    """Unsloth's first peak, else the lowest of the peers'."""
    peaks = {run.implementation: run.answer.peak_bytes for run in reversed(runs) if run.answer is not None}
    known = [peak for name, peak in peaks.items() if peak is not None and name != OURS]
    return peaks.get("unsloth") or min(known, default=None)


def _run(request: LoopRequest, turn: int, python: str, log: Path, timeout_seconds: float) -> PeerRun:
    answer, problem = None, ""
    try:
        answer = _finite(_ask(request, python, log, timeout_seconds))
    except (MeasureError, OSError) as error:
        problem = str(error)
    return PeerRun(
        implementation=request.implementation, turn=turn, memory_cap_bytes=request.memory_cap_bytes, answer=answer,
        problem=problem,
    )  # fmt: skip


def _finite(answer: LoopAnswer) -> LoopAnswer:
    """Raises MeasureError where training diverged: then what was timed is no training."""
    for step, loss in enumerate(answer.loss, 1):
        if not math.isfinite(loss):
            raise MeasureError(f"the loss of step {step} is not finite", got=loss)
    return answer


def _ask(request: LoopRequest, python: str, log: Path, timeout_seconds: float) -> LoopAnswer:
    """Raises MeasureError where there is no answer; nothing of the process is left running."""
    log.parent.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).with_name("peer_loop.py")
    with log.open("wb") as stderr:
        process = WaitingProcess((python, str(script)), environment=_environment(request, log.parent), log=stderr)
        with process:
            code = process.ask(request.model_dump_json(), timeout_seconds=timeout_seconds)
            process.stdout.seek(0)
            printed = process.stdout.read().decode(errors="replace")
    if code is None:
        raise MeasureError("it did not end in time", got=f"{timeout_seconds:g} s", fix="raise --timeout")
    lines = [line for line in printed.splitlines() if line.startswith(MARKER)]
    if not lines:
        raise MeasureError("it ended without an answer", got=last_words(log, code), fix=f"see {log}")
    try:
        return LoopAnswer.model_validate(json.loads(lines[-1].removeprefix(MARKER)))
    except (ValueError, ValidationError) as error:
        raise MeasureError("its answer cannot be read", got=str(error).splitlines()[0], fix=f"see {log}") from error


def _environment(request: LoopRequest, folder: Path) -> dict[str, str]:
    """No network, and nobody is told; no GPU where the work is for a CPU; what Unsloth compiles goes to `folder`."""
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    if request.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if request.implementation == OURS:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    elif request.implementation == "unsloth":
        # Of another interpreter: what this one's path holds is for this one's versions.
        environment.pop("PYTHONPATH", None)
        compiled = str((folder / "unsloth-compiled").resolve())  # else it goes to the current folder
        environment |= {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_COMPILE_LOCATION": compiled}
    return environment


def _judged(runs: Sequence[PeerRun]) -> list[PeerRun]:
    """The runs, those marked that did other work than fastft, or took more memory than they were given."""
    ours = next((run.answer for run in runs if run.implementation == OURS and run.answer is not None), None)
    if ours is None:
        return list(runs)
    return [run.model_copy(update={"problem": run.problem or _problem(run, ours)}) for run in runs]


def _problem(run: PeerRun, ours: LoopAnswer) -> str:
    answer, cap = run.answer, run.memory_cap_bytes
    if answer is None:
        return ""
    if cap is not None and answer.peak_bytes is not None and answer.peak_bytes > cap:
        return f"its peak of {gib(answer.peak_bytes)} is over its cap of {gib(cap)}"
    size, our_size = answer.model_bytes or 0, ours.model_bytes or 0
    if not abs(size - our_size) <= SAME_SIZE * our_size:
        return f"its model takes {gib(size)}, fastft's {gib(our_size)}"
    if answer.batches_sha256 != ours.batches_sha256:
        return "it trained other batches than fastft"
    if answer.trainable_parameters != ours.trainable_parameters:
        return f"it trained {answer.trainable_parameters:,} parameters, fastft {ours.trainable_parameters:,}"
    if not abs(answer.loss[0] - ours.loss[0]) <= SAME_LOSS * abs(ours.loss[0]):
        return f"its first loss is {answer.loss[0]:.4f}, fastft's {ours.loss[0]:.4f}"
    return ""


def _in_words(run: PeerRun, config: RunConfig) -> str:
    if run.answer is None:
        return f"{run.implementation}: {run.problem}"
    speed = 1000.0 * config.batch_size * config.sequence_tokens / median(run.answer.step_time_ms)
    peak = "" if run.answer.peak_bytes is None else f", peak {run.answer.peak_bytes / 2**30:.2f} GiB"
    return f"{run.implementation}: {speed:,.0f} tokens/s{peak}{f'; {run.problem}' if run.problem else ''}"
