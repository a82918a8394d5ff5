"""What stock's code reaches and somebody changed."""

# B rows, S tokens a row, V vocabulary

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils
from transformers.integrations import sdpa_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from fastft import ledger_of, patch_model
from peft_models import on_device

TOLERANCE = 5e-5 if torch.cuda.is_available() else 1e-5  # ‖g − stock‖ / ‖stock‖ in fp32


def _half(function: Callable[..., Any]) -> Callable[..., Any]:
    def halved(*args: Any, **kwargs: Any) -> Any:
        given = function(*args, **kwargs)
        return (0.5 * given[0], *given[1:]) if isinstance(given, tuple) else 0.5 * given

    return halved


def _halve(monkeypatch: pytest.MonkeyPatch, holder: Any, name: str) -> None:
    monkeypatch.setattr(holder, name, _half(getattr(holder, name)))


def _another_attention(monkeypatch: pytest.MonkeyPatch, backbone: Any) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "half", _half(ALL_ATTENTION_FUNCTIONS["sdpa"]))
    attention = backbone.layers[0].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "half"


def _masks_without_the_first(monkeypatch: pytest.MonkeyPatch, _: Any) -> None:
    stocks = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def mask_function(*args: Any, **kwargs: Any) -> Tensor:
        mask = stocks(*args, **{**kwargs, "allow_is_causal_skip": False}).clone()
        mask[..., 0] = False
        return mask | torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)

    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", mask_function)


class _Skipping(nn.ModuleList):
    def __getitem__(self, index: Any) -> Any:
        return [super().__getitem__(1)] if isinstance(index, slice) else super().__getitem__(index)


def _replace(module: nn.Module, name: str, **more: Any) -> None:
    """A registry of a module as a whole, with other things in it."""
    module.__dict__[name] = {**module.__dict__[name], **more}


def _frozen_and_assigned(_: Any, backbone: Any) -> None:
    a = backbone.layers[0].mlp.up_proj.lora_A["default"]
    weight = a.weight.detach()
    del a.weight
    a.register_buffer("weight", weight)
    a(torch.zeros(1, weight.shape[1], device=weight.device))
    a.weight = 0.5 * weight


def _of_mlp(backbone: Any, path: str) -> Any:
    return backbone.layers[0].mlp.get_submodule(path)


