"""The public API follows plans, the user's and shipped ones."""

import json
import logging

import peft
import pytest
import torch
import transformers

from api_models import assert_equals_stock, load
from api_plans import BUCKET, adapt, add_launch, default_launch, make_plan, other_launch, ship
from fastft import FastLanguageModel, ledger_of
from fastft.engine.patch import placement_of
from fastft.errors import ConfigError, PlanError
from fastft.models.shapes import SHAPES
from fastft.plan_store import PlanStore
from fastft.plans.verification import Verifications, rejected


def test_a_cached_plan_is_followed_whatever_the_batch(caplog):
    plan = make_plan(attention="sdpa", loss_chunk_tokens=7)
    PlanStore().save(plan)
    with caplog.at_level(logging.INFO, logger="fastft"):
        model = adapt()
    assert f"plan {plan.id}" in caplog.text
    assert placement_of(model) == ["full", "keep", "mlp"]
    assert_equals_stock(model)
    assert placement_of(adapt(plan="none")) != ["full", "keep", "mlp"]
    other_rank = FastLanguageModel.get_peft_model(load(), r=5, lora_alpha=8)
    assert placement_of(other_rank) != ["full", "keep", "mlp"]


def test_a_plan_decides_how_kernels_are_launched():
    launch = list(other_launch())
    PlanStore().save(make_plan(kernels={BUCKET: launch}))
    planned = adapt()
    assert add_launch(planned) == tuple(launch)
    assert add_launch(adapt(plan="none")) == default_launch(), "without a plan, by default"
    assert add_launch(planned) == tuple(launch)


def test_a_plan_file_is_followed_or_refused_by_the_differing_field(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(make_plan().to_json())
    assert placement_of(adapt(plan=str(path))) == ["full", "keep", "mlp"]
    with pytest.raises(ConfigError, match="made for something else; got lora_rank, sequence_tokens"):
        FastLanguageModel.get_peft_model(load(plan=str(path), max_seq_length=128), r=8, lora_alpha=8)
    with pytest.raises(PlanError):
        adapt(plan=str(tmp_path / "missing.json"))
    path.write_text(path.read_text().replace("full", "mlp"))
    with pytest.raises(PlanError, match="checksum"):
        adapt(plan=str(path))


def test_a_plan_in_which_stock_was_the_fastest_gives_stock():
    PlanStore().save(make_plan(backend="peft", placement=["full"] * 3))
    model = adapt()
    assert ledger_of(model) is None
    assert model.is_gradient_checkpointing
    pinned = adapt(backend="eager")
    assert ledger_of(pinned) is not None


def test_explicit_checkpointing_wins_over_the_plan():
    PlanStore().save(make_plan())
    model = FastLanguageModel.get_peft_model(load(), r=4, lora_alpha=8, use_gradient_checkpointing=True)
    assert placement_of(model) == ["full"] * 3


def test_a_shipped_plan_is_followed_up_to_its_own_micro_batch(caplog):
    plan = ship(micro_batch=3, accumulation=2, attention="sdpa")
    with caplog.at_level(logging.INFO, logger="fastft"):
        model = adapt()
    assert f"plan {plan.id} (shipped): " in caplog.text
    assert_equals_stock(model)  # 3 rows
    assert placement_of(model) == ["full", "keep", "mlp"]
    ship(micro_batch=2, accumulation=3)
    model = adapt()
    assert_equals_stock(model)
    assert placement_of(model) != ["full", "keep", "mlp"]  # by estimate


def test_a_shipped_plan_is_followed_up_to_its_own_rows():
    plan = ship(micro_batch=3, accumulation=2)
    model = adapt()
    for tokens, followed in ((plan.key.sequence_tokens, True), (plan.key.sequence_tokens + 1, False)):
        ids_BS = torch.arange(tokens)[None].to(next(model.parameters()).device)
        model(input_ids=ids_BS, labels=ids_BS).loss.backward()
        assert (placement_of(model) == ["full", "keep", "mlp"]) == followed, tokens


def test_the_users_plan_comes_before_a_shipped_one():
    ship()
    PlanStore().save(make_plan(placement=["mlp"] * 3))
    assert placement_of(adapt()) == ["mlp"] * 3


def test_a_shipped_plan_that_a_run_rejected_is_not_followed(caplog):
    plan = ship()
    Verifications().save(make_plan().key, rejected(plan, "too large"))
    with caplog.at_level(logging.INFO, logger="fastft"):
        adapt()
    assert plan.id not in caplog.text


def test_a_saved_adapter_names_the_plan(tmp_path):
    plan = make_plan()
    PlanStore().save(plan)
    adapt().save_pretrained(tmp_path / "planned")
    adapt(plan="none").save_pretrained(tmp_path / "default")
    facts = json.loads((tmp_path / "planned" / "fastft.json").read_text())
    assert (facts["plan_id"], facts["choices"]) == (plan.id, plan.choices.model_dump())
    assert json.loads((tmp_path / "default" / "fastft.json").read_text())["plan_id"] is None
    base = transformers.AutoModelForCausalLM.from_config(SHAPES["toy-llama"].to_config())
    assert peft.PeftModel.from_pretrained(base, tmp_path / "planned").peft_config["default"].r == 4
