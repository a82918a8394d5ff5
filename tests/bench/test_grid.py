"""What a grid has, and a real one of a toy on the CPU."""

import logging
import time
from pathlib import Path

import pytest

from bench import trials as trials_module
from bench.grid import GRID, Axes, configurations, free, is_uniform, measure_grid, placements
from bench.messages import Answer
from bench.trial_file import TrialFile
from bench.trials import Deadline, Steps
from devices import GPU
from fastft import defaults
from fastft.config import RunConfig
from fastft.errors import ConfigError, MeasureError
from fastft.hardware import Device
from fastft.models.shapes import SHAPES
from fastft.plan import Choices, Trial

CPU = Device("cpu", "C", None, None, 8 * 2**30, 2)
TOY = RunConfig(model="toy-llama", batch_size=2, sequence_tokens=16, device="cpu")
SMALL = Axes(parts=1, loss_chunks=(2048,), mlp_chunks=(None,))


def on_gpu(monkeypatch: pytest.MonkeyPatch, model: str, axes: Axes | None = None, **changes):
    monkeypatch.setattr(defaults, "require_backend", lambda *_: None)
    config = RunConfig(**{"model": model, "batch_size": 8, "sequence_tokens": 2048, "backend": "triton", **changes})
    # `free` lets the device choose the backend; here there is none to choose.
    monkeypatch.setattr("bench.grid.free", lambda given: free(given).model_copy(update={"backend": "triton"}))
    return configurations(config, SHAPES[config.model], GPU, axes or Axes())


def test_placements_are_uniform_ones_and_all_pairs_the_small_one_first():
    found = [placement for _, placement in placements(["light", "mlp", "full"], 8, 4)]
    assert found[:3] == [["light"] * 8, ["mlp"] * 8, ["full"] * 8]
    assert len(found) == 3 + 3 * 3
    assert ["full"] * 2 + ["light"] * 6 in found
    assert ["full"] * 6 + ["mlp"] * 2 in found
    assert ["light"] * 2 + ["full"] * 6 not in found
    assert len({tuple(placement) for placement in found}) == len(found)
    assert len(list(placements(["light", "full"], 2, 4))) == 3, "a cut that another one rounds to counts once"
    assert len(list(placements(["light", "full"], 9, 1))) == 2


def test_a_grid_has_every_combination_once_the_coarse_ones_first(monkeypatch):
    found = on_gpu(monkeypatch, "qwen2-1.5b")
    assert len({choices.model_dump_json() for choices in found}) == len(found)
    assert {choices.micro_batch for choices in found} == {1, 2, 4, 8}
    assert all(choices.micro_batch * choices.accumulation == 8 for choices in found)
    fused = [choices for choices in found if choices.backend == "triton"]
    # light, mlp, full and their offloaded kin (`keep` is `light` here): 5 uniform placements, 10 pairs at 3 cuts.
    # Tiles do nothing where every layer keeps gate and up (1 of 35), or where one takes all (micro-batch 1).
    assert len(fused) == 2 * (35 + 3 * (35 + 34))
    assert len(found) - len(fused) == 2 * 4, "stock, checkpointed or not"
    first_mixed = next(at for at, choices in enumerate(found) if not is_uniform(choices))
    assert first_mixed == 4 * 5 + 8
    assert not any(choices.host_embedding or choices.resident_layers for choices in found), "tied, and not quantized"


def test_axes_narrow_it(monkeypatch):
    axes = Axes(most_micro_batch=2, parts=1, loss_chunks=(2048,), mlp_chunks=(None,), stock=False)
    found = on_gpu(monkeypatch, "qwen2-1.5b", axes)
    assert len(found) == 2 * 5
    assert all(map(is_uniform, found))


def test_a_quantized_model_keeps_weights_dense_and_an_untied_embedding_leaves(monkeypatch):
    axes = Axes(parts=1, loss_chunks=(2048,), mlp_chunks=(None,), stock=False, most_micro_batch=1)
    found = on_gpu(monkeypatch, "llama-3-8b", axes, quantization="nf4")
    assert len(found) == 5 * 3 * 2
    assert {choices.resident_layers for choices in found} == {0, 16, 32}
    assert {choices.host_embedding for choices in found} == {False, True}


def test_graphs_can_be_off_where_they_would_be_recorded(monkeypatch):
    axes = Axes(parts=1, loss_chunks=(2048,), mlp_chunks=(None,), graphs=("auto", "off"), stock=False)
    found = on_gpu(monkeypatch, "qwen2-1.5b", axes, batch_size=16)
    off = {choices.micro_batch for choices in found if choices.graphs == "off"}
    assert off == {1, 2, 4, 8}, "16 × 2,048 tokens keep the device busy by themselves"
    assert {choices.graphs for choices in configurations(TOY, SHAPES["toy-llama"], CPU, axes)} == {"auto"}


def test_a_cpu_has_no_host_to_offload_to():
    found = configurations(TOY, SHAPES["toy-llama"], CPU, SMALL)
    assert {policy for choices in found for policy in choices.placement} == {"light", "mlp", "full"}


def test_what_a_run_pins_does_not_narrow_its_grid():
    pinned = TOY.model_copy(update={"micro_batch": 1, "placement": "full", "memory_cap": "10GiB", "backend": "peft"})
    assert configurations(pinned, SHAPES["toy-llama"], CPU, SMALL) == configurations(
        TOY, SHAPES["toy-llama"], CPU, SMALL
    )


