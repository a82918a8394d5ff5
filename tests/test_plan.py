import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastft.errors import PlanError
from fastft.files import canonical_json, sha256_of
from fastft.plan import Choices, Evidence, KernelTrial, Plan, PlanKey, Trial

KEY: dict[str, Any] = {
    "device": "CPU",
    "compute_capability": None,
    "multiprocessors": 2,
    "device_memory_bytes": 2**33,
    "versions": {"torch": "2.13.0", "triton": "none"},
    "kernels_sha256": "0" * 64,
    "model_shape": {"layers": 3, "hidden": 64},
    "lora_rank": 16,
    "lora_targets": ["q_proj"],
    "lora_dropout": 0.0,
    "quantization": "none",
    "dtype": "fp32",
    "sequence_tokens": 128,
    "packing": False,
    "global_batch": 8,
    "optimizer": "adamw",
    "world_size": 1,
    "memory_cap_bytes": None,
    "search_space": 1,
}
OTHER = {
    "device": "GPU",
    "compute_capability": "9.0",
    "multiprocessors": 132,
    "device_memory_bytes": 2**34,
    "versions": {"torch": "2.12.0", "triton": "none"},
    "kernels_sha256": "1" * 64,
    "model_shape": {"layers": 3, "hidden": 128},
    "lora_rank": 8,
    "lora_targets": ["q_proj", "v_proj"],
    "lora_dropout": 0.1,
    "quantization": "nf4",
    "dtype": "bf16",
    "sequence_tokens": 256,
    "packing": True,
    "global_batch": 16,
    "optimizer": "adamw_8bit",
    "world_size": 2,
    "memory_cap_bytes": 2**30,
    "search_space": 2,
}
CHOICES = Choices(backend="eager", micro_batch=4, accumulation=2, placement=["full", "light", "light"])


def plan(**update: Any) -> Plan:
    values: dict[str, Any] = {"key": PlanKey(**KEY), "choices": CHOICES, "evidence": Evidence(trials=[])}
    return Plan(**{**values, **update})


def with_checksum(body: dict[str, Any]) -> str:
    body = {name: value for name, value in body.items() if name != "checksum"}
    return canonical_json({**body, "checksum": sha256_of(body)})


def test_every_field_of_the_key_has_a_case_here() -> None:
    assert set(OTHER) == set(KEY) == set(PlanKey.model_fields)


@pytest.mark.parametrize("name", OTHER)
def test_any_field_changes_the_digest_and_is_named(name: str) -> None:
    one, two = PlanKey(**KEY), PlanKey(**{**KEY, name: OTHER[name]})
    assert one.digest != two.digest
    assert one.difference(two) == {name: (KEY[name], OTHER[name])}
    assert one.difference(one) == {}


def test_the_digest_does_not_depend_on_the_order_of_fields() -> None:
    assert PlanKey(**KEY).digest == PlanKey(**dict(reversed(KEY.items()))).digest


@given(
    st.lists(st.sampled_from(["keep", "light", "mlp", "full"]), min_size=3, max_size=3),
    st.sampled_from([1, 2, 4, 8]),
    st.lists(st.floats(0.1, 1e6), max_size=4),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)
def test_json_round_trip(placement: list[str], micro_batch: int, times: list[float], name: str) -> None:
    choices = Choices(backend="eager", micro_batch=micro_batch, accumulation=8 // micro_batch, placement=placement)  # type: ignore[arg-type]
    trial = Trial(choices=choices, verdict="ok", step_time_ms=times, detail=name)
    made = plan(choices=choices, evidence=Evidence(trials=[trial], soft={"driver": name}), model_name=name)
    again = Plan.from_json(made.to_json(), where="here")
    assert again == made
    assert again.id == made.id
    assert again.to_json() == made.to_json()


def test_the_id_changes_with_the_choices_and_keeps_the_key() -> None:
    one = plan()
    two = plan(choices=CHOICES.model_copy(update={"micro_batch": 2, "accumulation": 4}))
    assert one.id != two.id
    assert one.id.split("-")[0] == two.id.split("-")[0] == one.key.digest


@pytest.mark.parametrize("field", ["choices", "key", "evidence", "origin", "model_name"])
def test_a_changed_field_breaks_the_checksum(field: str) -> None:
    body = json.loads(plan().to_json())
    change = {"choices": {"micro_batch": 8, "accumulation": 1}, "key": {"lora_rank": 8}, "evidence": {"seconds": 1.5}}
    body[field] = {**body[field], **change[field]} if field in change else "shipped"
    with pytest.raises(PlanError, match="checksum"):
        Plan.from_json(json.dumps(body), where="here")


def test_another_schema_is_refused_by_name() -> None:
    body = json.loads(plan().to_json()) | {"schema_version": 2}
    with pytest.raises(PlanError, match=r"another schema; got 2; allowed: 1"):
        Plan.from_json(with_checksum(body), where="here")


def test_a_placement_of_another_length_is_refused() -> None:
    body = json.loads(plan().to_json())
    body["choices"]["placement"] = ["light"] * 4
    with pytest.raises(PlanError, match="placement names 4 layers, the model has 3"):
        Plan.from_json(with_checksum(body), where="here")


def test_micro_batches_that_are_not_the_global_batch_are_refused() -> None:
    body = json.loads(plan().to_json())
    body["choices"]["accumulation"] = 3
    with pytest.raises(PlanError, match="is not the global batch 8"):
        Plan.from_json(with_checksum(body), where="here")


def test_an_unknown_field_is_refused() -> None:
    body = json.loads(plan().to_json()) | {"surprise": 1}
    with pytest.raises(PlanError, match="surprise"):
        Plan.from_json(with_checksum(body), where="here")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000])
def test_what_is_no_plan_is_a_plan_error(text: str) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(text, where="here")


KERNELS = {"add/64x16/16bit/256": [32, 128, 4, 4096, 3]}
TRIED = KernelTrial(bucket="add/64x16/16bit/256", launch=[32, 128, 4, 4096, 3], verdict="ok", microseconds=[1.5, 1.25])


def test_launches_survive_a_file_and_are_part_of_the_id() -> None:
    tuned = plan(choices=CHOICES.model_copy(update={"kernels": KERNELS}), evidence=Evidence(trials=[], kernels=[TRIED]))
    again = Plan.from_json(tuned.to_json(), where="here")
    assert again == tuned
    assert again.choices.kernels == KERNELS
    assert again.evidence.kernels == [TRIED]
    assert again.id != plan().id
    assert again.choices.summary().endswith("2×light, tuned launches: 1")


def test_a_plan_without_the_field_has_the_defaults() -> None:
    body = json.loads(plan().to_json())
    del body["choices"]["kernels"], body["evidence"]["kernels"]
    again = Plan.from_json(with_checksum(body), where="here")
    assert (again.choices.kernels, again.evidence.kernels) == ({}, [])


@pytest.mark.parametrize("kernels", [[], {"a": 1}, {"a": ["x"]}, {"a": [1.5]}, {"a": None}])
def test_launches_of_another_form_are_refused(kernels: Any) -> None:
    body = json.loads(plan().to_json())
    body["choices"]["kernels"] = kernels
    with pytest.raises(PlanError, match=r"choices\.kernels"):
        Plan.from_json(with_checksum(body), where="here")


def test_summary_joins_equal_neighbours() -> None:
    assert CHOICES.summary() == "eager, 4×2 sequences, placement 1×full + 2×light"
