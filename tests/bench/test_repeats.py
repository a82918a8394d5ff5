"""Repeated tunings: what counts as the same choice; the tuner itself is tested where it stands."""

import json

import pytest

from bench import repeats as module
from bench.repeats import REPEATS, judge_repeats, repeat_tuning
from bench.trials import Deadline
from devices import GPU
from fastft.config import RunConfig
from fastft.hardware import detect_device
from fastft.plan import Choices, Evidence, Plan, Trial
from fastft.planning import model_shape, plan_key

CONFIG = RunConfig(model="toy-llama", batch_size=4, sequence_tokens=16, device="cpu")
KEY = plan_key(CONFIG, model_shape(CONFIG), detect_device("cpu"))
STEP_TOKENS = 4 * 16


def choices(micro_batch: int) -> Choices:
    return Choices(backend="eager", micro_batch=micro_batch, accumulation=4 // micro_batch, placement=["light"] * 3)


def plan(micro_batch: int, speeds: dict[int, float]) -> Plan:
    """A plan for `micro_batch`, from a tuning that measured tokens/s by micro-batch."""
    trials = [
        Trial(choices=choices(size), verdict="ok", step_time_ms=[1000 * STEP_TOKENS / speed])
        for size, speed in speeds.items()
    ]
    return Plan(
        key=KEY, choices=choices(micro_batch),
        evidence=Evidence(trials=trials, best_tokens_per_second=speeds[micro_batch], seconds=5.0),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("odd", "verdict"),
    [
        (plan(2, {4: 1000.0, 2: 1005.0}), "tie"),
        (plan(2, {4: 1000.0, 2: 1100.0}), "other"),
        (plan(2, {2: 995.0}), "tie"),  # the usual choice was not tried: its speed is the other tunings'
        (plan(2, {2: 900.0}), "other"),
    ],
)
def test_another_choice_is_a_tie_within_the_noise_only(odd, verdict):
    usual = [plan(4, {4: 1000.0, 2: 950.0}) for _ in range(4)]
    result = judge_repeats(CONFIG, [odd, *usual], GPU)
    assert [one.verdict for one in result.repetitions] == [verdict, *["same"] * 4]
    assert result.agreeing == 4 + (verdict == "tie")
    assert result.usual == choices(4).summary()


def test_every_tuning_starts_anew_is_kept_and_not_repeated(tmp_path, monkeypatch):
    made, forced = [plan(4, {4: 1000.0}), plan(2, {4: 1000.0, 2: 1004.0}), plan(4, {4: 1000.0})], []

    def tune(config, *, force, store):
        forced.append(force)
        assert store.cache.is_relative_to(tmp_path), "the user's plans stay as they are"
        if not made:
            raise KeyboardInterrupt
        return type("Result", (), {"plan": made.pop(0)})

    monkeypatch.setattr(module, "tune", tune)
    with pytest.raises(KeyboardInterrupt):
        repeat_tuning(CONFIG, tmp_path, times=4, deadline=Deadline(None), say=print)
    assert forced == [True] * 4
    assert repeat_tuning(CONFIG, tmp_path, times=4, deadline=Deadline(0.0), say=print) is None, "no time for a fourth"
    made.append(plan(4, {4: 1000.0}))
    result = repeat_tuning(CONFIG, tmp_path, times=4, deadline=Deadline(None), say=print)
    assert [one.verdict for one in result.repetitions] == ["same", "tie", "same", "same"]
    assert len(forced) == 5
    assert json.loads((tmp_path / REPEATS).read_text()) == json.loads(result.model_dump_json())
