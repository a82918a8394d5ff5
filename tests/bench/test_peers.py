"""Peers: the real loops of stock PEFT and fastft, an Unsloth that is none, and answers by hand."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench import peers as module
from bench.peers import PEERS, LoopAnswer, LoopRequest, Peers, compare_peers
from bench.tables import show_peers
from bench.trials import Steps
from fastft.config import RunConfig
from fastft.errors import ConfigError, FastftError, MeasureError, OutputError
from fastft.siblings import ROOT
from live_processes import gone

GIB = 2**30
STAND_IN = """
import json, os
from pathlib import Path
import peft, transformers

class FastLanguageModel:
    @staticmethod
    def from_pretrained(name, **given):
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=given["dtype"], local_files_only=True)
        print("a library's own words", end="")
        return model, None

    @staticmethod
    def get_peft_model(model, *, r, lora_alpha, lora_dropout, bias, target_modules, random_state, **given):
        names = ("UNSLOTH_DISABLE_STATISTICS", "UNSLOTH_COMPILE_LOCATION", "HF_HUB_OFFLINE", "PYTHONPATH")
        said = given | {name: os.environ.get(name) for name in names}
        (Path(__file__).parent / "said.json").write_text(json.dumps(said))
        lora = peft.LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=target_modules, task_type="CAUSAL_LM")
        return peft.get_peft_model(model, lora)
"""


def config(**more: Any) -> RunConfig:
    return RunConfig(**{"model": "tiny", "batch_size": 2, "sequence_tokens": 24, "device": "cpu", **more})


def peers(folder: Path, run: RunConfig | None = None, **more: Any) -> Peers:
    given: dict[str, Any] = {
        "implementations": ("fastft", "unsloth", "peft"), "recomputation": "own", "unsloth_python": sys.executable,
        "steps": Steps(), "turns": 1, "timeout_seconds": 300.0, "say": lambda line: None,
    }  # fmt: skip
    return compare_peers(run or config(), folder, **{**given, **more})


@pytest.fixture
def unsloth_python(tmp_path: Path) -> str:
    """An interpreter that has what stands in for Unsloth, beside all that this one has."""
    site = tmp_path / "site"
    (site / "unsloth").mkdir(parents=True)
    (site / "unsloth" / "__init__.py").write_text(STAND_IN)
    (site / "unsloth-1.2.dist-info").mkdir()
    (site / "unsloth-1.2.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: unsloth\nVersion: 1.2\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{site}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return str(python)


@pytest.mark.parametrize("recomputation", ["none", "own"])
def test_all_train_the_same_model_on_the_same_batches(recomputation, unsloth_python, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/of/this/interpreter")
    said: list[str] = []
    result = peers(tmp_path / "out", recomputation=recomputation, unsloth_python=unsloth_python, say=said.append)
    assert [run.implementation for run in result.runs] == ["unsloth", "peft", "fastft"]
    assert Peers.model_validate_json((tmp_path / "out" / PEERS).read_text()) == result
    assert not any(run.problem for run in result.runs)
    answers = [run.answer for run in result.runs]
    assert all(answer is not None and len(answer.step_time_ms) == 3 and len(answer.loss) == 4 for answer in answers)
    first = [answer.loss[0] for answer in answers if answer is not None]
    assert first == pytest.approx([first[0]] * 3, rel=1e-5)
    assert all(answer is not None and answer.peak_bytes is None for answer in answers), "a CPU's memory is not counted"
    assert [line.split(":")[0] for line in said] == ["[1/3] unsloth", "[2/3] peft", "[3/3] fastft"]
    asked = json.loads((tmp_path / "site" / "unsloth" / "said.json").read_text())
    assert asked == {
        "use_gradient_checkpointing": False if recomputation == "none" else "unsloth",
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "UNSLOTH_COMPILE_LOCATION": str(tmp_path / "out" / "logs" / "unsloth-compiled"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f":{tmp_path / 'site'}",
    }
    show_peers(result)
    assert "unsloth 1.2 " in capsys.readouterr().out


def test_a_shape_gets_random_weights_that_do_not_stay(tmp_path):
    result = peers(tmp_path / "out", config(model="toy-llama"), implementations=("peft", "fastft"))
    assert not any(run.problem for run in result.runs)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["logs", PEERS]


def test_what_fails_is_a_problem_and_stops_nobody(tmp_path, capsys):
    folder = tmp_path / "out"
    result = peers(folder, implementations=("unsloth", "fastft"))
    lost, ours = result.runs
    assert lost.answer is None
    assert "it ended without an answer; got exit code 1, ModuleNotFoundError" in lost.problem
    assert str(folder / "logs" / "unsloth-0.log") in lost.problem
    assert ours.answer is not None
    show_peers(result)
    assert "warning: unsloth, turn 1: it ended without an answer" in capsys.readouterr().err
    missing = peers(tmp_path / "other", implementations=("unsloth",), unsloth_python="/no/such/python")
    assert "No such file" in missing.runs[0].problem


def test_what_does_not_end_or_answers_nonsense_is_a_problem(tmp_path):
    def python(name: str, script: str) -> str:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return str(path)

    for name, script, problem in (
        ("slow", "sleep 60", "it did not end in time; got 0.5 s"),
        ("odd", f"echo '{module.MARKER}[1]'", "its answer cannot be read"),
        ("killed", "kill -9 $$", "it ended without an answer; got SIGKILL"),
    ):
        result = peers(
            tmp_path / f"out-{name}", implementations=("unsloth",), unsloth_python=python(name, script),
            timeout_seconds=0.5 if name == "slow" else 60.0,
        )  # fmt: skip
        assert problem in result.runs[0].problem


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Answers instead of processes: `by_hand(unsloth={...})` gives the requests, as they come in; a list is by turn."""

    def answering(**answers: Any) -> list[LoopRequest]:
        requests: list[LoopRequest] = []

        def ask(request: LoopRequest, *_: Any) -> LoopAnswer:
            turn = sum(asked.implementation == request.implementation for asked in requests)
            requests.append(request)
            given = answers.get(request.implementation, {})
            given = given[turn] if isinstance(given, list) else given
            if given is None:
                raise MeasureError("it is lost")
            facts = {
                "version": "1", "step_time_ms": [10.0, 20.0, 30.0], "loss": [2.0, 1.9], "model_bytes": GIB,
                "peak_bytes": 2 * GIB, "trainable_parameters": 7, "batches_sha256": "a", **given,
            }  # fmt: skip
            return LoopAnswer(**facts)

        monkeypatch.setattr(module, "_ask", ask)
        return requests

    return answering


