"""Which measures a run has a use for, and a real comparison of a toy on the CPU."""

import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from typer.testing import CliRunner

from bench import measures as module
from bench.__main__ import app
from bench.grid import make_header
from bench.measures import MEASURES, MEASURES_FILE, TRIALS, compare_measures, measures_of
from bench.trial_file import TrialFile
from bench.trials import Deadline, Steps
from fastft import defaults
from fastft.config import RunConfig
from fastft.errors import ConfigError
from fastft.hardware import Device, detect_device
from fastft.memory.model import estimate_peak_bytes
from fastft.models.shapes import SHAPES
from fastft.plan import Choices, Trial
from fastft.planning import model_shape
from reports import build_report

GPU = Device("cuda", "H", "9.0", 132, 140 * 2**30, 8, host_memory_bytes=200 * 2**30)
CPU = Device("cpu", "C", None, None, 8 * 2**30, 2)
RUN = RunConfig(model="llama-3-8b", quantization="nf4", batch_size=4, sequence_tokens=2048, dtype="bf16")
TOY = RunConfig(model="toy-llama", batch_size=2, sequence_tokens=16, device="cpu", dtype="fp32")
TOKENS = TOY.batch_size * TOY.sequence_tokens


def found(monkeypatch: pytest.MonkeyPatch, device: Device = GPU, **changes: Any) -> dict[str, Choices]:
    monkeypatch.setattr(defaults, "_triton_installed", lambda: True)
    config = RUN.model_copy(update=changes)
    return measures_of(config, SHAPES[config.model], device)


def test_a_quantized_model_with_an_embedding_of_its_own_on_a_gpu(monkeypatch):
    choices = found(monkeypatch)
    assert list(choices) == [
        "light", "mlp", "full", "offload_mlp", "offload", "mlp_tiles", "small_loss", "host_embedding", "dense",
        "smallest",
    ]  # fmt: skip
    light = choices.pop("light")
    assert light == Choices(backend="triton", micro_batch=4, accumulation=1, placement=["light"] * 32)
    for name, other in choices.items():
        assert (other.backend, other.micro_batch, other.accumulation) == ("triton", 4, 1), name
        assert other != light, name
    assert choices["mlp_tiles"].mlp_chunk_tokens == 2048
    assert choices["small_loss"].loss_chunk_tokens == 512
    assert choices["dense"].resident_layers == 32
    assert choices["host_embedding"].host_embedding


def test_what_saves_is_predicted_to_save_and_all_together_saves_most(monkeypatch):
    peaks = {
        name: estimate_peak_bytes(SHAPES["llama-3-8b"], choices, RUN, device=GPU)
        for name, choices in found(monkeypatch).items()
    }
    assert all(peak < peaks["light"] for name, peak in peaks.items() if name not in ("light", "dense"))
    assert peaks["mlp_tiles"] < peaks["mlp"]
    assert peaks["dense"] > peaks["light"]
    assert peaks["smallest"] == min(peaks.values())


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"quantization": "none"}, {"dense"}),
        ({"model": "qwen2-1.5b"}, {"host_embedding"}),
        ({"lora": RUN.lora.model_copy(update={"dropout": 0.1})}, {"mlp_tiles"}),
        # One tile and one chunk hold all there is.
        ({"sequence_tokens": 128}, {"mlp_tiles", "small_loss"}),
    ],
)
def test_what_does_nothing_is_left_out(changes, missing, monkeypatch):
    assert set(found(monkeypatch)) - set(found(monkeypatch, **changes)) == missing


def test_small_steps_can_do_without_graphs(monkeypatch):
    assert "no_graphs" not in found(monkeypatch)
    assert found(monkeypatch, batch_size=1, sequence_tokens=1024)["no_graphs"].graphs == "off"


def test_keeping_all_is_a_measure_where_it_keeps_more(monkeypatch):
    assert "keep" in found(monkeypatch, model="toy-qwen3", quantization="none")


def test_a_cpu_has_no_host_beside_it(monkeypatch):
    choices = found(monkeypatch, CPU, quantization="none", dtype="fp32")
    assert list(choices) == ["light", "mlp", "full", "mlp_tiles", "small_loss", "smallest"]
    assert {one.backend for one in choices.values()} == {"eager"}


