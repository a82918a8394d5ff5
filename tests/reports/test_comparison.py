import math

import pytest

from fastft.errors import ConfigError
from fastft.record import Memory, Parity
from reports.comparison import compare


def only(records, **options):
    (scenario,) = compare(records, **({"baseline": "peft"} | options))
    return scenario


def replaced(records, arm, **changes):
    """The records, those of `arm` with other fields."""
    return [one.model_copy(update=changes) if one.arm == arm else one for one in records]


def test_equal_work_gets_ratios(records):
    (found,) = only(records()).comparisons
    assert found.withheld == ()
    assert found.processes == 5
    assert found.tokens_per_second.value == pytest.approx(1.43, rel=0.02)
    assert found.memory_above_model.value == pytest.approx(0.52, rel=0.02)
    assert 0.52 < found.peak_memory.value < 1
    assert found.accuracy.verdict == "ambiguous"
    assert 0 < found.loss_deviation.value < 1e-2


def test_order_of_records_and_duplicates_change_nothing(records):
    found = records()
    assert compare(found, baseline="peft") == compare([*reversed(found), *found], baseline="peft")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"batch_sha256": ["0" * 64] * 12}, "different batches from step 1 on"),
        ({"batch_sha256": ["0" * 64] * 11}, "ran 11 and 12 steps"),
        ({"batch_sha256": []}, "recorded no batch hashes"),
        ({"warmup_steps": 3}, "counted from steps 3 and 2 on"),
        ({"lora": {"rank": 8, "alpha": 16.0}}, "lora.rank is 8 and 16"),
        ({"model": {"name": "tiny", "shape": {"layers": 2, "model": 256}}}, "model.shape.layers is 2 and 4"),
        ({"training": {"batch_size": 8}}, "training.dtype is nothing and fp32"),
        ({"seed": 7}, "no repetition was finished by both arms with the same seed"),
    ],
)
def test_ratio_is_withheld(records, changes, reason):
    (found,) = only(replaced(records(), "eager", **changes)).comparisons
    assert any(reason in one for one in found.withheld), found.withheld
    assert found.tokens_per_second is found.memory_above_model is found.peak_memory is found.accuracy is None


@pytest.mark.parametrize("side", ["eager", "peft"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"loss": [1.0] * 11 + [math.nan]}, "has a loss or gradient norm that is not finite"),
        ({"gradient_norm": [1.0] * 11 + [math.inf]}, "has a loss or gradient norm that is not finite"),
        ({"gradient_norm": [0.0] * 12}, "did not train"),
        ({"status": "failed", "error": "out of memory"}, "failed: out of memory"),
        ({"status": "gate_failed", "error": "error 0.3 > 0.1"}, "gate failed: error 0.3 > 0.1"),
    ],
)
def test_a_side_that_did_not_train_has_no_ratio(records, side, changes, reason):
    (found,) = only(replaced(records(), side, **changes)).comparisons
    assert found.withheld
    assert all(one.startswith(f"{side} {reason}") for one in found.withheld), found.withheld
    assert found.tokens_per_second is found.memory_above_model is found.peak_memory is found.accuracy is None


def test_one_unequal_repetition_is_enough(records):
    found = records()
    found[7] = found[7].model_copy(update={"batch_sha256": [*found[7].batch_sha256[:-1], "0" * 64]})
    (one,) = only(found).comparisons
    assert one.withheld == ("unequal work: repetition 2 (seed 102) saw different batches from step 12 on",)


def test_a_failed_gate_of_one_repetition_or_of_the_baseline_withholds(records):
    failed = Parity(
        passed=False, max_relative_error=0.3, stock_max_relative_error=0.1, tolerance=0.15, tensors=1, worst_tensor="q"
    )
    for index in (0, 9):  # a run of the baseline, a run of the arm
        found = records()
        found[index] = found[index].model_copy(update={"parity": failed})
        (one,) = only(found).comparisons
        assert "relative gradient error 0.300 is over 0.150 in q" in one.withheld[0]


def test_a_missing_gate_is_named(records):
    scenario = only(replaced(records(), "eager", parity=None))
    assert any("eager: the parity gate did not run" in one for one in scenario.warnings)


def test_ratios_use_the_repetitions_that_both_finished(records):
    found = records()
    found[9] = found[9].model_copy(update={"status": "failed", "error": "killed"})
    scenario = only(found)
    assert scenario.comparisons[0].processes == 4
    assert scenario.comparisons[0].tokens_per_second.processes == 4
    assert any("1 of 5 processes failed (killed)" in one for one in scenario.warnings)


def test_a_second_run_of_the_same_repetition_counts_as_a_process(records):
    again = [one.model_copy(update={"run_id": one.run_id + "b"}) for one in records()]
    assert only(records() + again).comparisons[0].processes == 10


@pytest.mark.parametrize("side", ["eager", "peft"])
def test_memory_is_optional_and_its_kinds_do_not_mix(records, side):
    (none,) = only(replaced(records(), side, memory=None)).comparisons
    assert none.memory_above_model is None
    assert none.tokens_per_second is not None
    cuda = Memory(kind="cuda_allocated", model_bytes=1, peak_bytes=2)
    (mixed,) = only(replaced(records(), side, memory=cuda)).comparisons
    assert mixed.peak_memory is None
    below = Memory(kind="rss", model_bytes=3, peak_bytes=2)  # a resident set can shrink
    (shrunk,) = only(replaced(records(), side, memory=below)).comparisons
    assert shrunk.memory_above_model is None
    assert shrunk.peak_memory is not None


def test_differences_of_environment_are_flagged(records):
    changed = replaced(records(), "eager", versions={"torch": "2.12.0"}, git_commit="0" * 40)
    warnings = only(changed).warnings
    assert "Version of torch differs: 2.12.0 (eager); 2.13.0 (peft)" in warnings
    assert any(one.startswith("Git commit differs") for one in warnings)
    assert not any("differs" in one for one in only(records()).warnings)


def test_different_plans_within_an_arm_are_flagged(records):
    found = records()
    found[9] = found[9].model_copy(update={"choices": {"micro_batch": 8}})
    assert "eager followed different plans in different processes" in only(found).warnings


def test_few_processes_are_flagged(records):
    assert any("at most 75 % of cases" in one for one in only(records(repetitions=3)).warnings)
    assert not any("of cases" in one for one in only(records(repetitions=6)).warnings)


def test_devices_are_never_compared(records):
    here, there = records(), replaced(replaced(records(), "peft", device={"name": "B"}), "eager", device={"name": "B"})
    found = compare([*here, *there], baseline="peft")
    assert [one.name for one in found] == ["embedded on B", "embedded on CPU (2 cores)"]
    assert [one.comparisons[0].processes for one in found] == [5, 5]


def test_a_run_that_died_before_it_named_its_device_stays_in_its_scenario(records):
    found = replaced(records(), "eager", device={}, status="failed", error="boom")
    assert only(found).comparisons[0].withheld == ("eager failed: boom",)


def test_the_baseline_must_exist(records):
    with pytest.raises(ConfigError, match="did you mean 'peft'"):
        compare(records(), baseline="petf")
    alone = only(records(("triton",)))
    assert alone.comparisons == ()
    assert any("nothing to compare with" in one for one in alone.warnings)


def test_the_fastest_arm_leads(records):
    assert only(records(("peft", "eager", "triton"))).fastest.arm == "triton"
    failed = replaced(records(("peft", "eager", "triton")), "triton", status="failed", error="no")
    assert only(failed).fastest.arm == "eager"
