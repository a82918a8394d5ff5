import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import fastft
from devices import CPU, GPU
from fastft import planning
from fastft.config import LoraConfig, RunConfig
from fastft.defaults import default_choices
from fastft.errors import ModelError, PlanError
from fastft.hardware import Device
from fastft.models.shapes import SHAPES, ModelShape
from fastft.plan import Choices, Evidence, Plan
from fastft.plan_store import PlanStore
from fastft.planning import (
    model_shape,
    plan_key,
    resolve,
    tune_command,
)
from fastft.plans.shipped import ShippedPlans
from fastft.plans.verification import Verifications, rejected

SHAPE = SHAPES["toy-llama"]
CONFIG = RunConfig(model="toy-llama", sequence_tokens=128)

pytestmark = pytest.mark.usefixtures("no_interpreter")


@pytest.fixture
def store(tmp_path: Path) -> PlanStore:
    return PlanStore(tmp_path)


def tuned(config: RunConfig = CONFIG, device: Device = CPU, **update: Any) -> Plan:
    choices = Choices(backend="eager", micro_batch=8, accumulation=2, placement=["full", "light", "keep"])
    evidence = Evidence(
        trials=[],
        best_tokens_per_second=12345.6,
        default_tokens_per_second=10000.0,
        created_at=(datetime.now(UTC) - timedelta(days=3, hours=1)).isoformat(),
    )
    values = {"key": plan_key(config, SHAPE, device), "choices": choices, "evidence": evidence}
    return Plan(**{**values, **update})


# The key


@pytest.mark.parametrize(
    "update",
    [
        {"lora": LoraConfig(rank=8)}, {"lora": LoraConfig(dropout=0.1)}, {"lora": LoraConfig(targets=("q_proj",))},
        {"sequence_tokens": 64}, {"batch_size": 8}, {"packing": True}, {"quantization": "nf4"}, {"dtype": "bf16"},
        {"optimizer": "adamw_8bit"}, {"memory_cap": "1GiB"},
    ],
)  # fmt: skip
def test_what_changes_the_best_plan_changes_the_key(update: dict[str, Any]) -> None:
    changed = plan_key(CONFIG.model_copy(update=update), SHAPE, CPU)
    assert len(plan_key(CONFIG, SHAPE, CPU).difference(changed)) == 1


@pytest.mark.parametrize(
    "update",
    [{"seed": 1}, {"learning_rate": 1.0}, {"steps": 9}, {"model": "x"}, {"data": "x"}, {"output": "x"},
     {"backend": "peft"}, {"micro_batch": 1}, {"placement": "full"}, {"plan": "none"}],
)  # fmt: skip
def test_what_does_not_keeps_it(update: dict[str, Any]) -> None:
    assert plan_key(CONFIG.model_copy(update=update), SHAPE, CPU) == plan_key(CONFIG, SHAPE, CPU)


def test_the_key_of_a_device() -> None:
    cpu, gpu = plan_key(CONFIG, SHAPE, CPU), plan_key(CONFIG, SHAPE, GPU)
    assert (cpu.multiprocessors, gpu.multiprocessors) == (2, 132)
    assert (cpu.dtype, gpu.dtype) == ("fp32", "bf16")
    assert cpu.device_memory_bytes == 2**35  # another kernel takes other kilobytes: the same machine
    assert set(cpu.versions) == {"torch", "triton", "cuda", "bitsandbytes"}


def test_the_order_of_targets_does_not_matter() -> None:
    one, two = (
        CONFIG.model_copy(update={"lora": LoraConfig(targets=t)}) for t in (("q_proj", "v_proj"), ("v_proj", "q_proj"))
    )
    assert plan_key(one, SHAPE, CPU) == plan_key(two, SHAPE, CPU)


def test_the_world_size_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert plan_key(CONFIG, SHAPE, CPU).world_size == 2


# Resolving


def test_without_a_plan_the_line_says_how_to_find_one(store: PlanStore) -> None:
    found = resolve(CONFIG, SHAPE, CPU, store)
    assert found.plan is None
    assert found.choices == default_choices(CONFIG, SHAPE, "eager", CPU)
    assert "fastft tune toy-llama --sequence-tokens 128" in found.message
    assert "\n" not in found.message


def test_without_a_plan_the_line_says_what_the_default_was_chosen_for(store: PlanStore) -> None:
    config = RunConfig(model="llama-3-8b", quantization="nf4", sequence_tokens=2048, memory_cap="20GiB")
    message = resolve(config, SHAPES["llama-3-8b"], GPU, store).message
    assert message.startswith("no plan for this run yet; estimated under 20.00 GiB: default triton, ")
    assert message.endswith("--memory-cap 20GiB")
    tight = config.model_copy(update={"memory_cap": "5GiB"})
    assert "there are 5.00 GiB" in resolve(tight, SHAPES["llama-3-8b"], GPU, store).warnings[0]