def test_a_host_without_room_is_not_asked(monkeypatch):
    small = Device("cuda", "H", "9.0", 132, 140 * 2**30, 8, host_memory_bytes=2**30)
    assert not {"offload", "offload_mlp"} & set(found(monkeypatch, small))


def test_all_together_is_left_out_where_it_is_what_one_does_alone():
    # Chunks are given up too, but of 32 tokens each holds all.
    assert list(measures_of(TOY, SHAPES["toy-llama"], CPU)) == ["light", "mlp", "full"]


def test_what_a_run_pins_and_its_cap_do_not_count():
    pinned = TOY.model_copy(update={"micro_batch": 1, "placement": "full", "memory_cap": "10GiB", "backend": "peft"})
    assert measures_of(pinned, SHAPES["toy-llama"], CPU) == measures_of(TOY, SHAPES["toy-llama"], CPU)


def measure(
    folder: Path,
    said: list[str],
    deadline: float | None = None,
    config: RunConfig = TOY,
    timed: int = 3,
    turns: int = 2,
):
    return compare_measures(
        config, folder, turns=turns, steps=Steps(warmup=1, timed=timed), deadline=Deadline(deadline), say=said.append
    )


def test_a_real_comparison_is_measured_once_and_gone_on_with(tmp_path):
    said: list[str] = []
    result = measure(tmp_path, said)
    assert [one.name for one in result.results] == ["light", "mlp", "full"]
    order = [trial.choices.placement[0] for trial in TrialFile(tmp_path / TRIALS).trials()]
    assert order == ["light", "mlp", "full", "full", "mlp", "light"], "there and back"
    assert said[-1].startswith("[6/6] light: eager, ")
    for one in result.results:
        assert one.verdict == "ok", one.detail
        assert len(one.step_time_ms) == 2 * 3
        assert len(one.turn_tokens_per_second) == 2
        assert one.tokens_per_second == pytest.approx(1000 * TOKENS / median(one.step_time_ms))
        assert one.peak_bytes > 0
        assert one.predicted_peak_bytes == estimate_peak_bytes(
            model_shape(TOY), one.choices, TOY, device=detect_device("cpu")
        )
        assert one.description == MEASURES[one.name].description
    assert json.loads((tmp_path / MEASURES_FILE).read_text()) == json.loads(result.model_dump_json())
    content = (tmp_path / TRIALS).read_bytes()

    said.clear()
    assert measure(tmp_path, said) == result
    assert (tmp_path / TRIALS).read_bytes() == content
    assert said == [], "nothing was left to measure"
    with pytest.raises(ConfigError, match="another run"):
        measure(tmp_path, said, timed=4)
    with pytest.raises(ConfigError, match="another run"):
        measure(tmp_path, said, config=TOY.model_copy(update={"batch_size": 4}))
    assert (tmp_path / TRIALS).read_bytes() == content

    # As after a time limit: the first two had one turn, or the third had none.
    for lines, turns in ((5, [1, 1, 2]), (3, None)):
        part = b"\n".join(content.split(b"\n")[:lines]) + b"\n"
        (tmp_path / TRIALS).write_bytes(part)
        (tmp_path / MEASURES_FILE).unlink(missing_ok=True)
        cut = measure(tmp_path, said, deadline=time.monotonic())
        assert (cut and [len(one.turn_tokens_per_second) for one in cut.results]) == turns
        assert (cut is not None) == (tmp_path / MEASURES_FILE).exists()
        assert cut is None or not cut.complete
    (tmp_path / TRIALS).write_bytes(part := b"\n".join(content.split(b"\n")[:5]) + b"\n")
    again = measure(tmp_path, said)
    assert again.complete
    assert (tmp_path / TRIALS).read_bytes().startswith(part)
    assert len(TrialFile(tmp_path / TRIALS).trials()) == 6, "what is there is not measured again"
    assert again.results[2] == result.results[2]

    text = build_report([tmp_path], tmp_path / "page").markdown.read_text()
    assert "### toy-llama, 2 × 16 tokens, on " in text
    assert text.count(MEASURES["full"].description) == 1