REACHED: dict[str, tuple[str, str, Callable[[pytest.MonkeyPatch, Any], Any]]] = {
    "the config of one attention": ("toy-llama", "sdpa", _another_attention),
    "the registered mask": ("toy-llama", "sdpa", _masks_without_the_first),
    "how packed documents are told": (
        "toy-llama", "sdpa", lambda m, _: m.setattr(masking_utils, "find_packed_sequence_indices", lambda *_: None),
    ),
    "repeat_kv of sdpa": (
        "toy-llama", "sdpa",
        lambda m, _: (_halve(m, sdpa_attention, "repeat_kv"),
                      m.setattr(sdpa_attention, "use_gqa_in_sdpa", lambda *_: False, raising=False)),
    ),
    "get_interface": (
        "toy-llama", "sdpa",
        lambda m, _: m.setattr(
            AttentionInterface, "get_interface", lambda self, name, eager: _half(self.get(name, eager))
        ),
    ),
    "torch.rsqrt": ("toy-llama", "sdpa", lambda m, _: _halve(m, torch, "rsqrt")),
    "torch.matmul": ("toy-llama", "eager", lambda m, _: _halve(m, torch, "matmul")),
    "a method of the norm's class": (
        "toy-gemma2", "eager", lambda m, b: _halve(m, type(b.layers[0].input_layernorm), "_norm"),
    ),
    "a method of one norm": ("toy-gemma2", "eager", lambda m, b: _halve(m, b.layers[0].input_layernorm, "_norm")),
    "a method of the attention's class": (
        "toy-falcon", "sdpa", lambda m, b: _halve(m, type(b.h[0].self_attention), "_split_heads"),
    ),
    "a method of PEFT's class": (
        "toy-llama", "sdpa",
        lambda m, b: m.setattr(type(_of_mlp(b, "up_proj")), "_cast_input_dtype", lambda self, x, dtype: 0.5 * x),
    ),
    "a method of one adapter": (
        "toy-llama", "sdpa",
        lambda m, b: m.setattr(_of_mlp(b, "up_proj"), "_cast_input_dtype", lambda x, dtype: 0.5 * x),
    ),
    "the function of an activation": (
        "toy-gemma2", "eager", lambda m, b: m.setattr(_of_mlp(b, "act_fn"), "act", torch.tanh),
    ),
    "a list that skips layers": ("toy-llama", "sdpa", lambda m, b: setattr(b, "layers", _Skipping(b.layers))),
    "all parameters of an adapter": (
        "toy-llama", "sdpa",
        lambda m, b: _replace(
            _of_mlp(b, "up_proj.lora_A.default"), "_parameters",
            weight=nn.Parameter(0.5 * _of_mlp(b, "up_proj.lora_A.default").weight.detach()),
        ),
    ),
    "all modules of an MLP": (
        "toy-llama", "sdpa", lambda m, b: _replace(b.layers[0].mlp, "_modules", act_fn=nn.Tanh()),
    ),
    "all attributes of an MLP": (
        "toy-llama", "sdpa",
        lambda m, b: (setattr(b.layers[0].mlp, "__dict__", dict(b.layers[0].mlp.__dict__)),
                      setattr(b.layers[0].mlp, "act_fn", nn.Tanh())),
    ),
    "all hooks of an MLP": (
        "toy-llama", "sdpa",
        lambda m, b: (setattr(b.layers[0].mlp, "_forward_hooks", OrderedDict()),
                      b.layers[0].mlp.register_forward_hook(lambda _, __, out: 0.5 * out)),
    ),
    "a frozen matrix, assigned anew": ("toy-llama", "sdpa", _frozen_and_assigned),
}  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", REACHED)
def test_what_stocks_code_reaches_is_what_counts(change, when, toy, batch_of, step, error_of, monkeypatch):
    """Before the first step, and after one."""
    family, attention, do = REACHED[change]
    lora = {"target_modules": "all-linear"} if family == "toy-falcon" else {}
    batch = batch_of("packed" if "packed" in change else "none")
    results = []
    for patched in (False, True):
        model = toy(family, base={"attn_implementation": attention}, **lora)
        backbone = model.get_base_model().base_model
        if patched:
            patch_model(model, backend="eager")
        unchanged = step(model, batch) if when == "after" else None
        with monkeypatch.context() as context:
            do(context, backbone)
            results.append(step(model, batch))
        assert unchanged is None or results[-1][0] != pytest.approx(unchanged[0], rel=1e-5), "it changes nothing"
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert error_of(results[1][1], results[0][1]) < TOLERANCE


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "constant", ["scaling of an adapter", "scaling of attention", "residual_multiplier", "epsilon"]
)
def test_a_constant_that_is_a_tensor_is_trained_or_changes_in_place(constant, when, toy, batch_of, step, error_of):
    family = "toy-granite" if constant == "residual_multiplier" else "toy-llama"
    batch, results = batch_of("none"), []
    for patched in (False, True):
        model = toy(family, base={"attn_implementation": "eager"})
        layer = model.get_base_model().model.layers[1]
        if patched:
            patch_model(model, backend="eager")
        if when == "after":
            step(model, batch)
        made = torch.tensor(0.3, device=next(model.parameters()).device, requires_grad=constant != "epsilon")
        if constant == "scaling of an adapter":
            layer.mlp.up_proj.scaling["default"] = made
        elif constant == "epsilon":
            layer.input_layernorm.variance_epsilon = made
        else:
            name, holder = ("scaling", layer.self_attn) if "attention" in constant else (constant, layer)
            delattr(holder, name)
            setattr(holder, name, nn.Parameter(made.detach()))
            made = getattr(holder, name)
        first, gradients = step(model, batch)
        with torch.no_grad():
            made.mul_(0.5)
        second, others = step(model, batch)
        assert first != pytest.approx(second, rel=1e-5)
        gradients |= {f"then {name}": gradient for name, gradient in others.items()}
        if made.grad is not None:
            gradients["constant"] = made.grad
        results.append((first, second, gradients))
        if patched:
            reasons = " ".join(path.reason for path in ledger_of(model).fallbacks.values())
            assert "not a number" in reasons
    assert results[1][:2] == pytest.approx(results[0][:2], rel=1e-5)
    theirs, ours = ({name: each for name, each in result[2].items() if each.dim()} for result in results)
    assert error_of(ours, theirs) < TOLERANCE
    for name in results[0][2].keys() - theirs.keys():
        # A number's gradient is a sum of terms that cancel: stock's own is up to 1.8e-5 from its gradient in fp64.
        assert results[1][2][name].item() == pytest.approx(results[0][2][name].item(), rel=5 * TOLERANCE)


