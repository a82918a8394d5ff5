from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.explain import explain
from autotune.ranking import NOISE
from devices import GPU
from fastft.config import RunConfig
from fastft.models.shapes import SHAPES
from fastft.plan import Choices, Evidence, Plan, Policy, Trial
from fastft.planning import plan_key

SHAPE = SHAPES["toy-llama"]
CONFIG = RunConfig(model="toy-llama", sequence_tokens=4096, memory_cap="1GiB")
STEP_TOKENS = 16 * 4096
MIB = 2**20


def trial(
    placement: list[Policy], milliseconds: float, peak_mib: int, *, backend: str = "triton", size: int = 4,
    verdict: str = "ok",
) -> Trial:  # fmt: skip
    choices = Choices(backend=backend, micro_batch=size, accumulation=16 // size, placement=placement)
    return Trial.model_validate(
        {"choices": choices, "verdict": verdict, "step_time_ms": [milliseconds], "peak_bytes": peak_mib * MIB}
    )


def explained(trials: list[Trial]) -> list[tuple[float, float, str, list[Policy]]]:
    """(cap in MiB, step time in ms, basis, placement) of each rung."""
    plan = Plan(key=plan_key(CONFIG, SHAPE, GPU), choices=trials[0].choices, evidence=Evidence(trials=trials))
    return [
        (rung.cap_bytes / MIB, 1000 * STEP_TOKENS / rung.tokens_per_second, rung.basis, rung.choices.placement)
        for rung in explain(plan, CONFIG, SHAPE, GPU)
    ]


# Every policy that the solver may use on a GPU was measured: what lies between is known but for the mixture.
LADDER = [
    trial(["light"] * 3, 100.0, 1300, verdict="over_cap"), trial(["mlp"] * 3, 130.0, 1000),
    trial(["full"] * 3, 160.0, 700), trial(["offload_mlp"] * 3, 190.0, 400), trial(["offload"] * 3, 220.0, 100),
]  # fmt: skip


def test_measured_and_solved_choices_by_cap() -> None:
    rungs = explained(LADDER)
    by_placement = {tuple(placement): (cap, time, basis) for cap, time, basis, placement in rungs}
    assert by_placement["light", "light", "light"] == (1300, pytest.approx(100.0), "measured")
    assert by_placement["mlp", "mlp", "mlp"] == (1000, pytest.approx(130.0), "measured")
    assert rungs[0] == (100, pytest.approx(220.0), "measured", ["offload"] * 3)
    mixed = [(cap, time, placement) for cap, time, basis, placement in rungs if basis == "predicted"]
    assert mixed
    for cap, time, placement in mixed:
        peak = 100 + sum(
            {"offload": 0, "offload_mlp": 100, "full": 200, "mlp": 300, "light": 400}[p] for p in placement
        )
        assert peak <= 0.99 * cap
        assert time == pytest.approx(220 - (peak - 100) / 10, abs=1e-3)


def test_the_cap_of_the_plan_hides_nothing_and_what_was_refused_is_no_answer() -> None:
    assert explained(LADDER)[-1][3] == ["light"] * 3, "it was over the cap"
    refused = Trial(choices=LADDER[0].choices, verdict="parity_failed")
    assert all(placement != ["light"] * 3 or basis == "predicted" for _, _, basis, placement in
               explained([*LADDER, refused]))  # fmt: skip


def test_stock_is_measured_or_nothing() -> None:
    rungs = explained([trial(["full"] * 3, 10.0, 500, backend="peft"), trial(["light"] * 3, 5.0, 900, backend="peft")])
    assert [(cap, basis) for cap, _, basis, _ in rungs] == [(500, "measured"), (900, "measured")]


def test_nothing_that_ran_explains_nothing() -> None:
    assert explained([trial(["light"] * 3, 1.0, 1, verdict="out_of_memory")]) == []


policies = st.sampled_from(["light", "mlp", "full", "offload_mlp", "offload"])
placements = st.lists(policies, min_size=3, max_size=3) | policies.map(lambda policy: [policy] * 3)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.builds(
            trial, placements, st.floats(10, 1000), st.integers(50, 2000), backend=st.sampled_from(["triton", "peft"]),
            size=st.sampled_from([1, 4]), verdict=st.sampled_from(["ok", "over_cap", "out_of_memory"]),
        ),
        min_size=1, max_size=10,
    )
)  # fmt: skip
def test_more_memory_is_faster_and_every_measured_rung_is_a_trial(trials: list[Trial]) -> None:
    rungs = explained(trials)
    for (low, slow, *_), (high, fast, *_) in pairwise(rungs):
        assert low < high
        assert fast * (1 + NOISE["cuda"]) < slow * (1 + 1e-9)
    ran = {
        (tuple(t.choices.placement), round(t.step_time_ms[0], 6))
        for t in trials if t.verdict != "out_of_memory"
    }  # fmt: skip
    for cap, time, basis, placement in rungs:
        if basis == "measured":
            assert (tuple(placement), round(time, 6)) in ran
            assert any(t.peak_bytes is not None and t.peak_bytes <= cap * MIB for t in trials)
    usable = [t for t in trials if all(other.verdict != "out_of_memory" for other in trials
                                       if other.choices == t.choices)]  # fmt: skip
    if usable:
        fastest = min(usable, key=lambda t: t.step_time_ms[0])
        # One noise for the rule that equals are ranked by their peak, one for what is no rung.
        assert rungs[-1][1] <= fastest.step_time_ms[0] * (1 + NOISE["cuda"]) / (1 - NOISE["cuda"])