@pytest.mark.parametrize(
    ("unsloth", "more", "cap"),
    [
        ([{"peak_bytes": 5 * GIB}, {"peak_bytes": 4 * GIB}], {}, 5 * GIB),
        (None, {}, 2 * GIB),
        ({"peak_bytes": 5 * GIB}, {"recomputation": "none"}, None),
        ({"peak_bytes": 5 * GIB}, {"run": config(memory_cap="3GiB")}, 3 * GIB),
        ({"peak_bytes": 5 * GIB}, {"run": config(memory_cap="3GiB"), "recomputation": "none"}, 3 * GIB),
    ],
)
def test_fastft_gets_no_more_memory_than_the_peer_took(unsloth, more, cap, by_hand, tmp_path):
    requests = by_hand(unsloth=unsloth)
    result = peers(tmp_path / "out", turns=2, **more)
    assert [request.implementation for request in requests] == ["unsloth", "peft", "fastft"] * 2
    caps = {name: {r.memory_cap_bytes for r in requests if r.implementation == name} for name in ("peft", "fastft")}
    assert caps == {"peft": {None}, "fastft": {cap}}
    assert {run.memory_cap_bytes for run in result.runs if run.implementation == "fastft"} == {cap}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"batches_sha256": "b"}, "it trained other batches than fastft"),
        ({"model_bytes": 11 * GIB // 9}, "its model takes 1.22 GiB, fastft's 1.00 GiB"),
        ({"model_bytes": GIB + GIB // 20}, ""),
        ({"trainable_parameters": 8}, "it trained 8 parameters, fastft 7"),
        ({"loss": [2.03, 1.9]}, "its first loss is 2.0300, fastft's 2.0000"),
        ({"loss": [2.0, math.nan]}, "the loss of step 2 is not finite; got nan"),
        ({"loss": [2.01, 1.7]}, ""),
    ],
)
def test_other_work_is_a_problem(changes, problem, by_hand, tmp_path):
    by_hand(peft=changes)
    result = peers(tmp_path / "out", implementations=("peft", "fastft"))
    assert [run.problem for run in result.runs] == [problem, ""]


def test_a_peak_over_the_cap_is_a_problem(by_hand, tmp_path):
    by_hand(fastft={"peak_bytes": 3 * GIB})
    result = peers(tmp_path / "out", implementations=("peft", "fastft"))
    assert [run.problem for run in result.runs] == ["", "its peak of 3.00 GiB is over its cap of 2.00 GiB"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_loop_ends_with_whoever_started_it(number, tmp_path):
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    begun = tmp_path / "begun"
    (tmp_path / "unsloth.py").write_text(
        f"import os, time\nopen({str(begun) + '.new'!r}, 'w').write(str(os.getpid()))\n"
        f"os.rename({str(begun) + '.new'!r}, {str(begun)!r})\ntime.sleep(300)\n"
    )
    command = [sys.executable, "-P", "-m", "bench", "peers", "toy-llama", "--seq-len", "32", "--batch-size", "1"]
    command += ["--device", "cpu", "--implementations", "unsloth", "--unsloth-python", str(python)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*command, "--output", str(out)], cwd=tmp_path, env=environment) as starter:
        end = time.monotonic() + 120
        while not begun.exists():
            assert time.monotonic() < end, "it never began"
            time.sleep(0.1)
        starter.send_signal(number)
        assert starter.wait(60) != 0
    assert gone(int(begun.read_text()))
    if number == signal.SIGTERM:
        assert [path.name for path in out.iterdir()] == ["logs"], "the model's folder is gone"


def test_speed_is_by_the_median_step_of_all_turns_and_the_peak_the_highest(by_hand, tmp_path, monkeypatch):
    by_hand(fastft={"step_time_ms": [1.0, 2.0, 30.0], "peak_bytes": 3 * GIB})
    result = peers(tmp_path / "out", turns=2)
    assert result.tokens_per_second("fastft") == pytest.approx(1000 * 2 * 24 / 2.0)
    assert result.tokens_per_second("peft") == pytest.approx(1000 * 2 * 24 / 20.0)
    assert (result.peak_bytes("fastft"), result.peak_bytes("peft")) == (3 * GIB, 2 * GIB)
    by_hand(peft=None)
    result = peers(tmp_path / "lost", implementations=("peft",))
    assert (result.tokens_per_second("peft"), result.peak_bytes("peft")) == (None, None)


@pytest.mark.parametrize(
    ("run", "more", "message"),
    [
        (config(), {"implementations": ("liger",)}, "implementation is unknown; got liger"),
        (config(dtype="fp16"), {}, "peers train in bf16 or fp32; got fp16"),
        (config(quantization="int8"), {}, "peers are compared unquantized or in NF4; got int8"),
        (config(packing=True), {}, "rows of one length; got packing"),
        (config(model="no-such-model"), {}, "model is unknown"),
    ],
)
def test_bad_input_leaves_nothing(run, more, message, tmp_path):
    with pytest.raises(FastftError, match=message):
        peers(tmp_path / "out", run, **more)
    assert not (tmp_path / "out").exists()


def test_the_folder_is_new(tmp_path):
    (tmp_path / "old").write_text("")
    with pytest.raises(OutputError, match="not empty"):
        peers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_an_unknown_family_needs_targets(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SPECS", {})
    with pytest.raises(ConfigError, match="is not known; got no targets; fix: name them with --targets"):
        peers(tmp_path / "out")


def test_the_command_line_starts_without_torch():
    code = "import sys, bench.__main__; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