def test_other_output_embeddings_are_not_the_head_that_stock_calls(toy, batch_of, equal_to_stock):
    model = toy()
    causal = model.get_base_model()
    other = nn.Linear(*reversed(causal.lm_head.weight.shape), bias=False).requires_grad_(False)
    causal.get_output_embeddings = lambda: other.to(causal.device)
    assert equal_to_stock(model, batch_of("none")) == {"lm_head": "get_output_embeddings is not its lm_head"}


class _Halving(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = function(*args, **(kwargs or {}))
        return 0.5 * given if function is nn.functional.silu else given


class _HalvingOperations(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = function(*args, **(kwargs or {}))
        return 0.5 * given if function is torch.ops.aten.silu.default else given


@pytest.mark.parametrize("mode", [_Halving, _HalvingOperations])
def test_a_mode_sees_stocks_calls(mode, toy, batch_of, error_of):
    """Over the forward only: what the engine computes again in the backward would be computed without it."""
    results = []
    for patched in (False, True):
        model = toy()
        batch = on_device(model, batch_of("none"))
        if patched:
            patch_model(model, backend="eager", placement="full")
        with mode():
            loss = model(**batch).loss
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((loss.item(), gradients))
        if patched:
            assert {path.reason for path in ledger_of(model).fallbacks.values()} == {
                f"{mode.__name__} is a mode that sees PyTorch's {'functions' if mode is _Halving else 'operations'}"
            }
            model(**batch).loss.backward()
            assert not ledger_of(model).fallbacks, "only for that call"
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert error_of(results[1][1], results[0][1]) < TOLERANCE


def test_a_default_device_changes_nothing(toy, batch_of, step, error_of):
    """Its mode only says where new tensors are, and the engine says that of its own."""
    model = toy(lora_dropout=0.1)
    patch_model(model, backend="eager", strict=True)
    batch = {**batch_of("none"), "position_ids": torch.arange(23)[None]}
    torch.manual_seed(5)
    loss, gradients = step(model, batch)
    copied = copy.deepcopy(model)
    torch.manual_seed(5)
    with torch.device("meta"):
        again, same = step(copied, batch)
    assert again == pytest.approx(loss, rel=1e-6)
    assert error_of(same, gradients) < TOLERANCE


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_on_the_meta_device_has_shapes_only(when, toy, batch_of, step):
    model = toy()
    patch_model(model, backend="eager")
    if when == "after":
        step(model, batch_of("none"))
    model = model.to("meta")
    output = model(**{name: tensor.to("meta") for name, tensor in batch_of("none").items()})
    output.loss.backward()
    assert output.loss.is_meta
    assert output.logits.shape == (4, 23, 512)
    assert "its weight is on the meta device" in ledger_of(model).fallbacks["layers.0"].reason


def test_the_look_at_stocks_inputs_leaves_no_trace_in_dynamic_angles(toy, batch_of, step, error_of):
    """A long forward without gradients, then the first with them: the angles are those of the long one, as in stock."""
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 8}
    results = []
    for patched in (False, True):
        model = toy(base={"rope_parameters": dynamic, "max_position_embeddings": 8})
        if patched:
            patch_model(model, backend="eager", strict=True)
        with torch.no_grad():
            model(**on_device(model, batch_of("none", S=70)))
        results.append((*step(model, batch_of("none")), model.get_base_model().model.rotary_emb.inv_freq))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert error_of(results[1][1], results[0][1]) < TOLERANCE
    assert torch.equal(results[1][2], results[0][2])
