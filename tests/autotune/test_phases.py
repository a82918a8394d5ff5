import math
import time
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.phases import VERIFICATION_SECONDS, Progress
from autotune.probe import ProbeRequest
from autotune.ranking import NOISE
from autotune.runner import Ended
from autotune.search import tune
from autotune.space import EFFORTS, LOSS_CHUNKS, default_candidate, uniform_policy
from devices import CPU, GPU
from fake_gpu import CONFIG, GIB, SAVED_MIB, SHAPE, FakeGpu, capped, run
from fastft.errors import MeasureError
from fastft.hardware import Device
from fastft.models.shapes import SHAPES
from fastft.plan import Choices, Trial
from fastft.plan_store import PlanStore
from fastft.planning import plan_key


def test_what_recomputes_for_nothing_is_not_probed(store: PlanStore) -> None:
    gpu = FakeGpu()
    run(store, gpu)
    assert {uniform_policy(choices) for choices in gpu.probed()} == {"light", "keep"}
    assert len({choices.micro_batch for choices in gpu.probed() if uniform_policy(choices) == "keep"}) == 1


def test_the_default_wins_ties(store: PlanStore) -> None:
    gpu = FakeGpu()
    gpu.time_ms = lambda choices: 100.0 if choices.micro_batch == 4 else 99.5  # type: ignore[method-assign]
    plan = run(store, gpu).plan
    assert plan.choices == default_candidate(CONFIG, SHAPE, GPU)


@pytest.mark.parametrize("slow", range(5))
def test_the_plan_is_never_clearly_slower_than_the_default(slow: int, store: PlanStore) -> None:
    gpu = FakeGpu(
        speed=lambda choices: 0.9 + 0.04 * ((choices.micro_batch * 7 + len(set(choices.placement)) + slow) % 5)
    )
    plan = run(store, gpu).plan
    default = default_candidate(CONFIG, SHAPE, GPU)
    assert gpu.time_ms(plan.choices) <= 1.01 * gpu.time_ms(default)


def test_stock_may_win(store: PlanStore) -> None:
    plan = run(store, FakeGpu(speed=lambda choices: 3.0 if choices.backend == "peft" else 1.0)).plan
    assert plan.choices.backend == "peft"


def test_finalists_are_timed_again_interleaved(store: PlanStore) -> None:
    gpu = FakeGpu()
    gpu.time_ms = lambda choices: 90.0 + choices.micro_batch / 100 if choices.micro_batch < 8 else 200.0  # type: ignore[method-assign]
    run(store, gpu, effort="full")
    probed = [choices.model_dump_json() for choices in gpu.probed()]
    count = EFFORTS["full"].finalists
    first, second = probed[-2 * count : -count], probed[-count:]
    assert len(set(first)) == count
    assert first == second[::-1], "there and back"
    assert default_candidate(CONFIG, SHAPE, GPU).model_dump_json() in first


def test_a_disturbed_first_measurement_of_the_default_does_not_inflate_the_gain(store: PlanStore) -> None:
    gpu = FakeGpu()
    honest = gpu.time_ms

    def disturbed(choices: Choices) -> float:
        return honest(choices) * (2.0 if len(gpu.requests) == 1 else 1.0)

    gpu.time_ms = disturbed  # type: ignore[method-assign]
    evidence = run(store, gpu).plan.evidence
    default = default_candidate(CONFIG, SHAPE, GPU)
    assert evidence.default_tokens_per_second == pytest.approx(16 * 1024 * 1000 / honest(default), rel=0.01)


# Memory


@pytest.mark.parametrize("cap_gib", [5.0, 6.0, 7.5, 9.0])
def test_under_a_cap_the_mixed_optimum_is_found_and_measured(cap_gib: float, store: PlanStore) -> None:
    config = CONFIG.model_copy(update={"memory_cap": f"{cap_gib}GiB"})
    gpu = FakeGpu()
    plan = run(store, gpu, config).plan
    cap = cap_gib * GIB
    confirmed = [trial for trial in plan.evidence.trials if trial.choices == plan.choices]
    assert all(trial.verdict == "ok" for trial in confirmed)
    assert all(trial.peak_bytes is not None and trial.peak_bytes <= cap for trial in confirmed)
    uniform = [trial for trial in plan.evidence.trials if uniform_policy(trial.choices) and trial.verdict == "ok"]
    assert all(gpu.time_ms(plan.choices) <= 1.01 * gpu.time_ms(trial.choices) for trial in uniform)
    if cap_gib == 5.0:
        assert len(set(plan.choices.placement)) > 1
        saved = [SAVED_MIB[policy] for policy in plan.choices.placement]
        assert saved == sorted(saved), "layers that save most come last"


