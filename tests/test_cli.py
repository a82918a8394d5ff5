"""The program as a whole: what it declares, what it imports, how it ends."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from bench.scenarios import SCENARIOS
from fastft import cli, errors
from fastft.commands.flags import HELP, KEY_FLAGS, all_flags
from fastft.config import LoraConfig, RunConfig

VERBS = ("env", "doctor", "tune", "train", "bench", "report", "plan", "demo")
PROGRAM = [sys.executable, "-P", "-m", "fastft"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "FASTFT_CACHE_DIR": str(tmp_path / "cache"), "TERM": "dumb"}


@pytest.fixture
def started(environment: dict[str, str], tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are ended whatever happens."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def run(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, env=environment, check=False)


def help_of(*words: str) -> str:
    command = typer.main.get_command(cli.app)
    context = command.make_context("fastft", [*words, "--help"], resilient_parsing=True)
    for word in words:
        command = command.get_command(context, word)  # type: ignore[attr-defined]
        context = command.make_context(word, [], parent=context, resilient_parsing=True)
    return command.get_help(context)


def test_the_help_lists_the_verbs_in_order() -> None:
    text = help_of()
    listed = re.findall(r"^  ([a-z]+)  ", text.partition("Commands:")[2], re.MULTILINE)
    assert set(listed) == set(VERBS)
    assert "..." not in text.partition("Commands:")[2]  # no description is cut


@pytest.mark.parametrize("verb", VERBS[:-2] + VERBS[-1:])
def test_every_verb_has_examples(verb: str) -> None:
    assert f"Examples:\n    fastft {verb}" in help_of(verb)


def test_the_exit_codes_of_the_help_are_those_of_the_errors() -> None:
    words = {1: "unexpected", 2: "configuration", 3: "data", 4: "model", 5: "backend", 6: "plan", 7: "output",
             8: "measurement", 130: "interrupted"}  # fmt: skip
    for code, word in words.items():
        assert re.search(rf"\b{code} {word}", cli.EXIT_CODES)
    codes = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert codes == set(words) - {130}


def test_every_field_of_a_run_is_a_flag_of_train_with_a_meaning() -> None:
    fields = {*RunConfig.model_fields, *LoraConfig.model_fields} - {"lora"}
    text = help_of("train")
    assert set(all_flags()) == fields == set(HELP)
    for name in fields:
        assert re.search(rf"--{name.replace('_', '-')}\b", text), name
    assert "(default: 2e-4)" in text or "(default: 0.0002)" in text
    assert "keep|light|mlp|full" in text


def test_tune_has_the_flags_of_the_key() -> None:
    text = help_of("tune")
    assert all(f"--{name.replace('_', '-')}" in text for name in KEY_FLAGS)
    assert "--seq-len" in text


def test_the_help_of_bench_names_every_scenario() -> None:
    text = " ".join(help_of("bench").split())
    assert f"Scenarios: {', '.join(SCENARIOS)}" in text


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"], ["plan", "list"], ["env"]])
def test_what_needs_no_torch_imports_none(arguments: list[str], environment: dict[str, str]) -> None:
    code = f"""
import sys
from fastft.cli import main
try:
    main({arguments!r})
finally:
    heavy = {{"torch", "transformers", "numpy", "matplotlib", "pandas"}} & set(sys.modules)
    if heavy:
        sys.exit(f"imported {{heavy}}")
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # Processor time, which other work on the machine cannot lengthen.
    assert after.ru_utime - before.ru_utime < 0.6 * 2


def test_the_module_is_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    given: list[list[str]] = []
    monkeypatch.setattr(cli, "main", given.append)
    for arguments in ([], ["tune", "tiny"]):
        monkeypatch.setattr(sys, "argv", ["fastft", *arguments])
        runpy.run_module("fastft", run_name="__main__")
    assert given == [["doctor"], ["tune", "tiny"]]


def test_no_verb_is_the_help(environment: dict[str, str]) -> None:
    done = run("--debug", environment=environment)
    assert done.returncode == 0
    assert "Commands:" in done.stdout


def test_version(environment: dict[str, str]) -> None:
    from fastft import __version__

    done = run("--version", environment=environment)
    assert (done.returncode, done.stdout) == (0, f"fastft {__version__}\n")


def test_debug_anywhere_shows_the_traceback_before_the_line(environment: dict[str, str]) -> None:
    plain = run("plan", "show", "0123", environment=environment)
    loud = run("plan", "show", "0123", "--debug", environment=environment)
    assert plain.returncode == loud.returncode == errors.PlanError.exit_code
    assert "Traceback" not in plain.stderr
    assert "Traceback" in loud.stderr
    assert loud.stderr.splitlines()[-1] == plain.stderr.strip()


def test_a_reader_that_leaves_gets_no_complaint(environment: dict[str, str]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [*PROGRAM, "env"], stdout=write, stderr=subprocess.PIPE, text=True, env=environment, check=False
        )
    finally:
        os.close(write)
    assert done.stderr == ""
    assert done.returncode == 141


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_tuning_says_what_is_kept(
    sent: signal.Signals, environment: dict[str, str], started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    """A probe that never ends stands for a long one."""
    code = """
import sys, time
import autotune.search
def probe(request, **_):
    print("probing", flush=True)
    time.sleep(600)
autotune.search.run_in_process = probe
from fastft.cli import main
main(["tune", "toy-llama", "--sequence-tokens", "16", "--batch-size", "4", "--device", "cpu"])
"""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    started.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "probing\n"
    time.sleep(0.2)
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == (
        "interrupted; what was measured is kept, and the same command goes on from there"
    )
    assert "Traceback" not in stderr


def test_the_second_tuning_comes_from_the_cache_without_torch(environment: dict[str, str], tmp_path: Path) -> None:
    """In under 2 seconds of processor time, the interpreter's start included."""
    arguments = ["tune", "toy-llama", "--sequence-tokens", "16", "--batch-size", "4", "--device", "cpu", "--json"]
    first = f"""
import autotune.search
from fastft.plan import Trial
autotune.search.run_in_process = lambda request, **_: Trial(
    choices=request.choices, verdict="ok", step_time_ms=[1.0] * 4, tokens_per_second=64.0, peak_bytes=1)
import fastft.commands.tune
fastft.commands.gradient_gate.GradientGate.agrees = lambda *_: True
from fastft.cli import main
main({arguments!r})
"""
    second = f"""
import sys
from fastft.cli import main
try:
    main({arguments!r})
finally:
    if "torch" in sys.modules:
        sys.exit("imported torch")
"""
    made, found = [], []
    for code, outputs in ((first, made), (second, found)):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        outputs += [json.loads(done.stdout), after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime]
    assert (made[0]["cached"], found[0]["cached"]) == (False, True)
    assert made[0]["plan"] == found[0]["plan"]
    assert found[1] < 2.0
