"""`fastft train --method`, for real, on the embedded model: each method, what it saves, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from fastft.config import RunConfig
from fastft.training.methods import METHODS, method_named

Cli = Callable[..., Any]

TRL = ("dpo", "orpo", "kto", "reward", "grpo", "rloo")
RUN = ["--device", "cpu", "--batch-size", "4", "--seq-len", "32", "--rank", "4", "--log-steps", "1", "--plan", "none"]
CHAT = {"role": "user", "content": "1 + 1"}
ROWS: dict[str, dict[str, Any]] = {
    "dpo": {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"},
    "kto": {"prompt": "1 + 1 =", "completion": " 2", "label": True},
    "grpo": {"prompt": "1 + 1 =", "answer": 2},
}
REWARDS = """
def digits(completions, **_):
    return [float(sum(letter.isdigit() for letter in str(text))) for text in completions]

def right(completions, answer, **_):
    return [float(str(a) in str(text)) for a, text in zip(answer, completions)]

def varied(completions, **_):
    return [sum(map(ord, str(text))) / 1000 for text in completions]

def too_few(completions, **_):
    return [1.0]
"""


def write(name: str, *rows: dict[str, Any]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


@pytest.fixture(autouse=True)
def rewards(work: Path) -> None:
    (work / "rewards.py").write_text(REWARDS)


def test_the_table_has_a_row_for_each_method_that_a_run_can_name() -> None:
    named = get_args(RunConfig.model_fields["method"].annotation)
    assert tuple(METHODS) == named
    for name in named:
        method = method_named(name)
        assert method.name == name
        assert method.measures
        assert method.takes_rewards == (name in ("grpo", "rloo", "ppo"))
    assert method_named(RunConfig().method).learning_rate == RunConfig().learning_rate


@pytest.mark.parametrize(
    "method",
    [*TRL, "ppo"],
)
def test_a_method_trains_the_embedded_rows_fused_and_saves_pefts_files(method: str, cli: Cli, work: Path) -> None:
    groups = ["--settings", "num_generations=2"] if method in ("grpo", "rloo") else []
    # In two steps all answers to a prompt may be right, or all wrong: then there is nothing to learn.
    groups += ["--reward", "rewards.py:varied"] if method in ("grpo", "rloo", "ppo") else []
    result = cli("train", "--method", method, *RUN, "--steps", "2", "--learning-rate", "1e-3", "--output", "adapter",
                 "--json", *groups)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert (answer["steps"], answer["measure"]) == (2, None)
    assert (answer["tokens_per_second"] > 0) == (method != "ppo")  # it counts no tokens
    assert "4× decoder_layer: fused (eager)" in result.stderr
    assert "stock" not in result.stderr

    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
    from safetensors.torch import load_file

    tensors = load_file(work / "adapter" / "adapter_model.safetensors")
    assert any("lora_B" in name and tensor.abs().sum() > 0 for name, tensor in tensors.items())
    assert ("base_model.model.score.weight" in tensors) == (method == "reward")
    kind = AutoPeftModelForSequenceClassification if method == "reward" else AutoPeftModelForCausalLM
    loaded = kind.from_pretrained(work / "adapter", **({"num_labels": 1} if method == "reward" else {}))
    assert list(loaded.peft_config) == ["default"]
    facts = json.loads((work / "adapter" / "fastft.json").read_text())
    assert facts["config"]["method"] == method
    assert facts["config"]["learning_rate"] == 1e-3
    assert {path.name for path in work.iterdir()} == {"adapter", "rewards.py"}


def test_held_out_rows_are_measured_after_training(cli: Cli, work: Path) -> None:
    file = write("held.jsonl", *[ROWS["dpo"]] * 4)
    flags = ["--steps", "1", "--eval-data", file, "--json"]
    result = cli("train", "--method", "dpo", *RUN, *flags, "--output", "a")
    assert result.exit_code == 0, result.stderr
    assert set(json.loads(result.stdout)["measure"]) == {"rewards/accuracies", "rewards/margins"}
    assert "4096 rows with prompt, chosen, rejected; 4 held out" in result.stderr
    assert json.loads(result.stdout)["message"].count("held out: rewards/accuracies ") == 1
    write("sft.jsonl", {"question": "1 + 1", "answer": "2"})
    result = cli(
        "train", *RUN, "--steps", "1", "--data", "sft.jsonl", "--eval-data", "sft.jsonl", "--json", "--output", "b"
    )
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["measure"]["loss"] > 0


def test_conversations_extra_columns_and_several_rewards(cli: Cli, work: Path) -> None:
    file = write("rows.jsonl", *[{"prompt": [CHAT], "answer": 2, "level": level} for level in (1, 2, None, 4)])
    (work / "run.toml").write_text(
        f'method = "grpo"\ndata = "{file}"\nreward = ["rewards.py:digits", "rewards.py:right"]\n'
        "[settings]\nnum_generations = 2\nmax_completion_length = 4\nreward_weights = [0.5, 2.0]\n"
    )
    result = cli("train", "run.toml", *RUN, "--steps", "1", "--settings", "max_completion_length=3", "--output", "a")
    assert result.exit_code == 0, result.stderr
    assert "'rewards/digits/mean'" in result.stderr
    assert "'rewards/right/mean'" in result.stderr
    assert "'completions/max_length': '3'" in result.stderr
    assert "4 rows with prompt, answer, level" in result.stderr


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(cli: Cli, work: Path) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file

    flags = ["--method", "dpo", *RUN, "--steps", "4", "--save-steps", "2", "--learning-rate", "1e-3"]
    assert cli("train", *flags, "--output", "whole").exit_code == 0
    shutil.copytree(work / "whole" / "checkpoint-2", work / "resumed" / "checkpoint-2")
    result = cli("train", *flags, "--output", "resumed", "--resume")
    assert result.exit_code == 0, result.stderr
    whole, resumed = (load_file(work / name / "adapter_model.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert json.loads((work / "whole" / "checkpoint-2" / "fastft.json").read_text())["config"]["method"] == "dpo"


def test_the_seed_decides_a_reward_models_new_head(cli: Cli, work: Path) -> None:
    import torch
    from safetensors.torch import load_file

    flags = ["--method", "reward", *RUN, "--steps", "1"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(ord(name))
        assert cli("train", *flags, "--seed", seed, "--output", name).exit_code == 0
    a, b, c = (load_file(work / name / "adapter_model.safetensors")["base_model.model.score.weight"] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_the_plan_is_for_as_many_sequences_as_a_step_has(cli: Cli, work: Path) -> None:
    """A preference is two sequences, and micro-batches are of whole preferences."""
    flags = ["--method", "dpo", "--device", "cpu", "--seq-len", "32", "--rank", "4", "--steps", "1", "--output", "a"]
    result = cli("train", *flags, "--batch-size", "4", "--micro-batch", "2")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.startswith("no plan for this run yet: default eager, 4×2 sequences")
    assert "fastft tune tiny --sequence-tokens 32 --batch-size 8" in result.stderr
    assert json.loads((work / "a" / "fastft.json").read_text())["choices"]["micro_batch"] == 4
    assert json.loads((work / "a" / "fastft.json").read_text())["config"]["batch_size"] == 4


def test_stock_trains_what_the_engine_trains(cli: Cli, work: Path) -> None:
    """Backend peft, with and without checkpointing, is the judge."""
    from safetensors.torch import load_file

    flags = ["--method", "dpo", *RUN, "--steps", "3", "--learning-rate", "1e-3"]
    for name, more in {"fused": [], "stock": ["--backend", "peft"],
                       "full": ["--backend", "peft", "--placement", "full"]}.items():  # fmt: skip
        result = cli("train", *flags, *more, "--output", name)
        assert result.exit_code == 0, result.stderr
        assert ("fused" in result.stderr) == (name == "fused")
    fused, stock, full = (load_file(work / name / "adapter_model.safetensors") for name in ("fused", "stock", "full"))
    assert fused.keys() == stock.keys() == full.keys()
    for name in stock:
        # Adam's steps are of the learning rate's size, so an element that is all rounding may differ by one.
        for other in (fused, full):
            apart = (other[name] - stock[name]).abs()
            assert (apart > 1e-4).double().mean() < 1e-2, name


CASES: dict[str, tuple[list[str], int, str]] = {
    "unknown method": (["--method", "dop"], 2, "method is not valid; got dop; allowed: 'sft', 'dpo'"),
    "unknown setting": (
        ["--method", "dpo", "--settings", "bta=0.1"], 2, "key 'settings.bta' is unknown; got bta; .*did you mean 'beta'"
    ),
    "a setting's value": (
        ["--method", "dpo", "--settings", "beta=-1"], 2, "settings.beta is not valid; got -1; allowed: .*greater than 0"
    ),
    "a setting's name": (
        ["--method", "dpo", "--settings", "loss_type=idpo"], 2, "settings.loss_type.* is not valid; got idpo"
    ),
    "no setting": (["--method", "dpo", "--settings", "beta"], 2, "a setting is not NAME=VALUE; got beta"),
    "settings of sft": (["--settings", "beta=1"], 2, "method sft has no settings of its own; got beta"),
    "reward of dpo": (
        ["--method", "dpo", "--reward", "rewards.py:digits"], 2, "method dpo takes no reward function"
    ),
    "packing": (["--method", "dpo", "--packing"], 2, "packing is for method sft; got packing = true with method dpo"),
    "labels": (["--method", "kto", "--no-response-only"], 2, "response_only is for method sft"),
    "no reward": (
        ["--method", "grpo", "--data", "grpo.jsonl"], 2, "method grpo needs a reward function; got none"
    ),
    "missing reward file": (["--method", "rloo", "--reward", "no.py:f"], 2, "there is no reward file no.py"),
    "missing reward": (["--method", "rloo", "--reward", "rewards.py:digit"], 2, "rewards.py has no 'digit'"),
    "too few rewards": (
        ["--method", "grpo", "--reward", "rewards.py:too_few", "--settings", "num_generations=2", "--steps", "1"], 3,
        "reward rewards.py:too_few returned 1 rewards for 4 completions",
    ),
    "weights": (
        ["--method", "grpo", "--settings", "num_generations=2", "--settings", "reward_weights=[1.0, 2.0]"], 2,
        "reward_weights are not one for each reward; got 2; allowed: 1",
    ),
    "groups": (
        ["--method", "grpo"], 2,
        "num_generations does not divide batch_size, which counts completions; got batch_size 4, num_generations 8",
    ),
    "no room": (
        ["--method", "grpo", "--settings", "max_completion_length=30", "--settings", "num_generations=2"], 3,
        "embedded train:1: prompt and completion have no room in sequence_tokens; got a prompt of",
    ),
    "rows of another method": (
        ["--method", "dpo", "--data", "kto.jsonl"], 3, "kto.jsonl:1 has no 'chosen'; got columns prompt, completion"
    ),
    "rows for sft": (["--method", "sft", "--data", "dpo.jsonl"], 3, "dpo.jsonl:1 has no known format"),
    "held-out rows": (["--method", "kto", "--eval-data", "dpo.jsonl"], 3, "dpo.jsonl:1 has no 'completion'"),
    "one row at a time": (
        ["--method", "kto", "--micro-batch", "1"], 2,
        "method kto compares the rows of a micro-batch, so it needs 2; got batch_size 4, micro_batch 1",
    ),
    "what TRL refuses": (
        ["--method", "dpo", "--settings", 'loss_type="exo_pair"'], 2, "DPOTrainer refuses this run; got Label smoothing"
    ),
    "a shape": (["--method", "dpo", "--model", "toy-llama"], 4, "a shipped shape has random weights and no tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize(("flags", "code", "message"), CASES.values(), ids=CASES)
def test_what_a_method_cannot_do_is_one_line(flags: list[str], code: int, message: str, cli: Cli, work: Path) -> None:
    import re

    for name, row in ROWS.items():
        write(f"{name}.jsonl", row, row, row, row)
    before = {path.name for path in work.iterdir()}
    result = cli("train", *RUN, *flags)
    assert result.exit_code == code, result.stderr
    last = result.stderr.splitlines()[-1]
    assert re.match(rf"error: {message}", last), last
    assert "Traceback" not in result.stderr
    assert {path.name for path in work.iterdir()} == before