def test_a_cached_plan_is_followed_and_described(store: PlanStore) -> None:
    plan = tuned()
    store.save(plan)
    found = resolve(CONFIG, SHAPE, CPU, store)
    assert found.plan == plan
    assert found.choices == plan.choices
    for part in (plan.id, plan.choices.summary(), "3 days ago", "12,346 tokens/s", "default 10,000"):
        assert part in found.message
    assert found.warnings == ()


def test_a_miss_names_the_nearest_plan_and_why_it_missed(store: PlanStore) -> None:
    stale = tuned()
    stale = stale.model_copy(update={"key": stale.key.model_copy(update={"kernels_sha256": "f" * 64})})
    further = tuned(CONFIG.model_copy(update={"sequence_tokens": 64, "packing": True}))
    other_model = stale.model_copy(update={"key": stale.key.model_copy(update={"model_shape": {"layers": 3}})})
    for plan in (stale, further, other_model):
        store.save(plan)
    found = resolve(CONFIG, SHAPE, CPU, store)
    assert found.plan is None
    assert (
        f"no plan for this run yet (the nearest of yours, {stale.id}, differs: kernels_sha256: plan ffffffffffff, this "
        f"run {plan_key(CONFIG, SHAPE, CPU).kernels_sha256[:12]}): default "
    ) in found.message
    assert "\n" not in found.message


def test_few_of_many_differences_are_named(store: PlanStore) -> None:
    store.save(tuned(CONFIG.model_copy(update={"sequence_tokens": 64, "packing": True, "dtype": "bf16"}), GPU))
    message = resolve(CONFIG, SHAPE, CPU, store).message
    assert "differs: device: plan H, this run C; " in message
    assert " and 4 more): default" in message


# Shipped plans (their lookup and verdicts: tests/plans)


@pytest.fixture
def shipped(tmp_path: Path) -> ShippedPlans:
    """Holds a plan for CONFIG on CPU, made by other kernels."""
    plans = ShippedPlans(tmp_path / "shipped")
    plans.folder.mkdir()
    plan = with_other_kernels(tuned(model_name="toy-llama"))
    plans.path(plan).write_text(plan.to_json())
    return plans


def with_other_kernels(plan: Plan) -> Plan:
    return plan.model_copy(update={"key": plan.key.model_copy(update={"kernels_sha256": "f" * 64})})


def test_a_shipped_plan_is_followed_where_the_user_has_none(store: PlanStore, shipped: ShippedPlans) -> None:
    (plan,) = shipped.entries()
    found = resolve(CONFIG, SHAPE, CPU, store, shipped)
    assert (found.plan, found.choices) == (plan, plan.choices)
    assert found.verified_for == plan_key(CONFIG, SHAPE, CPU)
    assert found.message == (
        f"plan {plan.id}: {plan.choices.summary()}; shipped with fastft {fastft.__version__}, made on C 3 days "
        "ago at 12,346 tokens/s (default 10,000); not verified on this machine yet"
    )
    own = tuned(choices=plan.choices.model_copy(update={"micro_batch": 4, "accumulation": 4}))
    store.save(own)
    found = resolve(CONFIG, SHAPE, CPU, store, shipped)
    assert (found.plan, found.verified_for) == (own, None)


def test_a_shipped_plan_names_the_users_own_that_missed(store: PlanStore, shipped: ShippedPlans) -> None:
    store.save(stale := with_other_kernels(tuned()))
    message = resolve(CONFIG, SHAPE, CPU, store, shipped).message
    assert f"not verified on this machine yet (the nearest of yours, {stale.id}, differs: kernels_sha256: " in message


def test_a_rejected_plan_gives_the_default_and_the_reason(store: PlanStore, shipped: ShippedPlans) -> None:
    (plan,) = shipped.entries()
    Verifications(store.cache).save(plan_key(CONFIG, SHAPE, CPU), rejected(plan, "too large"))
    found = resolve(CONFIG, SHAPE, CPU, store, shipped)
    assert (found.plan, found.verified_for) == (None, None)
    assert found.choices == default_choices(CONFIG, SHAPE, "eager", CPU)
    assert f"was rejected on this machine just now (too large): default {found.choices.summary()}" in found.message
    assert tune_command(CONFIG) in found.message


def test_a_shipped_plan_that_is_not_followed_as_it_is_is_not_verified(store: PlanStore, shipped: ShippedPlans) -> None:
    found = resolve(CONFIG.model_copy(update={"micro_batch": 2}), SHAPE, CPU, store, shipped)
    assert found.plan is not None
    assert found.verified_for is None
    assert found.message.endswith("; this run itself sets micro_batch = 2")
    assert resolve(CONFIG.model_copy(update={"plan": "none"}), SHAPE, CPU, store, shipped).plan is None


def test_plan_none_ignores_the_store(store: PlanStore) -> None:
    store.save(tuned())
    found = resolve(CONFIG.model_copy(update={"plan": "none"}), SHAPE, CPU, store)
    assert found.plan is None
    assert "as asked" in found.message


