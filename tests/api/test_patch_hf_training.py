"""`patch_hf_training`: code that knows nothing of fastft."""

import inspect
import logging
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from api_models import assert_equals_stock, gradients_of, olmo2_config, stock_model
from api_plans import BUCKET, add_launch, default_launch, make_plan, other_launch, ship
from fastft import ledger_of, patch_hf_training
from fastft.engine.patch import placement_of
from fastft.errors import BackendError, FastftError
from fastft.models.shapes import SHAPES
from fastft.plan_store import PlanStore


def test_launches_of_plans_for_the_same_widths_are_followed_and_nothing_else(monkeypatch):
    launch = list(other_launch())
    PlanStore().save(make_plan(kernels={BUCKET: launch}))
    monkeypatch.setattr("fastft.hf_training.backend_name", lambda *_: "triton")
    with patch_hf_training(backend="triton"):
        model = stock_model()
        assert add_launch(model) == tuple(launch)
        assert placement_of(model) == ["light"] * 3
        assert add_launch(stock_model(r=5)) == default_launch(), "a plan for another rank"
        ship(kernels={BUCKET: launch})
        PlanStore().path(make_plan().key).unlink()
        assert add_launch(stock_model()) == default_launch(), "timed with other kernels"


def test_models_made_inside_are_fast_and_stock_afterwards(device):
    original = peft.PeftModel.__init__
    before = stock_model()
    with patch_hf_training(backend="eager"):
        model = stock_model().to(device)
        assert ledger_of(model).counts()["decoder_layer: fused (eager)"] == 3
        assert_equals_stock(model)
        assert ledger_of(before) is None
        assert isinstance(model, peft.PeftModelForCausalLM)
        assert inspect.signature(peft.PeftModel.__init__) == inspect.signature(original)
    assert ledger_of(model) is None
    assert peft.PeftModel.__init__ is original
    assert ledger_of(stock_model()) is None
    assert gradients_of(model)[1]


def test_its_defaults_are_stocks(device):
    """Same initial adapter, same dtypes, and no checkpointing that was not asked for."""
    torch.manual_seed(0)
    expected = stock_model()
    with patch_hf_training(backend="eager"):
        model = stock_model()
        assert placement_of(model) == ["light"] * 3
    for (name, value), (other_name, other) in zip(expected.named_parameters(), model.named_parameters(), strict=True):
        assert name == other_name
        assert value.dtype == other.dtype
        assert torch.equal(value, other)


def test_an_adapter_is_loaded_fast_too(tmp_path):
    stock = stock_model()
    with torch.no_grad():
        for parameter in stock.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    stock.save_pretrained(tmp_path)
    base = stock_model().unload()
    with patch_hf_training(backend="eager"):
        model = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
        assert not ledger_of(model).fallbacks
        assert gradients_of(model)[0] == pytest.approx(gradients_of(stock)[0], rel=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointing_that_was_asked_for_before_is_kept():
    base = transformers.AutoModelForCausalLM.from_config(SHAPES["toy-llama"].to_config())
    base.gradient_checkpointing_enable()
    with patch_hf_training(backend="eager"):
        model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM"))
        assert placement_of(model) == ["full"] * 3
    assert model.is_gradient_checkpointing


def _gpt2() -> Any:
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=512))
    return peft.get_peft_model(base, peft.LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM", r=2))


def _olmo2(**lora: Any) -> Any:
    base = transformers.AutoModelForCausalLM.from_config(olmo2_config())
    return peft.get_peft_model(
        base, peft.LoraConfig(**{"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "r": 2, **lora})
    )


def _without_head() -> Any:
    base = transformers.LlamaModel(SHAPES["toy-llama"].to_config())
    return peft.get_peft_model(base, peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=2, target_modules=["q_proj"]))


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*")
@pytest.mark.parametrize(
    ("make", "message", "linears"),
    [(_gpt2, "no layer specification for gpt2", 1), (_without_head, "LlamaModel is built otherwise than", 3)],
)
def test_models_without_a_layer_specification_run_part_by_part_and_say_so_once(make, message, linears, caplog):
    with caplog.at_level(logging.INFO, logger="fastft"), patch_hf_training(backend="eager", strict=True):
        model = make()
        counts = ledger_of(model).counts()
        assert counts["linear: fused (eager)"] == linears
        ids = torch.tensor([[1, 2, 3]])
        output = model(input_ids=ids, labels=ids) if make is _gpt2 else model(input_ids=ids)
        next(iter(output.values())).sum().backward()
        assert ledger_of(model).counts() == counts
    lines = [record.getMessage() for record in caplog.records if record.name == "fastft"]
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert ledger_of(model) is None


def test_what_is_no_hugging_face_model_is_fast_too():
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    with patch_hf_training(backend="eager"):
        model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["linear"], r=2)).train()
        model(torch.ones(1, 3)).sum().backward()
        assert ledger_of(model).counts() == {"linear: fused (eager)": 1}


def test_strict_makes_what_stays_stock_an_error():
    with patch_hf_training(backend="eager", strict=True):
        with pytest.raises(BackendError, match="DoRA"):
            stock_model(use_dora=True, lora_dropout=0.1)
        with pytest.raises(BackendError, match=r"layers\.0\.self_attn\.q_proj.*DoRA"):
            _olmo2(use_dora=True, lora_dropout=0.1)
        assert stock_model() is not None
        assert _olmo2() is not None


def test_patches_come_off_in_the_reverse_order():
    original = peft.PeftModel.__init__
    outer = patch_hf_training(backend="eager")
    inner = patch_hf_training(backend="eager")
    with pytest.raises(FastftError, match="another patch lies over this one"):
        outer.undo()
    model = stock_model()
    inner.undo()
    assert ledger_of(model) is None
    outer.undo()
    assert peft.PeftModel.__init__ is original
    outer.undo()
    inner.undo()
    assert peft.PeftModel.__init__ is original


def test_an_error_inside_goes_through_and_the_patch_is_off():
    original = peft.PeftModel.__init__
    with pytest.raises(ValueError, match="mine"), patch_hf_training(backend="eager"):
        raise ValueError("mine")
    assert peft.PeftModel.__init__ is original


def test_it_holds_no_model():
    import gc
    import weakref

    with patch_hf_training(backend="eager"):
        model = stock_model()
        reference = weakref.ref(model)
        del model
        gc.collect()
        assert reference() is None


@pytest.mark.parametrize("backend", ["peft", "tritn"])
def test_a_backend_that_patches_nothing_is_refused(backend):
    original = peft.PeftModel.__init__
    with pytest.raises(FastftError, match="backend"):
        patch_hf_training(backend=backend)
    assert peft.PeftModel.__init__ is original
