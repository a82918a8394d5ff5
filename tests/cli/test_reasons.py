"""The table BECAUSE of `fastft plan show`."""

from collections.abc import Callable
from typing import Any

from fastft.commands.reasons import reasons
from fastft.plan import KernelTrial, Plan, Trial

BUCKET, LAUNCH, DEFAULT = "add/64x16/16bit/256", [32, 128, 4, 4096, 3], [16, 128, 4, 4096, 3]


def because(plan: Plan) -> dict[str, str]:
    return {name: text for name, _, text in reasons(plan)}


def with_evidence(plan: Plan, trials: list[Trial], kernels: list[KernelTrial] | None = None) -> Plan:
    evidence = plan.evidence.model_copy(update={"trials": trials, "kernels": kernels or []})
    return plan.model_copy(update={"evidence": evidence})


def tried(plan: Plan, speed: float | None, verdict: str = "ok", **choices: Any) -> Trial:
    return Trial(
        choices=plan.choices.model_copy(update=choices), verdict=verdict, tokens_per_second=speed  # type: ignore[arg-type]
    )  # fmt: skip


def test_each_choice_stands_beside_the_best_that_was_done_without_it(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    texts = because(
        with_evidence(plan, [
            tried(plan, 2000.0), tried(plan, 1900.0),
            tried(plan, 1500.0, micro_batch=1, accumulation=4), tried(plan, 1600.0, micro_batch=1, accumulation=4),
            tried(plan, None, "out_of_memory", micro_batch=4, accumulation=1),
            tried(plan, 1000.0, backend="peft"),
            tried(plan, 1700.0, placement=["light"] * 3),
        ])
    )  # fmt: skip
    assert texts["micro_batch"] == "2,000 tokens/s; 1: 1,600 tokens/s; 4: out of memory"
    assert texts["accumulation"] == "global batch 4 / micro_batch 2"
    assert texts["backend"] == "2,000 tokens/s; peft (stock): 1,000 tokens/s"
    assert texts["placement"] == "2,000 tokens/s; 3×light: 1,700 tokens/s"
    assert texts["graphs"] == "nothing else was tried"


def test_what_did_not_keep_to_its_cap_has_no_speed(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    trials = [tried(plan, 2000.0), tried(plan, 3000.0, "over_cap", placement=["light"] * 3)]
    assert because(with_evidence(plan, trials))["placement"] == "2,000 tokens/s; 3×light: over cap"


def test_only_some_others_are_named(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    others = [tried(plan, 100.0 * rows, loss_chunk_tokens=rows) for rows in range(1, 7)]
    text = because(with_evidence(plan, [tried(plan, 2000.0), *others]))["loss_chunk_tokens"]
    assert text == (
        "2,000 tokens/s; 6: 600 tokens/s; 5: 500 tokens/s; 4: 400 tokens/s; 3: 300 tokens/s; and 2 more"
    )  # fmt: skip


def test_without_trials_nothing_is_claimed(make_plan: Callable[..., Plan]) -> None:
    texts = because(with_evidence(make_plan(), []))
    assert {text for name, text in texts.items() if name != "accumulation"} == {"no trial says"}


def test_a_launch_stands_beside_the_default(make_plan: Callable[..., Plan]) -> None:
    plan = make_plan()
    plan = plan.model_copy(update={"choices": plan.choices.model_copy(update={"kernels": {BUCKET: LAUNCH}})})
    timed = [
        KernelTrial(bucket=BUCKET, launch=DEFAULT, verdict="ok", microseconds=[3.0, 2.0]),
        KernelTrial(bucket=BUCKET, launch=LAUNCH, verdict="ok", microseconds=[1.5, 1.25]),
    ]
    assert because(with_evidence(plan, [], timed))[f"kernels.{BUCKET}"] == (
        "1.2 µs; the default 16 128 4 4096 3: 2.0 µs"
    )  # fmt: skip
    assert because(plan)[f"kernels.{BUCKET}"] == "no trial says"