def test_what_the_run_sets_overrides_the_plan_and_is_said(store: PlanStore) -> None:
    store.save(tuned())
    config = CONFIG.model_copy(update={"micro_batch": 4, "placement": "mlp", "backend": "peft"})
    found = resolve(config, SHAPE, CPU, store)
    assert found.choices.model_dump() == tuned().choices.model_dump() | {
        "backend": "peft", "micro_batch": 4, "accumulation": 4, "placement": ["mlp"] * 3,
    }  # fmt: skip
    assert "this run itself sets backend = peft, micro_batch = 4, placement = mlp" in found.message
    same = resolve(CONFIG.model_copy(update={"micro_batch": 8}), SHAPE, CPU, store)
    assert "itself sets" not in same.message


def test_a_plan_file(store: PlanStore, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    store.export(tuned(), file)
    found = resolve(CONFIG.model_copy(update={"plan": str(file)}), SHAPE, CPU, store)
    assert found.choices == tuned().choices
    assert "imported" in found.message


def test_a_plan_file_for_another_run_names_the_fields(store: PlanStore, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    key = plan_key(CONFIG, SHAPE, CPU)
    other = key.model_copy(
        update={"lora_rank": 8, "versions": {**key.versions, "torch": "1.0"}, "kernels_sha256": "f" * 64}
    )
    store.export(tuned(key=other), file)
    with pytest.raises(PlanError) as error:
        resolve(CONFIG.model_copy(update={"plan": str(file)}), SHAPE, CPU, store)
    text = str(error.value)
    for part in (
        "lora_rank: plan 8, this run 16",
        "versions.torch: plan 1.0",
        "kernels_sha256: plan ffffffffffff,",
        "fastft tune",
    ):
        assert part in text
    assert "versions.triton" not in text


def test_a_missing_plan_file(store: PlanStore) -> None:
    with pytest.raises(PlanError, match="cannot read the plan"):
        resolve(CONFIG.model_copy(update={"plan": "absent.json"}), SHAPE, CPU, store)


def test_a_cached_plan_that_cannot_run_here_is_not_followed(store: PlanStore) -> None:
    choices = tuned().choices.model_copy(update={"backend": "triton"})
    store.save(tuned(choices=choices))
    found = resolve(CONFIG, SHAPE, CPU, store)
    assert found.choices.backend == "eager"
    assert "cannot run here" in found.message


def test_soft_facts_warn(store: PlanStore, monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = Evidence(trials=[], soft={"driver": "570", "power_limit_watts": 700})
    store.save(tuned(device=GPU, evidence=evidence))
    monkeypatch.setattr(planning, "soft_facts", lambda: {"driver": "580", "power_limit_watts": 700})
    found = resolve(CONFIG, SHAPE, GPU, store)
    assert found.plan is not None
    assert found.warnings == ("driver was 570 when the plan was tuned and is 580 now",)


# Shapes and commands


def test_the_shape_of_a_shipped_model_needs_no_file(tmp_path: Path) -> None:
    assert model_shape(CONFIG, tmp_path) is SHAPE
    assert list(tmp_path.iterdir()) == []


def folder_of(shape: ModelShape, path: Path) -> Path:
    shape.to_config().save_pretrained(path)
    return path


def test_the_shape_of_a_folder_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from fastft.models import loading

    config = RunConfig(model=str(folder_of(SHAPES["toy-qwen2"], tmp_path / "model")))
    first = model_shape(config, tmp_path / "cache")
    assert first == SHAPES["toy-qwen2"]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("resolved again")

    with monkeypatch.context() as patch:
        patch.setattr(loading, "resolve_model", refuse)
        assert model_shape(config, tmp_path / "cache") == first
    memo = next((tmp_path / "cache" / "shapes").iterdir())
    for text in ("", "{", "[1]", '{"family": 1}'):
        memo.write_text(text)
        assert model_shape(config, tmp_path / "cache") == first
    settings = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(settings | {"intermediate_size": 256}))
    assert model_shape(config, tmp_path / "cache").intermediate == 256


def test_a_model_without_a_specification_has_no_plans(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.GPT2Config(n_layer=1).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="got gpt2"):
        model_shape(RunConfig(model=str(tmp_path / "model")), tmp_path)


def test_the_tune_command_repeats_the_key() -> None:
    config = RunConfig(
        model="my model", packing=True, quantization="nf4", memory_cap="7.8 GiB", seed=1, offline=False,
        lora=LoraConfig(rank=8, targets=("q_proj", "v_proj")),
    )  # fmt: skip
    assert tune_command(RunConfig(model="tiny")) == "fastft tune tiny"
    assert tune_command(config) == (
        "fastft tune 'my model' --packing --quantization nf4 --memory-cap '7.8 GiB' --no-offline "
        "--rank 8 --targets q_proj,v_proj"
    )
