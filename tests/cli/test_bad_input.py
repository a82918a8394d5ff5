"""Bad input: one exact line on stderr, the class's exit code, no traceback, and nothing written."""

import errno
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bench.arms import ARMS
from fastft.models import shapes
from fastft.plan import Plan
from fastft.plan_store import PlanStore

Cli = Callable[..., Any]

ROW = '{"instruction": "1 + 1", "output": "#### 2"}\n'
GPT2 = json.dumps({"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 32})
SHAPES = ", ".join(sorted([*shapes.SHAPES, "tiny"]))
SCENARIOS = (
    "embedded, embedded-quick, llama-3-8b, llama-3-8b-long, llama-3-8b-nf4, llama-3-8b-short, qwen2-1.5b, "
    "qwen2-1.5b-small-batch"
)
FORMATS = (
    '{"instruction": …, "input": … (optional), "output": …}, {"messages": [{"role": …, "content": …}]}, '
    '{"conversations": [{"from": …, "value": …}]}, {"question": …, "answer": …}'
)


@dataclass(frozen=True)
class Case:
    """A command line, the files it meets, and what it must say."""

    line: str
    code: int
    says: str
    files: dict[str, str | bytes] = field(default_factory=dict)


CASES = {
    "unknown verb": Case("trian", 2, "no such command 'trian'; fix: did you mean 'train'?"),
    "unknown flag": Case("train --rnk 3", 2, "no such option: --rnk; fix: did you mean --rank?"),
    "no argument": Case("bench", 2, "missing argument 'SCENARIO'; fix: see `fastft bench --help`"),
    "missing config": Case(
        "train nope.toml", 2,
        "cannot read the configuration nope.toml; got No such file or directory; fix: check the path",
    ),
    "malformed TOML": Case(
        "train run.toml", 2,
        "run.toml is not TOML; got Invalid value (at line 1, column 9); fix: correct the line it names",
        {"run.toml": "model = tiny\n"},
    ),
    "unreadable encoding": Case(
        "train run.toml", 2,
        "run.toml is not TOML; got 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte; "
        "fix: correct the line it names",
        {"run.toml": b"\xff\xfem\x00"},
    ),
    "micro-batch": Case(
        "train --batch-size 16 --micro-batch 5", 2,
        "micro_batch does not divide batch_size; got batch_size 16, micro_batch 5; "
        "fix: choose a divisor, so that every optimizer step sees the same global batch",
    ),
    "bad memory cap": Case(
        "tune tiny --memory-cap lots", 2,
        "memory_cap is not a size; got lots; allowed: a number with B, KB, MB, GB, KiB, MiB or GiB; "
        "fix: write it like 7.8GiB",
    ),
    "no model": Case(
        "tune", 2,
        f"tune needs one model; got none; allowed: tiny, {', '.join(shapes.SHAPES)}, a local folder, "
        "a hub name (owner/name); "
        "fix: write it like `fastft tune tiny`",
    ),
    "unknown model": Case(
        "train --model tinny", 4,
        f"model is unknown; got tinny; allowed: a hub name (owner/name), a local folder, {SHAPES}; "
        "fix: did you mean 'tiny'?",
    ),
    "shape without a tokenizer": Case(
        "train --model toy-llama --steps 1", 4,
        "a shipped shape has random weights and no tokenizer, so it cannot be fine-tuned; got toy-llama; "
        "fix: give a model folder or a hub name; shapes are for tune and bench",
    ),
    "unsupported family, triton": Case(
        "tune gpt --device cpu", 4,
        f"plans are for supported model types only; got gpt2; allowed: {', '.join(shapes.SUPPORTED_FAMILIES)}; "
        "fix: train it with --backend peft --plan none",
        {"gpt/config.json": GPT2},
    ),
    "unsupported family, eager": Case(
        "train --model gpt --backend eager", 4,
        f"plans are for supported model types only; got gpt2; allowed: {', '.join(shapes.SUPPORTED_FAMILIES)}; "
        "fix: train it with --backend peft --plan none",
        {"gpt/config.json": GPT2},
    ),
    "missing data": Case(
        "train --data nope.jsonl --steps 1", 3,
        "cannot read the data file nope.jsonl; got No such file or directory; allowed: a JSONL or JSON file; "
        "fix: check the path",
    ),
    "malformed row": Case(
        "train --data rows.jsonl --steps 1", 3,
        "rows.jsonl:2 is not JSON; got Expecting ',' delimiter at column 25; "
        "allowed: one JSON object a line, or one JSON list; fix: correct or remove the line",
        {"rows.jsonl": ROW + '{"instruction": "1 + 1" "output": "2"}\n'},
    ),
    "row without an answer": Case(
        "train --data rows.jsonl --steps 1", 3,
        "rows.jsonl:2 has no 'output'; got keys instruction; "
        'allowed: {"instruction": …, "input": … (optional), "output": …}; fix: add the key or remove the row',
        {"rows.jsonl": ROW + '{"instruction": "1 + 1"}\n'},
    ),
    "row of no known format": Case(
        "train --data rows.jsonl --steps 1", 3,
        f"rows.jsonl:1 has no known format; got keys prompt; allowed: {FORMATS}; fix: convert the rows to one format",
        {"rows.jsonl": '{"prompt": "1 + 1"}\n'},
    ),
    "nothing left to train on": Case(
        "train --data rows.jsonl --steps 1 --sequence-tokens 8", 3,
        "every answer begins after token 8, the first in rows.jsonl:1; got 1 samples, none with a label left; "
        "fix: raise sequence_tokens",
        {"rows.jsonl": ROW},
    ),
    "no GPU": Case(
        "train --device cuda", 5,
        "device cuda is not available; got torch is absent or a CPU build; "
        "allowed: an NVIDIA GPU, its driver and a CUDA build of torch; "
        "fix: use --device cpu, or install what is missing",
    ),
    "corrupt plan file": Case(
        "train --plan plan.json", 6,
        "plan plan.json is not JSON; got Expecting value: line 1 column 1 (char 0); "
        "fix: remove it and run `fastft tune` again",
        {"plan.json": "plan"},
    ),
    "plan of another version": Case(
        "plan import plan.json", 6,
        "plan plan.json has another schema; got 99; allowed: 1; "
        "fix: use the fastft that wrote it, or run `fastft tune` again",
        {"plan.json": '{"schema_version": 99}'},
    ),
    "unknown plan": Case(
        "plan show 0123", 6, "no plan has this id; got 0123; allowed: none is stored; fix: run `fastft tune` first"
    ),
    "prune of nothing": Case(
        "plan prune", 2,
        "prune needs to know what to remove; got neither; allowed: --older-than DAYS, --stale; fix: name one",
    ),
    "output folder in use": Case(
        "train --output taken --steps 1", 7,
        "the output folder is not empty; got taken; allowed: a new or empty folder; "
        "fix: choose another folder or remove this one; nothing was overwritten",
        {"taken/adapter_model.safetensors": "precious"},
    ),
    "output folder is a file": Case(
        "train --output taken --steps 1", 7, "the output folder is a file; got taken; fix: choose another folder",
        {"taken": "precious"},
    ),
    "nothing to resume": Case(
        "train --output taken --resume", 7,
        "there is nothing to resume from; got taken; allowed: a folder with checkpoint-* in it; "
        "fix: train once with --save-steps, or drop --resume",
        {"taken/adapter_model.safetensors": "precious"},
    ),
    "unknown scenario": Case(
        "bench embeded", 2,
        f"scenario is unknown; got embeded; allowed: {SCENARIOS}; fix: did you mean 'embedded'?",
    ),
    "unknown arm": Case(
        "bench embedded --arms peft,eagr", 2,
        f"arm is unknown; got eagr; allowed: {', '.join(sorted(ARMS))}; fix: did you mean 'eager'?",
    ),
    "arm that cannot run": Case(
        "bench embedded --arms peft,triton --device cpu", 5, "backend triton needs a CUDA GPU; got device {cpu}; "
        "allowed: eager, peft or auto here; fix: use --backend eager",
    ),
    "bench folder in use": Case(
        "bench embedded --output taken", 7,
        "the bench folder is not empty; got taken; allowed: a new or empty folder; "
        "fix: choose another folder or remove this one; nothing was overwritten",
        {"taken/records.jsonl": "precious"},
    ),
    "bench of an unknown model": Case(
        "bench embedded --model tinny", 4,
        f"model is unknown; got tinny; allowed: a hub name (owner/name), a local folder, {SHAPES}; "
        "fix: did you mean 'tiny'?",
    ),
    "bench of missing data": Case(
        "bench embedded-quick --data nope.jsonl", 3,
        "cannot read the data file nope.jsonl; got No such file or directory; allowed: a JSONL or JSON file; "
        "fix: check the path",
    ),
    "report of nothing": Case(
        "report runs", 3,
        "no records found; got runs; allowed: a .jsonl file of records or a folder with some; "
        "fix: run `fastft bench SCENARIO` first",
        {"runs/notes.txt": "none"},
    ),
    "report of garbage": Case(
        "report runs", 3,
        "runs/records.jsonl:1 is not JSON; got Expecting value; fix: remove the line or run the bench again",
        {"runs/records.jsonl": "garbage\n"},
    ),
    "report of other records": Case(
        "report runs", 3,
        "runs/records.jsonl:1 is not a record of this version; got schema_version 0; allowed: 1; "
        "fix: make the report with the fastft that wrote the records",
        {"runs/records.jsonl": '{"schema_version": 0}\n'},
    ),
    "impatient demo": Case(
        "demo --minutes 0", 2, "--minutes is not valid; got 0.0; allowed: 1 and more; fix: take 6"
    ),
    "unknown effort": Case(
        "tune toy-llama --effort fast", 2,
        "effort is unknown; got fast; allowed: exhaustive, full, quick; fix: choose one of exhaustive, full, quick",
    ),
}  # fmt: skip


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _error_of(result: Any) -> str:
    """The last line of stderr, which has to be the only error."""
    assert "Traceback" not in result.stderr + result.stdout
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert result.stderr.splitlines()[-1] == errors[0]
    return str(errors[0].removeprefix("error: "))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_one_exact_line_and_nothing_written(case: Case, cli: Cli, work: Path, store: PlanStore) -> None:
    from fastft.hardware import detect_device

    if detect_device().kind == "cuda" and "torch is absent" in case.says:
        pytest.skip("there is a GPU")
    for name, content in case.files.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = _files(work)
    result = cli(*case.line.split())
    assert _error_of(result) == case.says.replace("{cpu}", detect_device("cpu").name)
    assert result.exit_code == case.code
    assert result.stdout == ""
    assert _files(work) == before
    assert {path.name for path in work.iterdir()} == {name.partition("/")[0] for name in case.files}
    assert list(store.folder.glob("*.json")) == []


@pytest.mark.parametrize(
    ("flags", "start"),
    [
        ("--backend tritn", "backend is"),
        ("--placement ful", "placement is"),
        ("--rank 0", "lora.rank is not valid; got 0; allowed: "),
        ("--rank four", "lora.rank is not valid; got four; allowed: "),
        ("--targets ,", "lora.targets is not valid; got (); allowed: names no module"),
        ("--learning-rate 0", "learning_rate is not valid; got 0; allowed: "),
        ("--dtype int4", "dtype is"),
    ],
)
def test_values_out_of_range_name_the_key_and_what_is_allowed(flags: str, start: str, cli: Cli, work: Path) -> None:
    result = cli("train", *flags.split())
    says = _error_of(result)
    assert says.startswith(start)
    assert f"got {flags.split()[1]};" in says or "got ()" in says
    assert "allowed: " in says
    assert "; fix: " in says
    assert result.exit_code == 2
    assert list(work.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [("rnk = 3", "key 'rnk' is unknown; got rnk; "), ("[lora]\nrnk = 3", "key 'lora.rnk' is unknown; ")],
)
def test_an_unknown_key_of_the_file_is_refused(text: str, says: str, cli: Cli, work: Path) -> None:
    (work / "run.toml").write_text(text)
    result = cli("train", "run.toml")
    assert _error_of(result).startswith(says)
    assert result.exit_code == 2


def test_an_unknown_key_gets_a_suggestion(cli: Cli, work: Path) -> None:
    (work / "run.toml").write_text("learning_rat = 1e-4")
    assert _error_of(cli("train", "run.toml")).endswith("fix: did you mean 'learning_rate'?")


def test_a_folder_that_is_no_model(cli: Cli, work: Path) -> None:
    (work / "empty").mkdir()
    result = cli("train", "--model", "empty")
    assert _error_of(result).startswith("cannot read model empty; got ")
    assert _error_of(result).endswith("; fix: check the folder's config.json")
    assert result.exit_code == 4
    assert [path.name for path in work.iterdir()] == ["empty"]


def test_triton_needs_a_gpu(cli: Cli, work: Path) -> None:
    from fastft.hardware import detect_device

    result = cli("train", "--backend", "triton", "--device", "cpu")
    assert _error_of(result) == (
        f"backend triton needs a CUDA GPU; got device {detect_device('cpu').name}; "
        "allowed: eager, peft or auto here; fix: use --backend eager"
    )
    assert result.exit_code == 5
    assert list(work.iterdir()) == []


def test_a_foreign_plan_names_the_fields(cli: Cli, work: Path, make_plan: Callable[..., Plan]) -> None:
    plan = make_plan(rank=8, model="tiny", sequence_tokens=16)
    (work / "plan.json").write_text(plan.to_json())
    result = cli("train", "--plan", "plan.json", "--batch-size", "4", "--sequence-tokens", "32", "--device", "cpu")
    assert _error_of(result) == (
        f"plan {plan.id} is for another run; got lora_rank: plan 8, this run 16; "
        "sequence_tokens: plan 16, this run 32; "
        "fix: tune this run: fastft tune tiny --sequence-tokens 32 --batch-size 4 --device cpu"
    )
    assert result.exit_code == 6
    assert [path.name for path in work.iterdir()] == ["plan.json"]


def test_a_changed_plan_is_refused(cli: Cli, work: Path, make_plan: Callable[..., Plan], store: PlanStore) -> None:
    (work / "plan.json").write_text(make_plan().to_json().replace('"micro_batch":2', '"micro_batch":4'))
    result = cli("plan", "import", "plan.json")
    assert _error_of(result) == (
        "plan plan.json was changed or cut off; got a wrong checksum; fix: remove it and run `fastft tune` again"
    )
    assert result.exit_code == 6
    assert not store.folder.exists()


def test_an_ambiguous_id_lists_the_plans(cli: Cli, make_plan: Callable[..., Plan], store: PlanStore) -> None:
    plans = [make_plan(rank=rank) for rank in range(1, 18)]  # 17 keys and 16 first digits
    for plan in plans:
        store.save(plan)
    digits = [plan.id[0] for plan in plans]
    twice = next(digit for digit in digits if digits.count(digit) > 1)
    result = cli("plan", "show", twice)
    says = _error_of(result)
    assert says.startswith(f"several plans start with this id; got {twice}; allowed: {twice}")
    assert says.endswith("; fix: type more of it")
    assert all((plan.id in says) == plan.id.startswith(twice) for plan in plans)
    assert result.exit_code == 6


def test_an_export_overwrites_nothing(cli: Cli, work: Path, saved_plan: Plan) -> None:
    (work / "mine.json").write_text("precious")
    result = cli("plan", "export", saved_plan.id, "mine.json")
    assert _error_of(result) == "the file exists already; got mine.json; fix: choose another name, or use --force"
    assert result.exit_code == 7
    assert (work / "mine.json").read_text() == "precious"


def test_a_full_disk_leaves_nothing_behind(
    cli: Cli, work: Path, saved_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fastft.files.os.fsync", full)
    result = cli("plan", "export", saved_plan.id, "mine.json")
    assert _error_of(result) == (
        "cannot write mine.json; got No space left on device; "
        "fix: free some space or choose a folder that you may write to"
    )
    assert result.exit_code == 7
    assert list(work.iterdir()) == []
