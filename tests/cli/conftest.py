"""What the tests of the verbs share: a clean folder, a cache of its own, and the program run in this process."""

import json
import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import transformers  # noqa: F401  its log handler keeps the stderr of the first import, not a test's
from typer.testing import CliRunner

from fastft.cli import app
from fastft.config import RunConfig
from fastft.console import LOGGERS
from fastft.hardware import detect_device
from fastft.plan import Choices, Evidence, Plan, Trial
from fastft.plan_store import PlanStore
from fastft.planning import model_shape, plan_key
from fastft.plans import shipped

Cli = Callable[..., Any]


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder, an empty cache, no network, and the logging as it was before."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    loggers = [logging.getLogger(name) for name in (*LOGGERS, "bitsandbytes")]
    before = [(logger, logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield folder
    for logger, handlers, propagate, level in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def shipped_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in the place of the plans that come with fastft."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    monkeypatch.setattr(shipped, "FOLDER", folder)
    return folder


@pytest.fixture
def cli() -> Cli:
    """Runs the program; the result has exit_code, stdout and stderr."""

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def store(tmp_path: Path) -> PlanStore:
    return PlanStore(tmp_path / "cache")


def _make_plan(**changes: Any) -> Plan:
    config = RunConfig.load(**{"model": "toy-llama", "sequence_tokens": 16, "batch_size": 4, **changes})
    shape = model_shape(config)
    layers = shape.layers
    choices = Choices(
        backend="eager",
        micro_batch=config.batch_size // 2,
        accumulation=2,
        placement=["full"] * (layers - 1) + ["keep"],
    )
    stock = Choices(backend="peft", micro_batch=config.batch_size, accumulation=1, placement=["light"] * layers)
    trials = [
        Trial(choices=stock, verdict="ok", step_time_ms=[2.0] * 3, tokens_per_second=1000.0, peak_bytes=2**30),
        Trial(choices=choices, verdict="ok", step_time_ms=[1.0] * 3, tokens_per_second=2000.0, peak_bytes=2**29),
    ]
    return Plan(
        key=plan_key(config, shape, detect_device("cpu")),
        choices=choices,
        evidence=Evidence(
            trials=trials, default_tokens_per_second=1000.0, best_tokens_per_second=2000.0, seconds=12.0,
            command="fastft tune toy-llama",
            created_at=(datetime.now(UTC) - timedelta(days=3, hours=1)).isoformat(timespec="seconds"),
        ),
        model_name=config.model,
    )  # fmt: skip


@pytest.fixture
def make_plan() -> Callable[..., Plan]:
    """Makes a tuned plan, three days old, for `toy` on this machine; keywords change the run."""
    return _make_plan


@pytest.fixture
def saved_plan(store: PlanStore) -> Plan:
    """The plan of the run `toy`, in the cache."""
    plan = _make_plan()
    store.save(plan)
    return plan


@pytest.fixture
def toy() -> list[str]:
    """The arguments of the run that `saved_plan` is for."""
    return ["toy-llama", "--sequence-tokens", "16", "--batch-size", "4"]


@pytest.fixture
def rows(work: Path) -> Path:
    """A small data file."""
    path = work / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"instruction": f"{n} + 1", "output": f"#### {n + 1}"}) + "\n" for n in range(8))
    )
    return path
