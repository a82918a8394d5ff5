"""Which functions a `forward` reaches, and whether they are still the libraries'."""

import pytest
import torch
import torch.nn.functional as F
import transformers.loss.loss_utils as loss_utils
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama import modeling_llama

from fastft.models.calls import calls_of, calls_of_function
from fastft.models.identity import why_other_loss


def _half(*args: object, **kwargs: object) -> Tensor:
    return torch.zeros(())


class _Half:
    """A class that is called as a function would be."""

    def __new__(cls, *args: object, **kwargs: object) -> Tensor:  # type: ignore[misc]
        return torch.zeros(())


@pytest.mark.parametrize("other", [_half, _Half])
@pytest.mark.parametrize(
    ("owner", "name"), [(F, "cross_entropy"), (loss_utils, "fixed_cross_entropy"), (F, "pad"), (Tensor, "view")]
)
def test_another_function_is_a_reason_while_it_stands_there(owner, name, other, monkeypatch):
    before = calls_of_function(loss_utils.ForCausalLMLoss)
    assert before.reason is None
    with monkeypatch.context() as replaced:
        replaced.setattr(owner, name, other)
        assert not before.hold()
        assert why_other_loss() == f"{owner.__name__}.{name} was replaced"
    assert before.hold()
    assert why_other_loss() is None


@pytest.mark.parametrize("meanwhile", [None, 1, _half, _Half])
def test_what_was_looked_up_while_a_function_was_gone_is_looked_up_again(meanwhile, monkeypatch):
    with monkeypatch.context() as gone:
        gone.setattr(loss_utils, "fixed_cross_entropy", meanwhile)
        calls_of_function(loss_utils.ForCausalLMLoss)
    assert why_other_loss() is None
    monkeypatch.setattr(F, "cross_entropy", _half)
    assert why_other_loss() == "torch.nn.functional.cross_entropy was replaced"


@pytest.mark.parametrize("meanwhile", [None, 1])
def test_a_method_that_was_gone_is_looked_up_again(meanwhile, monkeypatch):
    with monkeypatch.context() as gone:
        gone.setattr(Tensor, "view", meanwhile)
        without = calls_of_function(loss_utils.ForCausalLMLoss)
        assert without.hold()
    assert not without.hold()
    monkeypatch.setattr(Tensor, "view", _half)
    assert why_other_loss() == "Tensor.view was replaced"


def test_another_class_of_outputs_is_a_reason(monkeypatch):
    class Output(BaseModelOutputWithPast):
        pass

    assert calls_of(modeling_llama.LlamaModel).reason is None
    monkeypatch.setattr(modeling_llama, "BaseModelOutputWithPast", Output)
    assert "BaseModelOutputWithPast was replaced" in str(calls_of(modeling_llama.LlamaModel).reason)
