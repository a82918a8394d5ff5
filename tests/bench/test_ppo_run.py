"""PPO, timed: fastft's arm.  TRL's arms need a release that fastft does not run with, so they are refused here."""

import json

import pytest

from bench.ppo_run import main

SMALL = [
    "--model", "tiny", "--batch", "2", "--prompt", "6", "--answer", "5", "--epochs", "1", "--updates", "3",
    "--warmup", "1", "--device", "cpu",
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "checkpointing"), [("float32", "on"), ("bfloat16", "off")])
def test_fastfts_arm_is_measured(dtype, checkpointing, capsys):
    main([*SMALL, "--arm", "fastft", "--dtype", dtype, "--checkpointing", checkpointing, "--mini-batches", "2"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["arm"], result["dtype"], result["checkpointing"]) == ("fastft", dtype, checkpointing)
    assert result["updates_counted"] == 2
    assert result["update_milliseconds"] > 0
    assert result["rollout_milliseconds"] > 0
    assert result["peak_bytes"] is None
    assert all("stock" not in path for path in result["ledger"])
    first, last = result["first_metrics"], result["last_metrics"]
    assert first["objective/kl"] == 0
    assert first["val/ratio"] == pytest.approx(1, abs=0.05)
    assert (first["episode"], last["episode"]) == (2, 6)
    assert last["val/num_eos_tokens"] == 0


@pytest.mark.parametrize("arm", ["trl", "trl-lean"])
def test_trls_arms_are_refused_with_another_release(arm, capsys):
    with pytest.raises(SystemExit, match=r"needs TRL 1\.10"):
        main([*SMALL, "--arm", arm])
    assert not capsys.readouterr().out


def test_something_has_to_be_counted(capsys):
    with pytest.raises(SystemExit):
        main([*SMALL, "--arm", "fastft", "--warmup", "3"])
    assert "no updates to count" in capsys.readouterr().err