def test_a_mixture_that_turns_out_too_large_is_corrected(store: PlanStore) -> None:
    config = CONFIG.model_copy(update={"memory_cap": "5GiB"})
    gpu = FakeGpu()
    honest = gpu.peak
    gpu.peak = lambda choices: honest(choices) + (uniform_policy(choices) is None) * GIB // 4  # type: ignore[method-assign]
    plan = run(store, gpu, config).plan
    mixed = [trial for trial in plan.evidence.trials if uniform_policy(trial.choices) is None]
    assert {"over_cap", "ok"} <= {trial.verdict for trial in mixed}
    assert gpu.peak(plan.choices) <= 5 * GIB


def test_the_device_itself_is_a_cap(store: PlanStore) -> None:
    small = Device("cuda", "S", "8.9", 60, 6 * GIB, 8)
    gpu = FakeGpu(memory_bytes=6 * GIB)
    plan = run(store, gpu, device=small).plan
    assert gpu.peak(plan.choices) <= 6 * GIB
    assert any(trial.verdict == "out_of_memory" for trial in plan.evidence.trials)


def test_larger_ones_are_not_probed_after_a_lack_of_memory(store: PlanStore) -> None:
    small = Device("cuda", "S", "8.9", 60, 40 * GIB, 8)  # the analytic model prunes nothing, the device is smaller
    gpu = FakeGpu(memory_bytes=5 * GIB)
    run(store, gpu, device=small)
    light = [c.micro_batch for c in gpu.probed() if c.backend == "triton" and uniform_policy(c) == "light"]
    failed = [size for size in light if 3 * GIB + size * 16 * 60 * 2**20 > 5 * GIB]
    assert failed == sorted(set(failed), reverse=True) != []


def test_nothing_feasible_names_the_smallest_peak_and_the_cap(store: PlanStore) -> None:
    gpu = FakeGpu()
    gpu.peak = lambda choices: 5 * GIB + choices.micro_batch * 2**20  # type: ignore[method-assign]
    with pytest.raises(MeasureError, match=r"smallest peak seen is 5.00 GiB; allowed: up to 4.00 GiB"):
        run(store, gpu, CONFIG.model_copy(update={"memory_cap": "4GiB"}))
    assert store.entries() == []
    again = FakeGpu()
    again.peak = gpu.peak  # type: ignore[method-assign]
    with pytest.raises(MeasureError, match=r"smallest peak seen is 5.00 GiB"):
        run(store, again, CONFIG.model_copy(update={"memory_cap": "4GiB"}))
    assert all(choices not in gpu.probed() for choices in again.probed()), "only the cap says no: what is known stays"