def trial(choices: Choices, verdict: str, milliseconds: float, peak_gib: int) -> Trial:
    if verdict != "ok":
        return Trial(choices=choices, verdict=verdict, detail="too much")
    return Trial(choices=choices, verdict="ok", step_time_ms=[milliseconds] * 3, peak_bytes=peak_gib * 2**30)


def test_one_disturbed_turn_does_not_decide_and_what_failed_is_tried_again(tmp_path, monkeypatch):
    light, mlp, full = measures_of(TOY, SHAPES["toy-llama"], detect_device("cpu")).values()
    fates = {
        light.model_dump_json(): [("ok", 500.0, 5), ("ok", 10.0, 6), ("ok", 10.0, 5)],
        mlp.model_dump_json(): [("ok", 11.0, 4), ("out_of_memory", 0.0, 0), ("ok", 11.0, 4)],
        full.model_dump_json(): [("ok", 12.0, 3), ("failed", 0.0, 0), ("ok", 12.0, 3), ("ok", 12.0, 3)],
    }
    measured: list[Choices] = []

    def fake(config, left, file, **options):
        for choices in left:
            measured.append(choices)
            file.append(trial(choices, *fates[choices.model_dump_json()].pop(0)))
        return True

    monkeypatch.setattr(module, "measure_trials", fake)
    first = measure(tmp_path, [], turns=3)
    assert [(one.verdict, one.detail) for one in first.results] == [
        ("ok", ""), ("out_of_memory", "too much"), ("failed", "too much"),
    ]  # fmt: skip
    assert first.results[0].tokens_per_second == 1000 * TOKENS / 10.0
    assert first.results[0].peak_bytes == 6 * 2**30
    assert [one.tokens_per_second for one in first.results[1:]] == [None, None]
    measured.clear()
    again = measure(tmp_path, [], turns=3)
    assert measured == [full], "a failure may have been the machine's"
    assert again.results[:2] == first.results[:2]
    assert [one.verdict for one in again.results] == ["ok", "out_of_memory", "ok"]
    assert len(again.results[2].step_time_ms) == 9


FLAGS = ("measures", "toy-llama", "--batch-size", "2", "--seq-len", "16", "--device", "cpu", "--dtype", "fp32")


def test_the_command_shows_each_measure_beside_the_baseline(tmp_path):
    # What was measured is kept, so the command has only to show it.
    file, config = TrialFile(tmp_path / TRIALS), TOY.model_copy(update={"plan": "none"})
    settings = {"steps": {"warmup": 1, "timed": 3}}
    file.begin(make_header(config, model_shape(TOY), detect_device("cpu"), settings))
    light, mlp, full = measures_of(TOY, SHAPES["toy-llama"], detect_device("cpu")).values()
    for kept in (trial(light, "ok", 32.0, 6), trial(mlp, "ok", 40.0, 5), trial(full, "out_of_memory", 0.0, 0)):
        file.append(kept)
    done = CliRunner().invoke(app, [*FLAGS, "--turns", "1", "--output", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines()[1:4]]
    assert rows[0][:7] == ["light", "1,000", "1.000×", "6.00", "GiB", "0.00", "GiB"]
    assert rows[1][:7] == ["mlp", "800", "0.800×", "5.00", "GiB", "1.00", "GiB"]
    assert rows[2][:7] == ["full", "out", "of", "memory", "none", "none", "none"]
    assert f"fastft report {tmp_path}" in done.output


def test_the_time_that_is_up_is_said_and_a_bad_flag_refused(tmp_path):
    words = [*FLAGS, "--output", str(tmp_path / "out"), "--max-minutes", "0.0001"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0
    assert "the time is up: not all measures are measured" in done.output
    assert not (tmp_path / "out" / MEASURES_FILE).exists()
    bad = CliRunner().invoke(app, [*FLAGS, "--output", str(tmp_path / "bad"), "--batch-size", "0"])
    assert bad.exit_code == 2
    assert "batch_size is not valid" in bad.output
    assert not (tmp_path / "bad").exists()
