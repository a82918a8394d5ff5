"""Shipped plans, with made-up ones in a folder of the test."""

import logging
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fastft.errors import PlanError
from fastft.models.shapes import SHAPES
from fastft.plan import Choices, Evidence, Plan, PlanKey, Trial
from fastft.plans import __main__ as maintain
from fastft.plans import shipped
from fastft.plans.shipped import MAY_DIFFER, ShippedPlans, choices_here, measured_peak_bytes

LAUNCH = {"add/64x16/16bit/256": [32, 128, 4, 4096, 3]}
KEY = PlanKey(
    device="Test GPU", compute_capability="9.0", multiprocessors=132, device_memory_bytes=140 * 2**30,
    versions={"torch": "2.13", "triton": "3.7"}, kernels_sha256="0" * 64, model_shape=SHAPES["toy-llama"].sizes(),
    lora_rank=16, lora_targets=["q_proj"], lora_dropout=0.0, quantization="none", dtype="bf16", sequence_tokens=128,
    packing=False, global_batch=8, optimizer="adamw", world_size=1, memory_cap_bytes=None,
)  # fmt: skip
OTHER: dict[str, Any] = {
    "device": "Other GPU", "compute_capability": "8.0", "multiprocessors": 108, "device_memory_bytes": 80 * 2**30,
    "model_shape": SHAPES["toy-qwen2"].sizes(), "lora_rank": 8, "lora_targets": ["v_proj"], "lora_dropout": 0.1,
    "quantization": "nf4", "dtype": "fp16", "sequence_tokens": 64, "packing": True, "global_batch": 4,
    "optimizer": "adamw_8bit", "world_size": 2, "memory_cap_bytes": 2**30, "search_space": 1,
    "versions": {"torch": "2.14", "triton": "3.7"}, "kernels_sha256": "1" * 64,
}  # fmt: skip


def make_plan(key: PlanKey = KEY, peak_bytes: int | None = 2**30, **update: Any) -> Plan:
    micro_batch = key.global_batch // 2
    choices = Choices(
        backend="triton", micro_batch=micro_batch, accumulation=2, placement=["full", "light", "keep"], kernels=LAUNCH
    )
    trial = Trial(choices=choices.model_copy(update={"kernels": {}}), verdict="ok", peak_bytes=peak_bytes)
    plan = Plan(key=key, choices=choices, evidence=Evidence(trials=[trial]), model_name="toy-llama")
    return plan.model_copy(update=update)


@pytest.fixture
def plans(tmp_path: Path) -> ShippedPlans:
    return ShippedPlans(tmp_path / "shipped")


@pytest.fixture
def added(plans: ShippedPlans, tmp_path: Path) -> Path:
    """The one plan of the folder."""
    (tmp_path / "plan.json").write_text(make_plan().to_json())
    return plans.add(tmp_path / "plan.json")


def test_a_plan_is_found_by_its_key_and_labelled(plans: ShippedPlans, added: Path) -> None:
    expected = make_plan(origin="shipped")
    assert plans.load(KEY) == expected
    assert plans.entries() == [expected]
    assert plans.path(expected) == added
    assert added.name.startswith("toy-llama-")
    assert added.read_text() == make_plan().to_json()  # byte for byte what was exported
    assert plans.verify() == [(added, None)]


@pytest.mark.parametrize("field", list(PlanKey.model_fields))
def test_each_field_but_versions_and_kernels_must_be_equal(field: str, plans: ShippedPlans, added: Path) -> None:
    key = KEY.model_copy(update={field: OTHER[field]})
    assert (plans.load(key) is not None) == (field in MAY_DIFFER)


@pytest.mark.parametrize(
    ("update", "followed"),
    [
        ({}, True), ({"kernels_sha256": "1" * 64}, False), ({"versions": {"torch": "2.13", "triton": "3.8"}}, False),
        ({"versions": {"torch": "2.14", "triton": "3.7"}}, True), ({"device": "Other GPU"}, False),
    ],
)  # fmt: skip
def test_launches_are_followed_with_the_kernels_that_were_timed(update: dict[str, Any], followed: bool) -> None:
    plan = make_plan()
    here = choices_here(plan, KEY.model_copy(update=update))
    assert here.kernels == (LAUNCH if followed else {})
    assert here.model_copy(update={"kernels": LAUNCH}) == plan.choices


