"""The real loop against the plain one, on the embedded model."""

import json

import pytest

from bench.loop import LOOP, Loops, compare_loops
from fastft.config import RunConfig
from fastft.errors import ConfigError, OutputError

STEPS, WARMUP = 5, 2


def config(**more):
    run = {"model": "tiny", "batch_size": 4, "sequence_tokens": 128, "steps": STEPS, "log_steps": 2, "device": "cpu"}
    return RunConfig(**{**run, **more})


@pytest.mark.parametrize("packing", [False, True])
def test_both_loops_are_timed_over_the_same_steps(tmp_path, packing):
    said = []
    result = compare_loops(config(packing=packing, save_steps=4), tmp_path / "out", warmup=WARMUP, say=said.append)
    assert Loops.model_validate_json((tmp_path / "out" / LOOP).read_text()) == result
    for timed in (result.plain, result.trained):
        assert len(timed.step_ms) == STEPS - WARMUP
        assert sum(timed.step_ms) == pytest.approx(1e3 * timed.seconds)
        assert timed.tokens > 0
    # The rows are drawn in another order, so as many of them have about as many tokens.
    assert result.trained.tokens == pytest.approx(result.plain.tokens, rel=0.2)
    ratio = result.plain.tokens_per_second / result.trained.tokens_per_second
    assert result.overhead == pytest.approx(ratio - 1)
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "out" / "adapter" / "checkpoint-4").is_dir()
    assert len(said) == 3
    assert json.loads((tmp_path / "out" / LOOP).read_text())["choices"] == result.choices


def test_bad_input(tmp_path):
    with pytest.raises(ConfigError, match="too few steps; got 3; allowed: 4 and more"):
        compare_loops(config(steps=3), tmp_path, warmup=2, say=print)
    (tmp_path / "old").write_text("")
    with pytest.raises(OutputError, match="not empty"):
        compare_loops(config(), tmp_path, warmup=2, say=print)
