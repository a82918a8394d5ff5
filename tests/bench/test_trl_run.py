"""TRL's trainers, timed: both arms do the same work."""

import json

import pytest

from bench.trl_run import METHODS, main

SMALL = ["--model", "tiny", "--batch", "2", "--tokens", "24", "--steps", "3", "--warmup", "1", "--device", "cpu"]


def run(capsys: pytest.CaptureFixture[str], *more: str) -> dict:
    capsys.readouterr()
    main([*SMALL, *more])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("method", METHODS)
def test_both_arms_train_on_the_same_rows(method, capsys):
    stock, fast = (run(capsys, "--method", method, "--arm", arm) for arm in ("stock", "fastft"))
    assert fast["first_losses"] == pytest.approx(stock["first_losses"], rel=1e-3, abs=1e-4)
    assert stock["ledger"] is None
    assert all("stock" not in path for path in fast["ledger"])
    for result in (stock, fast):
        assert result["steps_counted"] == 2
        assert result["milliseconds"] > 0


def test_a_notebooks_model(capsys):
    asked = ["--method", "sft", "--loader", "notebook", "--arm", "fastft"]
    whole, capped = run(capsys, *asked), run(capsys, *asked, "--memory-cap", "1GiB", "--optimizer", "adamw_torch")
    assert capped["first_losses"] == pytest.approx(whole["first_losses"], rel=1e-3)
    assert all("stock" not in path for path in [*whole["ledger"], *capped["ledger"]])


@pytest.mark.parametrize(
    "asked",
    [["--arm", "stock", "--loader", "notebook"], ["--arm", "unsloth"], ["--arm", "fastft", "--memory-cap", "1"]],
)
def test_what_does_not_go_together_is_refused(asked, capsys):
    with pytest.raises(SystemExit):
        main([*SMALL, "--method", "sft", *asked])
    assert "notebook" in capsys.readouterr().err


@pytest.mark.parametrize("adapter", ["dora", "adalora"])
def test_other_adapters(adapter, capsys):
    arms = ("stock", "fastft")
    stock, fast = (run(capsys, "--method", "sft", "--adapter", adapter, "--steps", "5", "--arm", arm) for arm in arms)
    assert fast["first_losses"] == pytest.approx(stock["first_losses"], rel=1e-3)
    assert fast["last_losses"] == pytest.approx(stock["last_losses"], rel=1e-3)
    assert all("stock" not in path for path in fast["ledger"])