@pytest.mark.parametrize(
    "bad", [{"parts": 0}, {"loss_chunks": ()}, {"mlp_chunks": (0,)}, {"most_micro_batch": 0}, {"graphs": ("on",)}]
)
def test_bad_axes(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Axes(**bad)


def measure(folder: Path, said: list[str], deadline: float | None = None, axes: Axes = SMALL):
    return measure_grid(
        TOY, folder, axes=axes, steps=Steps(warmup=1, timed=3), deadline=Deadline(deadline), say=said.append
    )


def test_a_real_grid_is_measured_once_and_gone_on_with(tmp_path):
    said: list[str] = []
    grid = measure(tmp_path, said)
    assert grid.complete
    assert [trial.verdict for trial in grid.trials] == ["ok"] * (2 * 3 + 4), grid.trials
    assert grid.header.key.global_batch == 2
    assert grid.header.started_at
    assert f"[{grid.total}/{grid.total}]" in said[-1]
    content = (tmp_path / GRID).read_bytes()

    said.clear()
    assert measure(tmp_path, said) == grid
    assert (tmp_path / GRID).read_bytes() == content
    assert said == [], "nothing was left to measure"
    with pytest.raises(ConfigError, match="another run"):
        measure(tmp_path, said, axes=Axes(parts=2, loss_chunks=(2048,), mlp_chunks=(None,)))

    # As after a time limit: the last five are missing.
    (tmp_path / GRID).write_bytes(b"\n".join(content.split(b"\n")[:6]) + b"\n")
    cut = measure(tmp_path, said, deadline=time.monotonic())
    assert not cut.complete
    assert len(cut.trials) == 5
    again = measure(tmp_path, said)
    assert again.complete
    assert again.trials[:5] == grid.trials[:5], "what is there is not measured again"


class FakeWorker:
    """Answers for a worker: appends a trial a configuration, and dies at those that it is told to die at."""

    def __init__(self, file: TrialFile, deadly: list[Choices], most: int | None) -> None:
        self.file, self.deadly, self.most, self.calls = file, deadly, most, 0

    def __call__(self, request, **options) -> Answer:
        self.calls += 1
        for choices in request.choices[: self.most]:
            if choices in self.deadly:
                raise MeasureError("the worker was killed")
            self.file.append(Trial(choices=choices, verdict="ok"))
        return Answer(trials=len(request.choices[: self.most]))


WANTED = configurations(TOY.model_copy(update={"batch_size": 4}), SHAPES["toy-llama"], CPU, SMALL)[:6]


def series(tmp_path, monkeypatch, deadly=(), most: int | None = None):
    file = TrialFile(tmp_path / "trials.jsonl")
    file.append(Trial(choices=WANTED[0], verdict="ok"))  # stands for the header
    worker, seen = FakeWorker(file, list(deadly), most), []
    monkeypatch.setattr(trials_module, "ask_worker", worker)
    complete = trials_module.measure_trials(
        TOY, WANTED, file, steps=Steps(), deadline=Deadline(None), on_trial=seen.append
    )
    assert file.trials() == seen
    return complete, seen, worker.calls


def test_a_configuration_that_ends_the_worker_is_a_verdict_and_the_rest_is_measured(tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING, logger="bench"):
        complete, seen, workers = series(tmp_path, monkeypatch, deadly=WANTED[2:3] + WANTED[5:])
    assert complete
    assert [trial.choices for trial in seen] == WANTED
    assert [trial.verdict for trial in seen] == ["ok", "ok", "failed", "ok", "ok", "failed"]
    assert "killed" in seen[2].detail
    assert workers == 2, "after the last one there is nothing to start again for"
    assert WANTED[2].summary() in caplog.text


def test_a_worker_that_gives_up_is_followed_by_another_unless_it_could_not_begin(tmp_path, monkeypatch, caplog):
    def series_with(name: str, fates: list[int | None]):
        """Workers that measure so many and give up; None measures all."""
        file = TrialFile(tmp_path / name)
        file.append(Trial(choices=WANTED[0], verdict="ok"))

        def answer(request, **options) -> Answer:
            fate = fates.pop(0)
            for choices in request.choices[:fate]:
                file.append(Trial(choices=choices, verdict="ok"))
            return Answer(trials=len(request.choices)) if fate is None else Answer(error="no device")

        monkeypatch.setattr(trials_module, "ask_worker", answer)
        seen: list[Trial] = []
        options = {"steps": Steps(), "deadline": Deadline(None), "on_trial": seen.append}
        assert trials_module.measure_trials(TOY, WANTED, file, **options)
        return [trial.choices for trial in seen]

    with caplog.at_level(logging.WARNING, logger="bench"):
        assert series_with("a.jsonl", [2, 1, None]) == WANTED
    assert caplog.text.count("no device") == 2
    with pytest.raises(MeasureError, match="no device"):
        series_with("b.jsonl", [0, None])


def test_the_time_that_is_up_ends_a_series(tmp_path, monkeypatch):
    complete, seen, _ = series(tmp_path, monkeypatch, most=2)
    assert not complete
    assert [trial.choices for trial in seen] == WANTED[:2]


def test_a_worker_that_never_measures_anything_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(MeasureError, match="killed"):
        series(tmp_path, monkeypatch, deadly=WANTED)
