"""`fastft train`, for real, on the embedded model."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastft.plan import Plan
from fastft.plan_store import PlanStore

Cli = Callable[..., Any]

RUN = ["--device", "cpu", "--batch-size", "2", "--sequence-tokens", "64", "--steps", "2", "--rank", "4"]


def test_without_a_plan_the_default_is_followed_and_the_command_to_tune_is_named(
    cli: Cli, rows: Path, work: Path
) -> None:
    result = cli("train", *RUN, "--data", rows.name, "--output", "adapter")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines()[0] == (
        "no plan for this run yet: default eager, 2×1 sequences, placement 4×light; find a faster one once: "
        "fastft tune tiny --sequence-tokens 64 --batch-size 2 --device cpu --rank 4"
    )
    (line,) = result.stdout.splitlines()
    assert re.fullmatch(r"adapter saved to adapter: 2 steps, loss [\d.]+, [\d,]+ tokens/s, peak [\d.]+ GiB", line)
    assert {path.name for path in work.iterdir()} == {"rows.jsonl", "adapter"}

    from peft import PeftConfig
    from safetensors.torch import load_file

    assert PeftConfig.from_pretrained(work / "adapter").r == 4
    moved = load_file(work / "adapter" / "adapter_model.safetensors")
    assert all(tensor.abs().sum() > 0 for name, tensor in moved.items() if "lora_B" in name)


def test_a_cached_plan_is_followed_and_named(
    cli: Cli, rows: Path, make_plan: Callable[..., Plan], store: PlanStore
) -> None:
    plan = make_plan(model="tiny", batch_size=2, sequence_tokens=64, rank=4)
    assert plan.choices.accumulation == 2  # not what the default would do
    store.save(plan)
    result = cli("train", *RUN, "--data", rows.name, "--output", "adapter", "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines()[0] == (
        f"plan {plan.id}: eager, 1×2 sequences, placement 3×full + 1×keep; tuned 3 days ago at 2,000 tokens/s "
        "(default 1,000)"
    )
    answer = json.loads(result.stdout)
    assert (answer["plan_id"], answer["steps"], answer["output"]) == (plan.id, 2, "adapter")
    assert answer["loss"] > 0
    assert answer["tokens_per_second"] > 0
    assert answer["peak_bytes"] > 2**20
    assert answer["allocator_retries"] == 0


def test_flags_win_over_the_file(cli: Cli, monkeypatch: pytest.MonkeyPatch, work: Path) -> None:
    from fastft.commands import train as verb
    from fastft.errors import MeasureError

    seen: list[Any] = []

    def stop(config: Any) -> None:
        seen.append(config)
        raise MeasureError("stopped")

    monkeypatch.setattr(verb, "train_quietly", stop)
    (work / "run.toml").write_text('model = "toy-llama"\nsteps = 3\npacking = true\n[lora]\nrank = 8\nalpha = 32\n')
    cli("train", "run.toml", "--rank", "4", "--no-packing", "--targets", "q_proj, v_proj", "--learning-rate", "1e-3")
    (config,) = seen
    assert (config.model, config.steps, config.packing, config.learning_rate) == ("toy-llama", 3, False, 1e-3)
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (4, 32, ("q_proj", "v_proj"))


def test_an_interrupted_training_says_what_is_kept(
    cli: Cli, rows: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(config: Any, **_: Any) -> None:
        for step in checkpoints:
            (Path(config.output) / f"checkpoint-{step}").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("fastft.training.trainer.train", interrupted)
    checkpoints: list[int] = []
    result = cli("train", "--output", "adapter")
    assert result.exit_code == 130
    assert result.stderr == "interrupted; no checkpoint was saved yet (--save-steps saves some)\n"
    checkpoints += [10, 20]
    result = cli("train", "--output", "adapter")
    assert result.exit_code == 130
    assert result.stderr == "interrupted; 2 checkpoints are kept in adapter; go on with --resume\n"


def test_an_unexpected_error_is_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch, work: Path) -> None:
    def broken(*_: Any, **__: Any) -> None:
        print("a library prints to stdout")
        raise IndexError("list index out of range")

    monkeypatch.setattr("fastft.training.trainer.train", broken)
    result = cli("train")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1] == (
        "error: unexpected IndexError: list index out of range; fix: run again with --debug and report the traceback"
    )
    assert "Traceback" not in result.stderr
    assert "Traceback" in cli("train", "--debug").stderr
