"""Which functions a `forward` reaches, and whether they are still the libraries'."""

import pytest
import torch
import torch.nn.functional as F
import transformers.loss.loss_utils as loss_utils
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama import modeling_llama

from fastft.models import calls
from fastft.models.calls import calls_of, calls_of_function
from fastft.models.identity import why_other_loss


def _half(*args: object, **kwargs: object) -> Tensor:
    return torch.zeros(())


class _Half:
    """A class that is called as a function would be."""

    def __new__(cls, *args: object, **kwargs: object) -> Tensor:  # type: ignore[misc]
        return torch.zeros(())


@pytest.mark.parametrize("other", [_half, _Half, F.relu, torch.relu])
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


@pytest.mark.parametrize(
    "function", [torch.fft.ifft2, torch.linalg.qr, torch.sparse.mm, F.logsigmoid, F.silu, F.softmax, torch.mm]
)
def test_functions_are_known_by_their_names(function):
    """Some call themselves after the module that they are in, and another one of the libraries' own is none the less
    another one."""
    others = {"fft_ifft2": "ifft2", "linalg_qr": "qr", "_sparse_mm": "mm", "log_sigmoid": "logsigmoid"}
    name = others.get(function.__name__, function.__name__)
    assert calls._is_own(function, name)
    assert not calls._is_own(function, "relu")
    assert not calls._is_own(torch.relu, name)


def test_a_type_of_python_is_no_replacement(monkeypatch):
    monkeypatch.setattr(loss_utils, "fixed_cross_entropy", dict[str, Tensor])
    assert calls_of_function(loss_utils.ForCausalLMLoss).reason is None


def test_another_class_of_outputs_is_a_reason(monkeypatch):
    class Output(BaseModelOutputWithPast):
        pass

    assert calls_of(modeling_llama.LlamaModel).reason is None
    monkeypatch.setattr(modeling_llama, "BaseModelOutputWithPast", Output)
    assert "BaseModelOutputWithPast was replaced" in str(calls_of(modeling_llama.LlamaModel).reason)