def test_the_measured_peak_is_the_largest_of_the_same_choices() -> None:
    plan = make_plan()
    (trial,) = plan.evidence.trials
    larger = trial.model_copy(update={"peak_bytes": 2**31})
    failed = trial.model_copy(update={"peak_bytes": 2**33, "verdict": "over_cap"})
    other = trial.model_copy(
        update={"peak_bytes": 2**34, "choices": trial.choices.model_copy(update={"graphs": "off"})}
    )
    evidence = plan.evidence.model_copy(update={"trials": [trial, larger, failed, other]})
    assert measured_peak_bytes(plan.model_copy(update={"evidence": evidence})) == 2**31


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (make_plan(origin="imported"), "only a plan that was tuned can be shipped; got imported"),
        (make_plan(model_name="my-model"), "plans are shipped for shipped shapes only; got my-model"),
        (make_plan(model_name="toy-qwen2"), "plans are shipped for shipped shapes only; got toy-qwen2"),
        (make_plan(peak_bytes=None), "the plan's own choices have no measured peak"),
        (
            make_plan(evidence=make_plan().evidence.model_copy(update={"out_of_time": True})),
            "the tuning ended before everything was tried",
        ),
    ],
)
def test_what_may_not_be_shipped(plan: Plan, message: str, plans: ShippedPlans, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan.to_json())
    with pytest.raises(PlanError, match=message):
        plans.add(path)
    assert plans.entries() == []


def test_a_bad_file_ends_no_run(plans: ShippedPlans, added: Path, caplog: pytest.LogCaptureFixture) -> None:
    added.write_text(added.read_text()[:100])
    assert plans.load(KEY) is None
    assert plans.entries() == []
    assert "a shipped plan is not used" in caplog.text
    ((path, problem),) = plans.verify()
    assert path == added
    assert problem is not None
    assert added.exists()


def test_a_file_by_another_name_is_told(plans: ShippedPlans, added: Path) -> None:
    renamed = added.rename(added.with_name("toy-llama-0123456789abcdef.json"))
    ((path, problem),) = plans.verify()
    assert (path, problem) == (renamed, f"its name does not end in {added.stem.rpartition('-')[2]}")
    assert plans.load(KEY) is None


def test_the_maintainers_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "shipped")
    path = tmp_path / "plan.json"
    path.write_text(make_plan().to_json())
    assert maintain.main([str(path)]) == 0
    assert capsys.readouterr().out == f"kept as {ShippedPlans().path(make_plan())}\n"
    assert maintain.main([str(tmp_path / "missing.json")]) == PlanError.exit_code
    assert "cannot read the plan" in capsys.readouterr().err
    assert maintain.main([]) == 2


def test_the_plans_of_this_release_are_sound(caplog: pytest.LogCaptureFixture) -> None:
    plans = ShippedPlans(Path(shipped.__file__).parent)
    assert [problem for _, problem in plans.verify() if problem is not None] == []
    with caplog.at_level(logging.WARNING):
        for plan in plans.entries():
            assert plan.key.compute_capability is not None
            assert measured_peak_bytes(plan) is not None
            assert SHAPES[plan.model_name].sizes() == plan.key.model_shape
    assert caplog.text == ""


def test_the_wheel_takes_the_folder() -> None:
    root = Path(shipped.__file__).parents[2]
    wheel = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert "fastft" in wheel["packages"]  # hatchling takes every file of a package that is neither excluded nor ignored
    assert not any("plans" in pattern or "json" in pattern for pattern in wheel["exclude"])
    assert not any("json" in line or "plans" in line for line in (root / ".gitignore").read_text().splitlines())