def test_nothing_ran_says_why(store: PlanStore, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(MeasureError, match="failed: no such model"):
        run(store, lambda request: Trial(choices=request.choices, verdict="failed", detail="no such model"))
    assert "the default does not run (failed): no such model" in caplog.text
    assert list((store.cache / "trials").glob("*")) == [], "the next attempt measures anew"


def test_no_time_still_measures_the_default(store: PlanStore) -> None:
    gpu = FakeGpu()
    plan = run(store, gpu, max_minutes=0.0).plan
    default = default_candidate(CONFIG, SHAPE, GPU)
    assert gpu.probed() == [default]
    assert plan.choices == default


def test_the_time_limit_counts_what_a_probe_takes(store: PlanStore) -> None:
    gpu = FakeGpu()

    def slow(request: ProbeRequest) -> Trial:
        time.sleep(0.2)
        return gpu(request)

    run(store, slow, max_minutes=0.5 / 60)
    assert 1 <= len(gpu.requests) <= 3


def test_progress(store: PlanStore) -> None:
    seen: list[Progress] = []
    gpu = FakeGpu()
    run(store, gpu, on_progress=seen.append)
    before, after = seen[::2], seen[1::2]
    assert [progress.choices for progress in before] == gpu.probed()
    assert all(progress.trial is None for progress in before)
    assert all(progress.trial is not None and progress.trial.choices == progress.choices for progress in after)
    assert [progress.index for progress in after] == list(range(1, len(after) + 1))
    assert all(progress.total >= progress.index for progress in seen)
    assert all(progress.eta_seconds is not None for progress in after)
    assert after[-1].eta_seconds == 0
    best = [progress.best.tokens_per_second or 0 for progress in after if progress.best]
    assert len(best) == len(after)
    assert list(dict.fromkeys(progress.phase for progress in after)) == ["uniform", "refine", "finalists"]
    assert all(later.total - later.index < now.total - now.index for now, later in pairwise(after)), "ever less left"


def test_a_refused_winner_is_followed_by_the_next(store: PlanStore) -> None:
    asked: list[Choices] = []

    def verify(choices: Choices) -> bool:
        asked.append(choices)
        return len(asked) > 1

    plan = run(store, FakeGpu(), verify_plan=verify).plan
    assert plan.choices == asked[1] != asked[0]
    refused = [trial for trial in plan.evidence.trials if trial.verdict == "parity_failed"]
    assert [trial.choices for trial in refused] == [asked[0]]
    with pytest.raises(MeasureError):
        run(store, FakeGpu(), verify_plan=lambda choices: False, force=True)


def test_quick_on_a_cpu_probes_little(store: PlanStore) -> None:
    gpu = FakeGpu()
    run(store, gpu, CONFIG.model_copy(update={"model": "toy-llama"}), shape=SHAPES["toy-llama"], device=CPU)
    assert len({choices.model_dump_json() for choices in gpu.probed()}) <= 6
    assert len(gpu.requests) <= 8
    assert plan_key(CONFIG, SHAPES["toy-llama"], CPU).digest in {path.stem for path in store.folder.glob("*.json")}


# Refinements

FACTORS = st.sampled_from([0.88, 0.94, 1.0, 1.06, 1.12])
ATTENTIONS, GRAPHS = ("auto", "flash", "efficient"), ("auto", "off")


class Refinable(FakeGpu):
    """Every attention, graph mode and loss chunk has a factor of its own on the speed; `auto` records graphs."""

    def __init__(self, factors: dict[str, float]) -> None:
        super().__init__(speed=self.factor)
        self.factors = factors

    def factor(self, choices: Choices) -> float:
        mode = "off" if choices.graphs == "off" else "auto"
        names = (choices.attention, f"graphs {mode}", str(choices.loss_chunk_tokens))
        return math.prod(self.factors.get(name, 1.0) for name in names)

    def __call__(self, request: ProbeRequest) -> Trial:
        trial = super().__call__(request)
        others = [] if request.choices.backend == "peft" else list(ATTENTIONS[1:])
        return trial.model_copy(update={"other_attention": others})


@settings(max_examples=15, deadline=None)
@given(
    st.fixed_dictionaries(
        dict.fromkeys((*ATTENTIONS, *(f"graphs {mode}" for mode in GRAPHS), *map(str, LOSS_CHUNKS)), FACTORS)
    )
)
def test_refinements_find_the_best_of_all_combinations(
    tmp_path_factory: pytest.TempPathFactory, factors: dict[str, float]
) -> None:
    gpu = Refinable(factors)
    # One micro-batch, and all chunks differ.
    long = CONFIG.model_copy(update={"sequence_tokens": 8192, "batch_size": 1})
    plan = run(PlanStore(tmp_path_factory.mktemp("plans")), gpu, long, effort="exhaustive").plan
    combinations = [
        plan.choices.model_copy(update={"attention": attention, "graphs": graphs, "loss_chunk_tokens": chunk})
        for attention in ATTENTIONS
        for graphs in GRAPHS
        for chunk in LOSS_CHUNKS
    ]
    best = min(map(gpu.time_ms, combinations))
    assert gpu.time_ms(plan.choices) <= best * (1 + NOISE["cuda"] + 1e-3), "three timings of a probe differ by 1e-3"


def test_what_is_refined_goes_on_from_what_was_faster(store: PlanStore) -> None:
    gpu, seen = Refinable({"flash": 1.05, "graphs off": 0.9, "4096": 1.05}), list[Progress]()
    plan = run(store, gpu, effort="full", on_progress=seen.append).plan
    assert (plan.choices.attention, plan.choices.graphs, plan.choices.loss_chunk_tokens) == ("flash", "auto", 4096)
    refined = [p.choices for p in seen if p.phase == "refine" and p.trial is None]
    assert [(uniform_policy(c), c.attention, c.graphs, c.loss_chunk_tokens) for c in refined if c][:5] == [
        ("keep", "auto", "auto", 2048), ("keep", "flash", "auto", 2048), ("keep", "efficient", "auto", 2048),
        ("keep", "flash", "off", 2048), ("keep", "flash", "auto", 4096),
    ]  # fmt: skip
    assert {c.micro_batch for c in refined if c} == {plan.choices.micro_batch}


# Other memory caps


@pytest.mark.parametrize("effort", ["quick", "full"])
@pytest.mark.parametrize("cap", [None, 9.0, 6.0, 5.0])
@pytest.mark.parametrize("model", ["llama-3.2-1b", "llama-3-8b"])
def test_an_effort_keeps_to_its_number_of_probes(effort: str, cap: float | None, model: str, store: PlanStore) -> None:
    gpu, seen = Refinable({}), list[Progress]()
    gpu.peak = lambda choices: 2 * GIB + FakeGpu.peak(gpu, choices) // 4  # type: ignore[method-assign]
    cap = cap + 1 if cap and model == "llama-3-8b" else cap
    config = capped(cap).model_copy(update={"model": model, "quantization": "nf4"})
    run(store, gpu, config, effort=effort, shape=SHAPES[model], on_progress=seen.append)
    level = EFFORTS[effort]  # type: ignore[index]
    assert len(gpu.requests) <= level.most_probes
    assert {"peft"} < {choices.backend for choices in gpu.probed()} or cap is not None
    assert all(progress.total <= level.most_probes for progress in seen)
    repeated = [progress for progress in seen if progress.phase == "finalists" and progress.trial]
    assert repeated, "there is always room for the finalists"


def test_a_deadline_is_kept_and_told(store: PlanStore, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """On a clock on which a probe takes 25 s."""
    caplog.set_level("INFO")
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    gpu = FakeGpu()

    def probe(request: ProbeRequest) -> Trial:
        clock[0] += 25.0
        return gpu(request)

    plan = run(store, probe, max_minutes=2.0, verify_plan=lambda choices: True).plan
    assert 1 < len(gpu.requests) <= (120 - VERIFICATION_SECONDS) // 25
    assert plan.evidence.out_of_time
    assert plan.choices in gpu.probed()
    assert "the 2 minutes are over before everything was tried" in caplog.text
    clock[0] = 0.0
    unhurried = run(store, probe, force=True, verify_plan=lambda choices: True).plan
    assert clock[0] <= 60 * (EFFORTS["quick"].minutes or 0) - VERIFICATION_SECONDS
    assert not unhurried.evidence.out_of_time


def test_a_probe_is_given_up_at_the_deadline(store: PlanStore, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, limits, gpu = [0.0], list[float](), FakeGpu()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def probe(request: ProbeRequest, *, timeout_seconds: float, spares: object) -> Trial:
        limits.append(timeout_seconds)
        clock[0] += 10.0
        return gpu(request)

    monkeypatch.setattr("autotune.search.run_in_process", probe)
    tune(CONFIG, store=store, shape=SHAPE, device=GPU, max_minutes=1.0, run_kernels=lambda request: Ended(
        [], 0, False, "", ""))  # fmt: skip
    assert limits[0] == EFFORTS["quick"].timeout_seconds, "the default is measured in any case"
    assert limits[1:] == [50.0, 40.0, 30.0, 20.0, 10.0]


@pytest.mark.parametrize(("challenger", "wins", "timed"), [(1.0, False, 3), (1.2, True, 2), (0.9, False, 1)])
def test_a_lead_that_may_be_luck_is_timed_again(challenger: float, wins: bool, timed: int, store: PlanStore) -> None:
    """On a CPU, whose noise is 5 %: the default is disturbed by 6 % in its first two trials."""
    trials = Counter[int]()

    def speed(choices: Choices) -> float:
        chunk = choices.loss_chunk_tokens
        trials[chunk] += choices.backend == "eager"
        return challenger if chunk == 4096 else 0.94 if trials[chunk] <= 2 else 1.0

    plan = run(store, FakeGpu(speed=speed), shape=SHAPES[CONFIG.model], device=CPU).plan
    default = plan.evidence.trials[0].choices
    assert (plan.choices.loss_chunk_tokens == 4096) == wins
    assert sum(trial.choices == default for trial in plan.evidence.trials) == timed
