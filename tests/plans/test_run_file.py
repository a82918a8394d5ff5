"""The run file beside a saved adapter."""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from fastft.config import RunConfig
from fastft.models.shapes import SHAPES
from fastft.plan import Choices
from fastft.plans.run_file import RUN_FILE, record_in_saves, run_facts


def base() -> Any:
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(SHAPES["toy-llama"].to_config())


def adapted() -> Any:
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(base(), settings)


CHOICES = Choices(backend="eager", micro_batch=1, accumulation=1, placement=["light"] * 3)


def test_every_save_has_it_and_stock_peft_loads_the_adapter(tmp_path: Path) -> None:
    model, facts = adapted(), run_facts(RunConfig(), None, CHOICES)
    record_in_saves(model, facts)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / RUN_FILE).read_text()) == json.loads(json.dumps(facts))
    assert facts["plan_id"] is None
    assert facts["choices"] == CHOICES.model_dump()
    assert facts["config"] == RunConfig().model_dump()
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
    ids = torch.arange(8)[None]
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_a_copy_saves_itself(tmp_path: Path) -> None:
    model = adapted()
    record_in_saves(model, run_facts(RunConfig(), None, None))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    twin.save_pretrained(tmp_path)
    assert (tmp_path / RUN_FILE).exists()
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert all(not p.any() for name, p in loaded.named_parameters() if "lora_" in name)


def test_other_models_and_other_ranks_write_none(tmp_path: Path) -> None:
    model = adapted()
    record_in_saves(model, run_facts(RunConfig(), None, None))
    adapted().save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other" / RUN_FILE).exists()
    model.save_pretrained(tmp_path / "rank", is_main_process=False)
    assert not (tmp_path / "rank" / RUN_FILE).exists()
