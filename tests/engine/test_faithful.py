"""A patched model does what the stock model does, in ways of the kinds A to L of reported faults.

Every test asks a stock and a patched model the same question and compares the answers: losses, gradients, outputs,
what hooks saw, files.  `tests/engine/test_situations.py` draws the everyday combinations; here are the others.
"""

# B rows, S tokens a row, D model, V vocabulary

import contextlib
import copy
import dataclasses
import hashlib
import inspect
import io
import json
import pickle
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.modules.module as global_hooks
import torch.utils._pytree as pytree
import transformers
from accelerate.utils import concatenate, find_batch_size, send_to_device, slice_tensors
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.trainer_pt_utils import nested_concat, nested_detach, nested_numpify

from fastft import ledger_of, patch_hf_training, patch_model, unpatch_model
from fastft.errors import BackendError

TOLERANCE = 1e-4 if torch.cuda.is_available() else 2e-5  # ‖a − stock‖ / ‖stock‖ in fp32
FLOOR = 1e-3
"""Of the largest tensor beside it: a gradient that is a sum of nothing but rounding errors proves nothing."""
B, S, V = 2, 12, 512
IGNORED = -100
SMALL = {"num_hidden_layers": 2}

Ask = Callable[[Any], Any]
"""A question to a model: what comes of it is compared."""
Change = Callable[[Any], Any]
"""Something that is done to a model."""


# The batch


def on(model: Any, tensor: Tensor) -> Tensor:
    return tensor.to(next(model.parameters()).device)


IDS = torch.randint(3, V, (B, S), generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[1] * S, [1] * 7 + [0] * (S - 7)])
LABELS = IDS.masked_fill(MASK == 0, IGNORED)
EMBEDDINGS = torch.randn(B, S, 64, generator=torch.Generator().manual_seed(3))
PADDED: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
PLAIN: dict[str, Any] = {"input_ids": IDS, "labels": IDS}


def call(model: Any, **given: Any) -> Any:
    """The model on these arguments, of `PLAIN` where neither tokens nor embeddings are among them."""
    named = given if "input_ids" in given or "inputs_embeds" in given else {**PLAIN, **given}
    return model(**{name: on(model, value) if isinstance(value, Tensor) else value for name, value in named.items()})


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model: Any, **given: Any) -> Any:
    """Loss and gradients of one call."""
    model.zero_grad()
    loss = call(model, **given).loss
    loss.backward()
    return [loss.detach().clone(), gradients(model)]


def trained(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def layers(model: Any) -> Any:
    return model.get_base_model().model.layers


# The comparison


def settled(value: Any) -> Any:
    """The same with every tensor copied: what is late is made now."""
    if isinstance(value, Tensor):
        return value.detach().clone().cpu()
    if isinstance(value, dict):
        return {name: settled(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [settled(each) for each in value]
    return value


def size(value: Any) -> float:
    if isinstance(value, Tensor):
        return float(torch.linalg.vector_norm(value.double())) if value.is_floating_point() else 0.0
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return max(map(size, parts), default=0.0)


def differences(stock: Any, fast: Any, path: str = "answer", beside: float = 0.0) -> Iterator[str]:
    """What differs between two settled answers, a line each."""
    if isinstance(stock, dict) and isinstance(fast, dict) and stock.keys() == fast.keys():
        for name in stock:
            yield from differences(stock[name], fast[name], f"{path}.{name}", size(stock))
    elif isinstance(stock, list) and isinstance(fast, list) and len(stock) == len(fast):
        for index, (one, other) in enumerate(zip(stock, fast, strict=True)):
            yield from differences(one, other, f"{path}[{index}]", beside)
    elif isinstance(stock, Tensor) and isinstance(fast, Tensor) and stock.is_floating_point():
        if stock.shape != fast.shape or stock.dtype != fast.dtype:
            yield f"{path}: stock {stock.shape} {stock.dtype}, patched {fast.shape} {fast.dtype}"
        elif not torch.equal(stock.isfinite(), fast.isfinite()):
            yield f"{path}: not finite in other places"
        else:
            error = size(torch.where(stock.isfinite(), stock - fast, 0.0))
            allowed = TOLERANCE * max(size(torch.where(stock.isfinite(), stock, 0.0)), FLOOR * beside)
            if error > allowed:
                yield f"{path}: stock {size(stock):.6g}, patched differs by {error:.2g}"
    elif isinstance(stock, Tensor) and isinstance(fast, Tensor):
        if not torch.equal(stock, fast):
            yield f"{path}: stock {stock.flatten()[:8].tolist()}, patched {fast.flatten()[:8].tolist()}"
    elif isinstance(stock, float) and isinstance(fast, float):
        if stock != pytest.approx(fast, rel=TOLERANCE):
            yield f"{path}: stock {stock}, patched {fast}"
    elif type(stock) is not type(fast) or stock != fast:
        yield f"{path}: stock {str(stock)[:200]}, patched {str(fast)[:200]}"


class Answers(NamedTuple):
    stock: Any
    fast: Any
    ledger: dict[str, str]
    """By module's name, after the patched model was asked: its path, or why it ran stock."""


Same = Callable[..., Answers]


@pytest.fixture
def same(toy: Callable[..., Any], toy_base: Callable[..., Any]) -> Same:
    """Asks a stock and a patched model, and asserts that they say the same."""

    def answer(ask: Ask, fast: bool, adapt: Change | None, family: str, base: dict[str, Any], lora: Any) -> Any:
        with patch_hf_training(backend="eager") if fast else contextlib.nullcontext():
            settings = {**SMALL, **base}
            model = toy(family, base=settings, **lora) if adapt is None else adapt(toy_base(family, **settings))
            torch.manual_seed(5)
            found = settled(ask(model.train()))
            ledger = ledger_of(model)
            paths = {} if ledger is None else {name: path.reason or path.path for name, path in ledger.paths.items()}
            return found, paths

    def check(
        ask: Ask,
        *,
        family: str = "toy-llama",
        adapt: Change | None = None,
        base: dict[str, Any] | None = None,
        **lora: Any,
    ) -> Answers:
        (stock, _), (fast, ledger) = (answer(ask, each, adapt, family, base or {}, lora) for each in (False, True))
        assert not list(differences(stock, fast))
        return Answers(stock, fast, ledger)

    return check


def halved(value: Any) -> Any:
    return (0.5 * value[0], *value[1:]) if isinstance(value, tuple) else 0.5 * value


def halving(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: halved(function(*args, **kwargs))


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


# A: what runs is what stock would run


class Unattended(nn.Module):
    """A layer of somebody's own, between those of the family."""

    def forward(self, hidden: Tensor, **others: Any) -> Tensor:
        return torch.tanh(hidden)


class HalfBehind(nn.Module):
    """A backbone in a wrapper that passes attributes on and halves the output."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs)
        out.last_hidden_state = 0.5 * out.last_hidden_state
        return out

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["inner"], name)


def _own_attention_function(model: Any) -> None:
    ALL_ATTENTION_FUNCTIONS.register("halved_for_a_test", halving(ALL_ATTENTION_FUNCTIONS["sdpa"]))
    model.get_base_model().config._attn_implementation = "halved_for_a_test"


def _orthogonal_a(model: Any) -> None:
    torch.manual_seed(2)
    orthogonal(layers(model)[0].mlp.down_proj.lora_A["default"])


def _spectral_base(model: Any) -> None:
    torch.manual_seed(2)
    spectral_norm(layers(model)[0].self_attn.v_proj.base_layer)


def _a_for_two(model: Any) -> None:
    first, second = layers(model)
    second.mlp.up_proj.lora_A = first.mlp.up_proj.lora_A
    second.mlp.gate_proj.lora_B["default"] = second.mlp.up_proj.lora_B["default"]


def _weight_for_two(model: Any) -> None:
    first, second = layers(model)
    second.self_attn.q_proj.lora_A["default"].weight = first.self_attn.q_proj.lora_A["default"].weight


def _layers(*order: Any) -> Change:
    def change(model: Any) -> None:
        found = list(layers(model))
        made = [found[each] if isinstance(each, int) else each() for each in order]
        model.get_base_model().model.layers = nn.ModuleList(made)
        model.get_base_model().config.num_hidden_layers = len(made)

    return change


def _wrapped_backbone(model: Any) -> None:
    model.get_base_model().model = HalfBehind(model.get_base_model().model)


def _copied_backbone(model: Any) -> None:
    made = copy.deepcopy(model.get_base_model().model)
    with torch.no_grad():
        made.layers[0].mlp.up_proj.base_layer.weight.mul_(0.5)
    model.get_base_model().model = made


def _loss_of_the_peft_model(model: Any) -> None:
    forward = model.base_model.forward

    def half(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.loss = 0.5 * out.loss
        return out

    model.base_model.forward = half


CHANGES: dict[str, Change] = {
    "an attention function of another name": _own_attention_function,
    "A is orthogonal": _orthogonal_a,
    "B has a weight norm": lambda model: weight_norm(layers(model)[0].mlp.down_proj.lora_B["default"]),
    "a base linear has a spectral norm": _spectral_base,
    "adapters of two layers are one module": _a_for_two,
    "adapters of two layers have one weight": _weight_for_two,
    "a layer twice": _layers(0, 0, 1),
    "the layers in another list, reversed": _layers(1, 0),
    "a layer of somebody's own": _layers(0, Unattended, 1),
    "a layer's attention is another's": lambda model: setattr(
        layers(model)[1], "self_attn", layers(model)[0].self_attn
    ),
    "a wrapper around the decoder": _wrapped_backbone,
    "a changed copy of the decoder": _copied_backbone,
    "a loss that is halved outside": _loss_of_the_peft_model,
    "no final norm": lambda model: setattr(model.get_base_model().model, "norm", nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_after_a_step_is_what_runs(change: str, same: Same) -> None:
    def ask(model: Any) -> Any:
        step(model)
        CHANGES[change](model)
        found = [step(model, use_cache=False), step(model, **PADDED, use_cache=False)]
        buffers = {name: buffer for name, buffer in model.named_buffers() if "inv_freq" not in name}
        return [found, buffers]

    same(ask)


def _with_another_loss(out: Any) -> Any:
    out.loss = out.loss + 0.01 * out.logits.float().logsumexp(-1).square().mean()
    return out


class WithMoreLoss(transformers.LlamaForCausalLM):  # type: ignore[misc]
    def forward(self, input_ids: Any = None, labels: Any = None, **more: Any) -> Any:
        return _with_another_loss(super().forward(input_ids=input_ids, labels=labels, **more))


class WithScaledEmbeddings(transformers.LlamaForCausalLM):  # type: ignore[misc]
    def forward(self, input_ids: Any = None, labels: Any = None, **more: Any) -> Any:
        return super().forward(inputs_embeds=2 * self.model.embed_tokens(input_ids), labels=labels, **more)


class WithALossOfHiddenStates(transformers.LlamaForCausalLM):  # type: ignore[misc]
    def forward(self, input_ids: Any = None, labels: Any = None, **more: Any) -> Any:
        out = super().forward(input_ids=input_ids, labels=labels, output_hidden_states=True, **more)
        out.loss = out.loss + out.hidden_states[1].square().mean() + out.hidden_states[-1].mean()
        return out


class WithItsOwnForward(transformers.LlamaForCausalLM):  # type: ignore[misc]
    def forward(self, input_ids: Any = None, labels: Any = None, attention_mask: Any = None, **more: Any) -> Any:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = 30 * torch.tanh(self.lm_head(torch.tanh(hidden)) / 30)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


class FasterTurning(modeling_llama.LlamaRotaryEmbedding):
    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        return super().forward(x, 2 * position_ids)


class WithAnotherRotation(transformers.LlamaForCausalLM):  # type: ignore[misc]
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.rotary_emb = FasterTurning(config)


class HalfLayer(modeling_llama.LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states + 0.5 * (super().forward(hidden_states, *args, **kwargs) - hidden_states)


class WithOtherLayers(transformers.LlamaForCausalLM):  # type: ignore[misc]
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers = nn.ModuleList(HalfLayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()


class OfTheSameName(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """A subclass that changes nothing."""


class UnknownConfig(transformers.LlamaConfig):  # type: ignore[misc]
    model_type = "llama_of_a_test"


SUBCLASSES = [
    WithMoreLoss, WithScaledEmbeddings, WithALossOfHiddenStates, WithItsOwnForward, WithAnotherRotation,
    WithOtherLayers, OfTheSameName,
]  # fmt: skip


@pytest.mark.parametrize("known", [True, False], ids=["llama", "another model_type"])
@pytest.mark.parametrize("kind", SUBCLASSES, ids=lambda kind: kind.__name__)
def test_a_subclass_as_remote_code_brings_it(kind: Any, known: bool, same: Same) -> None:
    def adapt(base: Any) -> Any:
        config = base.config
        if not known:
            kept = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "dtype")}
            config = UnknownConfig(**kept)
        torch.manual_seed(4)
        made = kind._from_config(config, attn_implementation="sdpa").to(base.device, torch.float32)
        return peft.get_peft_model(
            made, peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        )

    def ask(model: Any) -> Any:
        out = call(model, **PADDED)
        (out.loss + 0.01 * out.logits.square().mean()).backward()
        return [out.loss, out.logits, gradients(model), step(model)]

    same(ask, adapt=adapt)


TARGETS = ["q_proj", "v_proj", "down_proj"]
METHODS: dict[str, Callable[[], Any]] = {
    "AdaptionPrompt": lambda: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"),
    "P-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "BOFT": lambda: peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=4),
    "HRA": lambda: peft.HRAConfig(r=4, target_modules=TARGETS),
    "FourierFT": lambda: peft.FourierFTConfig(target_modules=TARGETS, n_frequency=20),
    "RandLora": lambda: peft.RandLoraConfig(target_modules=TARGETS, r=4),
    "SHiRA": lambda: peft.ShiraConfig(target_modules=TARGETS, r=2),
    "C3A": lambda: peft.C3AConfig(target_modules=["q_proj"], block_size=16),
    "DoRA with rsLoRA": lambda: peft.LoraConfig(
        target_modules=TARGETS, use_dora=True, use_rslora=True, init_lora_weights=False
    ),
    "aLoRA": lambda: peft.LoraConfig(
        target_modules=TARGETS, init_lora_weights=False, alora_invocation_tokens=IDS[0, 5:7].tolist(),
        task_type="CAUSAL_LM",
    ),
    "target_parameters": lambda: peft.LoraConfig(
        target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"], init_lora_weights=False
    ),
    "modules_to_save": lambda: peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["up_proj"], init_lora_weights=False
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_another_method_of_peft(method: str, same: Same) -> None:
    def adapt(base: Any) -> Any:
        torch.manual_seed(4)
        return peft.get_peft_model(base, METHODS[method]())

    def ask(model: Any) -> Any:
        logits = call(model, input_ids=IDS, attention_mask=MASK, use_cache=False).logits
        return [step(model, use_cache=False), step(model, **PADDED, use_cache=False), logits]

    same(ask, adapt=adapt)


def _two_adapters(base: Any) -> Any:
    torch.manual_seed(4)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=TARGETS, init_lora_weights=False))
    more = peft.LoraConfig(target_modules=["k_proj", "down_proj"], r=3, init_lora_weights=False)
    model.add_adapter("second", more)
    return model


def _weighted(model: Any) -> Any:
    model.add_weighted_adapter(["default", "second"], [0.5, 0.7], "both", combination_type="cat")
    model.set_adapter("both")
    return step(model)


def _another_of_the_same_name(model: Any) -> Any:
    model.set_adapter("second")
    model.delete_adapter("default")
    torch.manual_seed(3)
    model.add_adapter("default", peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False))
    model.set_adapter("default")
    return step(model)


def _hot_swapped(model: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=["default"])
        with torch.no_grad():
            for parameter in trained(model).values():
                parameter.mul_(0.3)
        hotswap_adapter(model, folder, adapter_name="default")
    return step(model)


def _loaded_beside(model: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=["second"])
        model.load_adapter(f"{folder}/second", "third", is_trainable=True)
    model.set_adapter("third")
    return step(model)


def _mixed(model: Any) -> Any:
    model.eval()
    names = (["default", "second"], ["__base__", "second"])
    return [call(model, input_ids=IDS, adapter_names=each).logits for each in names] + [step(model.train())]


def _rescaled(model: Any) -> Any:
    with rescale_adapter_scale(model, 0.3):
        inside = step(model)
    return [inside, step(model)]


def _one_merged(model: Any) -> Any:
    model.merge_adapter(["second"])
    merged = step(model)
    model.unmerge_adapter()
    return [merged, step(model)]


def _compared_with_the_base(model: Any) -> Any:
    """As preference losses do it: a second forward without adapters, in the same graph's step."""
    model.zero_grad()
    out = call(model)
    with model.disable_adapter():
        reference = call(model)
    (out.loss - reference.loss.detach()).square().backward()
    return [out.loss, reference.loss, reference.loss.requires_grad, gradients(model)]


SWAPS: dict[str, Ask] = {
    "weighted": _weighted,
    "another of the same name": _another_of_the_same_name,
    "hot-swapped": _hot_swapped,
    "loaded beside": _loaded_beside,
    "a mixed batch": _mixed,
    "rescaled": _rescaled,
    "one merged": _one_merged,
    "compared with the base": _compared_with_the_base,
}


@pytest.mark.parametrize("swap", SWAPS)
def test_adapters_that_are_exchanged_after_a_step(swap: str, same: Same) -> None:
    same(lambda model: [step(model), SWAPS[swap](model)], adapt=_two_adapters)


def test_a_forward_of_the_class_that_is_replaced_and_put_back(same: Same) -> None:
    def ask(model: Any) -> Any:
        found = [step(model)]
        kind = type(model.get_base_model())
        original = kind.forward
        with replaced(kind, "forward", lambda *args, **kwargs: _with_another_loss(original(*args, **kwargs))):
            found.append(step(model))
        return [*found, step(model)]

    same(ask)


# B, F: outputs, wherever and however they are read


class Squares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square().mean()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad_outputs[0] * 2 * x / x.numel()


def _parts_of(logits: Tensor) -> Any:
    return [
        logits[..., -1], logits.gather(-1, IDS.to(logits.device)[..., None]), list(logits)[1],
        torch.stack([logits, logits]),
        logits.topk(3).indices, torch.where(logits > 0, logits, 0.0), logits.type(torch.float64), len(logits),
        torch.zeros_like(logits), logits.masked_fill(logits < 0, 0.0), [each.shape for each in logits.unbind()],
        isinstance(logits, Tensor), torch.is_tensor(logits), bool((logits == logits).all()),
    ]  # fmt: skip


def _through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _facts_of(logits: Tensor) -> Any:
    return [
        logits.detach().cpu().numpy().shape, logits.stride(), logits.is_contiguous(), logits.nbytes, logits.itemsize,
        logits.untyped_storage().nbytes(), logits.is_leaf, logits.mT.shape, logits._version, logits.requires_grad,
    ]  # fmt: skip


OUTPUTS: dict[str, Ask] = {
    "in parts": lambda out: _parts_of(out.logits),
    "facts": lambda out: _facts_of(out.logits),
    "to a device": lambda out: send_to_device(out, "cpu").logits,
    "batch size": lambda out: find_batch_size({"logits": out.logits}),
    "concatenated": lambda out: concatenate([{"logits": out.logits}, {"logits": out.logits}]),
    "sliced": lambda out: slice_tensors({"logits": out.logits}, slice(0, 1)),
    "as Trainer gathers": lambda out: nested_concat(nested_detach(out.logits), nested_detach(out.logits)),
    "as Trainer predicts": lambda out: torch.from_numpy(nested_numpify(nested_detach(out.logits))),
    "dataclasses.replace": lambda out: dataclasses.replace(out, loss=None).logits,
    "names": lambda out: [[f.name for f in dataclasses.fields(out)], list(vars(out)), list(reversed(out)), bool(out)],
    "tree_map_only": lambda out: pytree.tree_map_only(Tensor, lambda tensor: 2 * tensor, out).logits,
    "tree and back": lambda out: pytree.tree_unflatten(*pytree.tree_flatten(out)).logits,
    "through a file": lambda out: [_through_a_file(out.logits), _through_a_file(out).logits],
    "torch.ops": lambda out: torch.ops.aten.logsumexp(out.logits, [-1]),
    "torch.func.grad": lambda out: torch.func.grad(lambda x: x.logsumexp(-1).sum())(out.logits.detach()),
    "twice": lambda out: [out.logits, out["logits"], out[1], out.get("logits"), out.logits is out["logits"]],
}


@pytest.mark.parametrize("reading", OUTPUTS)
def test_an_output_however_it_is_read(reading: str, same: Same) -> None:
    same(lambda model: [OUTPUTS[reading](call(model, **given, use_cache=False)) for given in (PLAIN, PADDED)])


OBJECTIVES: dict[str, Callable[[Any], Tensor]] = {
    "a function of one's own": lambda out: out.loss + Squares.apply(out.logits),
    "the loss of two outputs": lambda out: out.loss + out.logits.float().logsumexp(-1).mean(),
    "changed in place": lambda out: out.loss + out.logits.div_(2.0).square().mean(),
    "first without gradients": lambda out: [out.logits.detach().argmax(-1), out.loss + out.logits.square().mean()][1],
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_made_of_logits_reaches_the_adapters(objective: str, same: Same) -> None:
    def ask(model: Any) -> Any:
        total = OBJECTIVES[objective](call(model))
        total.backward()
        return [total, gradients(model)]

    same(ask)


def test_logits_of_padding_have_gradients_of_their_own(same: Same) -> None:
    """Two outputs with padding are alive at once, and both are differentiated at padded positions too."""

    def ask(model: Any) -> Any:
        first = call(model, **PADDED)
        second = call(model, input_ids=IDS.flip(0), attention_mask=MASK, labels=LABELS)
        (first.logits.square().mean() + second.logits.square().mean() + first.loss).backward()
        return [first.logits, second.logits, gradients(model)]

    same(ask)


def test_gradients_are_given_for_loss_and_logits_at_once(same: Same) -> None:
    def ask(model: Any) -> Any:
        out = call(model, **PADDED)
        torch.autograd.backward([out.loss, out.logits], [None, torch.ones_like(out.logits)])
        return gradients(model)

    same(ask)


def test_a_cache_goes_on_where_the_training_forward_ended(same: Same) -> None:
    def ask(model: Any) -> Any:
        out = call(model, use_cache=True)
        cache = out.past_key_values
        more = call(model, input_ids=IDS[:, :2], past_key_values=cache)
        (out.loss + 1e-3 * more.logits.sum()).backward()
        return [cache.get_seq_length(), len(cache), isinstance(cache, transformers.DynamicCache), more.logits,
                gradients(model)]  # fmt: skip

    same(ask)


# C, I: nothing that was given is dropped

ALLOWED_SS = torch.ones(S, S, dtype=torch.bool).tril()
ADDED_SS = torch.zeros(S, S).masked_fill(~ALLOWED_SS, -1e9)
PREFIX_SS = ALLOWED_SS | (torch.arange(S) < 4)
MASKS: dict[str, Tensor] = {
    "numbers of documents": torch.tensor([[1] * 6 + [2] * 6] * B),
    "negative": -MASK,
    "halves": 0.5 * MASK,
    "uint8": MASK.to(torch.uint8),
    "int8, left": MASK.flip(1).to(torch.int8),
    "a hole": (torch.arange(S) != 4).long().expand(B, -1),
    "no token": torch.zeros_like(MASK),
    "4-D, one for all rows": ADDED_SS[None, None],
    "4-D, one a head": ADDED_SS.expand(B, 4, S, S),
    "4-D, a prefix is seen by all": torch.zeros(S, S).masked_fill(~PREFIX_SS, -1e9).expand(B, 1, S, S),
    "4-D, infinite": torch.zeros(S, S).masked_fill(~ALLOWED_SS, float("-inf")).expand(B, 1, S, S),
}
POSITIONS: dict[str, Tensor] = {
    "negative": torch.arange(S)[None] - 3,
    "floats": torch.arange(S)[None].float(),
    "int32": torch.arange(S, dtype=torch.int32)[None],
    "late": torch.arange(S)[None] + 1000,
    "each twice": (torch.arange(S) // 2)[None].expand(B, -1),
    "rows differ": torch.stack([torch.arange(S), torch.arange(S) % 5]),
}


@pytest.mark.parametrize(
    ("mask", "attention"),
    [*((mask, "sdpa") for mask in MASKS), *((mask, "eager") for mask in MASKS if mask.startswith(("4-D", "a hole")))],
)
def test_a_mask_reaches_fused_and_stock_layers(mask: str, attention: str, same: Same) -> None:
    def ask(model: Any) -> Any:
        given = {"input_ids": IDS, "labels": IDS, "attention_mask": MASKS[mask]}
        found = [step(model, **given), call(model, **given).logits]
        handle = layers(model)[1].mlp.register_forward_hook(lambda *_: None)  # that layer is stock now
        found += [step(model, **given), step(model, **given, output_hidden_states=True)]
        handle.remove()
        return [*found, step(model, **given)]

    same(ask, base={"attn_implementation": attention})


@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_reach_fused_and_stock_layers(positions: str, same: Same) -> None:
    """Without a cache stock takes what starts anew for documents; with one it does not."""

    def ask(model: Any) -> Any:
        given = {"position_ids": POSITIONS[positions]}
        calls = [{"use_cache": True}, {"use_cache": False}, {**PADDED, "use_cache": False}]
        found = [step(model, **given, **more) for more in calls]
        layers(model)[0].mlp.register_forward_hook(lambda *_: None)
        return [*found, *(step(model, **given, **more) for more in calls)]

    same(ask)


@pytest.mark.parametrize("family", ["toy-llama", "toy-qwen2", "toy-gemma2"])
def test_who_watches_a_layer_sees_all_that_stock_hands_over(family: str, same: Same) -> None:
    def ask(model: Any) -> Any:
        seen: list[Any] = []

        def hook(module: nn.Module, args: Any, named: dict[str, Any]) -> None:
            tensors = {name: value.clone() for name, value in named.items() if isinstance(value, Tensor)}
            seen.append([len(args), sorted(set(named) - {"return_dict"}), tensors])

        for module in (model.get_base_model().model, layers(model)[0], layers(model)[1].self_attn):
            module.register_forward_pre_hook(hook, with_kwargs=True)
        step(model, **PADDED, something=3, num_items_in_batch=9)
        step(model, use_cache=False)
        return seen

    attention = "eager" if family == "toy-gemma2" else "sdpa"
    same(ask, family=family, base={"attn_implementation": attention})


def test_an_attention_function_gets_the_callers_keywords(same: Same) -> None:
    def ask(model: Any) -> Any:
        seen: list[Any] = []

        def attend(*args: Any, **kwargs: Any) -> Any:
            seen.append({name: value for name, value in sorted(kwargs.items()) if isinstance(value, (int, float, str))})
            return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)

        ALL_ATTENTION_FUNCTIONS.register("watched_for_a_test", attend)
        model.get_base_model().config._attn_implementation = "watched_for_a_test"
        return [step(model, told="something"), seen]

    assert same(ask).fast[1]


@pytest.mark.parametrize(
    "more",
    [
        {"shift_labels": LABELS.roll(-1, 1)}, {"cache_position": torch.arange(S)}, {"return_loss": True},
        {"cu_seq_lens_q": torch.tensor([0, S, B * S], dtype=torch.int32), "max_length_q": S},
        {"num_items_in_batch": torch.tensor([30])}, {"num_items_in_batch": 0}, {"logits_to_keep": S},
    ],
    ids=["shift_labels", "cache_position", "return_loss", "cu_seq_lens", "items of one", "no items", "all kept"],
)  # fmt: skip
def test_further_arguments(more: dict[str, Any], same: Same) -> None:
    same(lambda model: [step(model, **PADDED, **more), call(model, **PADDED, **more).logits])


BAD: dict[str, dict[str, Any]] = {
    "neither ids nor embeddings": {"input_ids": None},
    "both": {"input_ids": IDS, "inputs_embeds": EMBEDDINGS},
    "ids of another type": {**PLAIN, "input_ids": IDS.float()},
    "labels as a list": {**PLAIN, "labels": IDS.tolist()},
    "fewer logits than labels": {**PLAIN, "logits_to_keep": 3},
    "embeddings of another dtype": {"inputs_embeds": EMBEDDINGS.double(), "labels": IDS},
}


@pytest.mark.parametrize("bad", BAD)
def test_what_stock_refuses_is_refused_as_stock_does(bad: str, same: Same) -> None:
    def ask(model: Any) -> Any:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            call(model, **BAD[bad])
        return [type(caught.value).__name__, step(model)]

    same(ask)


# D: derivatives


def _functional(model: Any, **given: Any) -> Callable[[Any], Tensor]:
    named = {name: on(model, value) for name, value in {**PLAIN, **given}.items() if isinstance(value, Tensor)}
    return lambda weights: torch.func.functional_call(model, weights, (), {**named, "use_cache": False}).loss


def _of_each_sample(model: Any) -> Any:
    def loss(weights: dict[str, Tensor], ids_S: Tensor) -> Tensor:
        named = {"input_ids": ids_S[None], "labels": ids_S[None], "use_cache": False}
        return torch.func.functional_call(model, weights, (), named).loss

    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained(model), on(model, IDS))


def _of_duals(model: Any) -> Any:
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, p.detach()) for name, p in trained(model).items()}
        return list(forward_ad.unpack_dual(_functional(model)(duals)))


TRANSFORMS: dict[str, Ask] = {
    "grad": lambda model: torch.func.grad(_functional(model))(trained(model)),
    "vjp": lambda model: torch.func.vjp(_functional(model), trained(model))[1](on(model, torch.tensor(1.0)))[0],
    "jvp": lambda model: list(torch.func.jvp(_functional(model), (trained(model),), (trained(model),))),
    "a gradient a sample": _of_each_sample,
    "dual numbers": _of_duals,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_what_torch_func_transforms_is_stocks(transform: str, same: Same) -> None:
    answers = same(TRANSFORMS[transform], base={"attn_implementation": "eager"})
    why = "forward-mode automatic differentiation is on" if transform == "dual numbers" else "torch.func transforms it"
    assert set(answers.ledger.values()) == {why}


def test_a_penalty_that_is_differentiated_for_all_says_that_it_cannot_be(toy: Callable[..., Any]) -> None:
    model = toy(base=SMALL)
    patch_model(model, backend="eager")
    found = torch.autograd.grad(call(model).loss, list(trained(model).values()), create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.stack([each.square().sum() for each in found]).sum().backward()


def _updated_in_the_backward(model: Any) -> Any:
    def hook(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter.add_(parameter.grad, alpha=-0.05)  # type: ignore[arg-type]
        parameter.grad = None

    for parameter in trained(model).values():
        parameter.register_post_accumulate_grad_hook(hook)
    found = []
    for _ in range(3):
        loss = call(model).loss
        loss.backward()
        found.append(loss)
    return found


def _made_by_another_network(model: Any) -> Any:
    factor = on(model, torch.tensor(0.5)).requires_grad_()
    loss = _functional(model)({name: p.detach() * factor for name, p in trained(model).items()})
    loss.backward()
    return [loss, factor.grad]


def _of_hidden_states(model: Any) -> Any:
    out = call(model, output_hidden_states=True)
    return list(torch.autograd.grad(out.loss, out.hidden_states[1:]))


def _of_attentions(model: Any) -> Any:
    out = call(model, output_attentions=True)
    return list(torch.autograd.grad(out.loss, out.attentions))


def _of_an_embedding_that_a_hook_cut_off(model: Any) -> Any:
    seen = []

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        seen.append(out.detach().requires_grad_())
        return seen[0]

    model.get_input_embeddings().register_forward_hook(hook)
    call(model, **PADDED).loss.backward()
    return seen[0].grad


def _in_another_thread(model: Any) -> Any:
    loss = call(model).loss
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    return gradients(model)


def _by_hooks_on_gradients(model: Any) -> Any:
    seen: dict[str, Tensor] = {}
    for name, parameter in trained(model).items():
        parameter.register_hook(lambda gradient, name=name: seen.__setitem__(name, gradient.clone()))
    counts: list[int] = []
    torch.autograd.graph.register_multi_grad_hook(list(trained(model).values()), lambda all_: counts.append(len(all_)))
    return [step(model), seen, counts]


def _clipped_in_a_graph(model: Any) -> Any:
    call(model).loss.backward(create_graph=True)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    return gradients(model)


def _inside_no_grad(model: Any) -> Any:
    with torch.no_grad(), torch.enable_grad():
        loss = call(model).loss
    loss.backward()
    return gradients(model)


def _of_a_position(model: Any) -> Any:
    embeds = on(model, EMBEDDINGS[:1, :3])
    return torch.autograd.functional.jacobian(lambda x: model(inputs_embeds=x).logits[0, -1, :4], embeds)


DERIVATIVES: dict[str, Ask] = {
    "updated in the backward": _updated_in_the_backward,
    "weights that another network made": _made_by_another_network,
    "of hidden states": _of_hidden_states,
    "of attention weights": _of_attentions,
    "of an embedding that a hook cut off": _of_an_embedding_that_a_hook_cut_off,
    "in another thread": _in_another_thread,
    "hooks on gradients": _by_hooks_on_gradients,
    "clipped in a graph": _clipped_in_a_graph,
    "grad inside no_grad": _inside_no_grad,
    "a Jacobian of embeddings": _of_a_position,
}


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_first_derivatives_of_every_kind(derivative: str, same: Same) -> None:
    same(DERIVATIVES[derivative], base={"attn_implementation": "eager"})


# E: constants that change


def _all_layers(name: str, value: Any) -> Change:
    def change(model: Any) -> None:
        for layer in layers(model):
            setattr(layer.self_attn, name, value)

    return change


def _another_theta(model: Any) -> None:
    backbone = model.get_base_model().model
    config = copy.deepcopy(backbone.config)
    config.rope_parameters["rope_theta"] = 7.0
    backbone.rotary_emb = type(backbone.rotary_emb)(config).to(backbone.device)


def _other_frequencies(model: Any) -> None:
    rotary = model.get_base_model().model.rotary_emb
    rotary.inv_freq = 0.5 * rotary.inv_freq


def _config_of_the_model(**values: Any) -> Change:
    def change(model: Any) -> None:
        causal = model.get_base_model()
        causal.config = copy.deepcopy(causal.config)
        for name, value in values.items():
            setattr(causal.config, name, value)

    return change


def _epsilon_as_a_tensor(model: Any) -> None:
    layers(model)[0].input_layernorm.variance_epsilon = on(model, torch.tensor(0.5))


CONSTANTS: dict[str, tuple[str, Change]] = {
    "dropout of attention": ("toy-llama", _all_layers("attention_dropout", 1e-12)),
    "scaling in one layer": ("toy-llama", lambda model: setattr(layers(model)[1].self_attn, "scaling", 0.05)),
    "theta": ("toy-llama", _another_theta),
    "frequencies": ("toy-llama", _other_frequencies),
    "epsilon as a tensor": ("toy-llama", _epsilon_as_a_tensor),
    "divisor of logits": ("toy-granite", _config_of_the_model(logits_scaling=5.0)),
    "multiplier of embeddings": (
        "toy-granite", lambda model: setattr(model.get_base_model().model, "embedding_multiplier", 1.5)
    ),
    "multiplier of one residual": (
        "toy-granite", lambda model: setattr(layers(model)[0], "residual_multiplier", 0.9)
    ),
    "soft-cap of logits": ("toy-gemma2", _config_of_the_model(final_logit_softcapping=0.7)),
    "window of the whole model": (
        "toy-mistral", lambda model: setattr(model.get_base_model().config, "sliding_window", 3)
    ),
    "largest norm of embeddings": (
        "toy-llama", lambda model: setattr(model.get_input_embeddings(), "max_norm", 0.5)
    ),
}  # fmt: skip


@pytest.mark.parametrize("constant", CONSTANTS)
def test_a_constant_that_changes_after_a_step(constant: str, same: Same) -> None:
    family, change = CONSTANTS[constant]

    def ask(model: Any) -> Any:
        before = step(model)
        change(model)
        return [before, step(model), step(model, **PADDED), call(model, **PADDED).logits]

    answers = same(ask, family=family, base={"attn_implementation": "eager"})
    if constant != "dropout of attention":
        assert list(differences(answers.stock[0], answers.stock[1])), "the change changes nothing"


@pytest.mark.parametrize("fill", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_finite(fill: float, same: Same) -> None:
    def ask(model: Any) -> Any:
        with torch.no_grad():
            layers(model)[0].mlp.up_proj.base_layer.weight[0, 0] = fill
        return call(model).loss.isfinite()

    same(ask)


# G: torch.compile


def _compiled(model: Any) -> Any:
    compiled = torch.compile(model, backend="eager")
    loss = compiled(**{name: on(model, tensor) for name, tensor in PADDED.items()}).loss
    loss.backward()
    return [loss.detach(), gradients(model)]


def _compiled_layer_by_layer(model: Any) -> Any:
    for layer in layers(model):
        layer.compile(backend="eager")
    return step(model)


COMPILED: dict[str, Ask] = {
    "the model": _compiled,
    "layer by layer": _compiled_layer_by_layer,
}


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("what", COMPILED)
def test_compiled_losses_and_gradients(what: str, same: Same) -> None:
    def ask(model: Any) -> Any:
        torch._dynamo.reset()
        return COMPILED[what](model)

    same(ask, base={"num_hidden_layers": 1})


# H: files

_LOADS = """
import json, sys
sys.modules["fastft"] = None
import torch
folder, found = sys.argv[1], []
ids = torch.load(folder + "/ids.pt")
for name in ("model", "merged", "model"):
    if len(found) == 2:
        del sys.modules["fastft"]
        import fastft
    model = torch.load(f"{folder}/{name}.pt", weights_only=False, map_location="cpu").train()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    square = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
    left = [name for module in model.modules() for name in vars(module) if "fastft" in name or name == "forward"]
    found.append([loss.item(), square, type(model).__name__, left])
print(json.dumps(found))
"""


def test_a_model_that_trains_loads_in_another_process(toy: Callable[..., Any], tmp_path: Path) -> None:
    """And so does what a merge leaves of it: where fastft cannot be imported, and where it was, with nothing of it."""
    model = toy(base=SMALL)
    loss, stock = step(model)
    with patch_hf_training(backend="eager"):
        model = toy(base=SMALL)
        step(model)
        torch.save(model, tmp_path / "model.pt")
        assert not list(differences([loss, stock], step(model))), "saving changed the model"
        merged = model.merge_and_unload()
        for parameter in merged.model.layers[0].mlp.parameters():
            parameter.requires_grad_(True)
        torch.save(merged, tmp_path / "merged.pt")
    torch.save(IDS, tmp_path / "ids.pt")
    command = [sys.executable, "-c", _LOADS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    without, of_merged, with_it = json.loads(done.stdout.splitlines()[-1])
    squares = sum(float(g.double().square().sum()) for g in stock.values())
    stocks = pytest.approx(loss.item(), rel=1e-4)
    assert without == [stocks, pytest.approx(squares, rel=1e-3), "PeftModelForCausalLM", []]
    assert with_it == without
    assert of_merged == [stocks, pytest.approx(of_merged[1]), "LlamaForCausalLM", []]
    assert of_merged[1] > 0


def _by_python(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    pickle._Pickler(file).dump(model)  # type: ignore[attr-defined]
    file.seek(0)
    return pickle.load(file)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["2", "5", "by Python"])
def test_a_pickled_model_trains_as_the_model_does(how: str, same: Same) -> None:
    def ask(model: Any) -> Any:
        step(model)
        loaded = _by_python(model) if how == "by Python" else pickle.loads(pickle.dumps(model, int(how)))
        return [step(loaded), step(model)]

    same(ask)


def test_a_layer_by_itself_is_saved_and_copied(same: Same) -> None:
    def ask(model: Any) -> Any:
        step(model)
        hidden = on(model, EMBEDDINGS).clone().requires_grad_()
        positions = torch.arange(S, device=hidden.device)[None]
        angles = model.get_base_model().model.rotary_emb(hidden, positions)
        found = []
        for layer in (layers(model)[0], copy.deepcopy(layers(model)[0]), _through_a_file(layers(model)[0])):
            layer.zero_grad()
            hidden.grad = None
            y = layer(hidden, position_embeddings=angles)
            y.square().mean().backward()
            found.append([y, hidden.grad, gradients(layer)])
        return found

    same(ask)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _saved_bytes(value: Any) -> int:
    file = io.BytesIO()
    torch.save(value, file)
    return len(file.getvalue()) // 1024


def _files_of_the_adapter(model: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {
            path.name: _digest(path.read_bytes()) for path in sorted(Path(folder).iterdir()) if path.suffix != ".md"
        }


def test_files_have_stocks_bytes(same: Same) -> None:
    """Before a step the numbers are the same to the bit, and so are the files; behind one, their sizes."""

    def ask(model: Any) -> Any:
        files = _files_of_the_adapter(model)
        call(model)  # the engine gathers the adapters
        again = _files_of_the_adapter(model)
        optimizer = torch.optim.AdamW(list(trained(model).values()))
        step(model)
        optimizer.step()
        adapter = peft.get_peft_model_state_dict(model)
        sizes = [
            *(_saved_bytes(tensor) for tensor in list(adapter.values())[:3]), _saved_bytes(adapter),
            _saved_bytes(optimizer.state_dict()), _saved_bytes(model.state_dict()),
        ]  # fmt: skip
        return [files, again, sizes, list(model.state_dict())]

    answers = same(ask)
    assert "adapter_model.safetensors" in answers.fast[0]
    assert answers.fast[0] == answers.fast[1]


def test_the_saved_bytes_of_one_adapter_tensor_are_its_own(toy: Callable[..., Any]) -> None:
    model = toy(base=SMALL)
    patch_model(model, backend="eager")
    step(model)
    for parameter in list(trained(model).values())[:4]:
        file = io.BytesIO()
        torch.save(parameter.detach(), file)
        content = file.getvalue()
        values = parameter.detach().cpu().contiguous().numpy().tobytes()
        assert values in content
        assert len(content) < len(values) + 4096


def _assigned(model: Any) -> Any:
    state = {name: (0.5 if "lora_" in name else 1.0) * tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return [step(model), [p.requires_grad for p in model.parameters()]]


def _emptied_and_filled(model: Any) -> Any:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=next(model.parameters()).device)
    model.load_state_dict(state)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return step(model)


def _wider_by_data(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            a.data, b.data = torch.cat([a.data, a.data]), torch.cat([b.data, b.data], 1)
    return step(model)


def _copied_while_a_graph_waits(model: Any) -> Any:
    model.zero_grad()
    loss = call(model).loss
    made = copy.deepcopy(model)
    other = call(made, **PADDED).loss
    loss.backward()
    other.backward()
    return [loss, other, gradients(model), gradients(made)]


def _shallow_copies(model: Any) -> Any:
    causal = copy.copy(model.get_base_model())
    return [step(copy.copy(model)), step(causal), type(causal).__name__]


STORED: dict[str, Ask] = {
    "assigned": _assigned,
    "emptied and filled": _emptied_and_filled,
    "ranks doubled": _wider_by_data,
    "copied while a graph waits": _copied_while_a_graph_waits,
    "shallow copies": _shallow_copies,
}


@pytest.mark.parametrize("way", STORED)
def test_weights_that_are_stored_anew_after_a_step(way: str, same: Same) -> None:
    same(lambda model: [step(model), STORED[way](model)])


OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "SGD with momentum": lambda weights: torch.optim.SGD(weights, lr=0.05, momentum=0.9, foreach=True),
    "AdamW, fused": lambda weights: torch.optim.AdamW(weights, lr=0.01, eps=0.01, fused=True),
    "Adafactor": lambda weights: torch.optim.Adafactor(weights),
    "Adagrad": lambda weights: torch.optim.Adagrad(weights, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_step_as_with_stock(name: str, same: Same) -> None:
    def ask(model: Any) -> Any:
        optimizer, losses = OPTIMIZERS[name](list(trained(model).values())), []
        for _ in range(4):
            losses.append(step(model, **PADDED)[0])
            optimizer.step()
        return losses

    same(ask)


# J: who watches


Register = Callable[[nn.Module, Callable[..., Any]], Any]
REGISTERED: dict[str, Register] = {
    "always called": lambda module, hook: module.register_forward_hook(hook, always_call=True),
    "first": lambda module, hook: module.register_forward_hook(hook, prepend=True),
}
WATCHED = ["mlp", "mlp.act_fn", "self_attn.q_proj.lora_A.default", "self_attn.q_proj.base_layer",
           "post_attention_layernorm"]  # fmt: skip


@pytest.mark.parametrize("kind", REGISTERED)
@pytest.mark.parametrize("path", WATCHED)
def test_a_hook_of_another_kind_in_one_layer(path: str, kind: str, same: Same) -> None:
    def ask(model: Any) -> Any:
        step(model)
        seen: list[Any] = []

        def hook(module: nn.Module, given: Any, out: Any) -> None:
            values = [*given, *(out if isinstance(out, tuple) else (out,))]
            seen.append([value.clone() for value in values if isinstance(value, Tensor)])

        handle = REGISTERED[kind](layers(model)[1].get_submodule(path), hook)
        found = step(model)
        handle.remove()
        return [found, seen, step(model)]

    assert same(ask).fast[1]


@pytest.mark.parametrize("register", ["forward_hook", "full_backward_pre_hook"])
def test_a_hook_on_all_modules_sees_as_many(register: str, same: Same) -> None:
    def ask(model: Any) -> Any:
        seen: list[str] = []
        more = {"always_call": True} if register == "forward_hook" else {}
        add = getattr(global_hooks, f"register_module_{register}")
        handle = add(lambda module, *_: seen.append(type(module).__name__), **more)
        try:
            step(model)
        finally:
            handle.remove()
        return [sorted(seen), step(model)]

    assert same(ask).fast[0]


def test_hooks_around_the_layers_see_what_stock_gives(same: Same) -> None:
    def ask(model: Any) -> Any:
        seen: list[Tensor] = []
        causal = model.get_base_model()
        causal.model.norm.register_forward_hook(lambda module, given, out: seen.extend([given[0].clone(), out.clone()]))
        causal.model.rotary_emb.register_forward_hook(lambda module, given, out: seen.append(out[0].clone()))
        causal.lm_head.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
        return [step(model, **PADDED), seen]

    same(ask)


class Looking(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def _in_double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "a dispatch mode": Looking,
    "anomaly mode": torch.autograd.detect_anomaly,
    "deterministic": _deterministic,
    "the mathematical attention": lambda: sdpa_kernel(SDPBackend.MATH),
    "no hooks for saved tensors": lambda: torch.autograd.graph.disable_saved_tensors_hooks("none here"),
    "saved on the host": torch.autograd.graph.save_on_cpu,
    "double by default": _in_double_by_default,
    "autocast that is off": lambda: torch.autocast("cpu", enabled=False),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_in_other_surroundings(name: str, same: Same) -> None:
    def ask(model: Any) -> Any:
        with SURROUNDINGS[name]():
            inside = step(model, **PADDED)
        return [inside, step(model)]

    same(ask)


def test_fake_tensors_have_stocks_shapes(same: Same) -> None:
    def ask(model: Any) -> Any:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            out = model(**{name: mode.from_tensor(on(model, tensor)) for name, tensor in PLAIN.items()})
        return [list(out.loss.shape), list(out.logits.shape), type(out.loss).__name__, step(model)]

    same(ask)


def test_as_many_operations_are_counted_in_a_forward(same: Same) -> None:
    def ask(model: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            call(model)
        return counter.get_total_flops()

    same(ask)


def test_tensors_of_inference_mode_are_trained_on(same: Same) -> None:
    def ask(model: Any) -> Any:
        with torch.inference_mode():
            given = {name: on(model, tensor).clone() for name, tensor in PADDED.items()}
            first = model(**given)
            facts = [first.loss, first.logits, first.loss.is_inference(), first.logits.is_inference()]
        return [facts, step(model, **given), model(**given).logits]

    same(ask)


# K: no traces


@pytest.mark.parametrize("family", ["toy-llama", "toy-qwen3"])
def test_nothing_is_drawn_changed_or_said(family: str, same: Same) -> None:
    def ask(model: Any) -> Any:
        state, buffers = torch.get_rng_state(), {name: b.clone() for name, b in model.named_buffers()}
        modules, hooks = len(list(model.modules())), sum(len(m._forward_hooks) for m in model.modules())
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            out = call(model, **PADDED)
            out.logits.sum()
            out.loss.backward()
        return [
            torch.equal(state, torch.get_rng_state()), buffers, dict(model.named_buffers()), modules, hooks,
            len(list(model.modules())), sum(len(m._forward_hooks) for m in model.modules()),
            [str(each.message)[:60] for each in said], list(model.state_dict()), repr(model),
        ]  # fmt: skip

    same(ask)


def test_a_model_looks_as_it_did(same: Same) -> None:
    def ask(model: Any) -> Any:
        causal = model.get_base_model()
        return [
            str(inspect.signature(causal.forward)), str(inspect.signature(model.forward)), causal.forward.__qualname__,
            causal.forward.__doc__, type(model).__name__, [type(m).__name__ for m in model.modules()],
            isinstance(causal, transformers.LlamaForCausalLM), model.get_nb_trainable_parameters(), str(model.dtype),
            causal.num_parameters(), causal.get_memory_footprint(), [name for name, _ in model.named_parameters()],
        ]  # fmt: skip

    same(ask)


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing_hooks_are_called_as_often(reentrant: bool, same: Same) -> None:
    def ask(model: Any) -> Any:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        seen: list[Any] = []
        layers(model)[0].mlp.register_forward_hook(lambda *_: seen.append(["mlp", torch.is_grad_enabled()]))
        layers(model)[1].register_forward_hook(lambda *_: seen.append(["layer", torch.is_grad_enabled()]))
        return [step(model), seen]

    same(ask)


def _after_an_error(model: Any) -> Any:
    def fail(*_: Any) -> None:
        raise KeyError("never")

    for module in (model.get_input_embeddings(), model.get_base_model().model):
        handle = module.register_forward_hook(fail)
        with pytest.raises(KeyError):
            call(model)
        handle.remove()
    return step(model)


def _called_by_its_own_hook(model: Any) -> Any:
    inner: list[Tensor] = []

    def hook(*_: Any) -> None:
        if not inner:
            inner.append(torch.zeros(()))
            inner.append(call(model, input_ids=IDS[:, :5], labels=IDS[:, :5]).loss)

    model.get_input_embeddings().register_forward_hook(hook)
    model.zero_grad()
    out = call(model)
    (out.loss + inner[1]).backward()
    return [out.loss, inner[1], out.logits, gradients(model)]


def _in_two_threads(model: Any) -> Any:
    """Both are inside of the model at the same time; one of them trains."""
    barrier, found = threading.Barrier(2), {}
    model.get_input_embeddings().register_forward_hook(lambda *_: [barrier.wait(30)].clear())

    def run(train: bool) -> None:
        with torch.set_grad_enabled(train):
            out = call(model)
        found[train] = [out.loss.detach(), out.logits.detach()]

    threads = [threading.Thread(target=run, args=(train,)) for train in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[True], found[False]]


def _checkpointed_from_outside(model: Any) -> Any:
    model.zero_grad()
    ids = on(model, IDS)
    loss = checkpoint(lambda given: model(input_ids=given, labels=given).loss, ids, use_reentrant=False)
    loss.backward()
    return [loss, gradients(model)]


ENTRIES: dict[str, Ask] = {
    "after an error": _after_an_error,
    "called by its own hook": _called_by_its_own_hook,
    "in two threads": _in_two_threads,
    "checkpointed from outside": _checkpointed_from_outside,
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_other_ways_into_a_forward(entry: str, same: Same) -> None:
    same(ENTRIES[entry])


def test_gradients_that_somebody_keeps_stay_what_they_are(same: Same) -> None:
    def ask(model: Any) -> Any:
        step(model)
        kept = [p.grad for p in trained(model).values()]
        values = [g.clone() for g in kept if g is not None]
        same_object = [id(p.grad) for p in trained(model).values()]
        call(model, **PADDED).loss.backward()
        added = [id(p.grad) for p in trained(model).values()] == same_object
        model.zero_grad(set_to_none=True)
        return [added, values, [g.clone() for g in kept if g is not None], step(model, **PADDED)]

    same(ask)


# L: undone, beside another, and the truth about it


def test_undone_while_outputs_wait(same: Same) -> None:
    def ask(model: Any) -> Any:
        out = call(model, **PADDED, use_cache=True)
        unpatch_model(model)
        keys, logits = out.past_key_values.layers[0].keys, out.logits
        (out.loss + logits.square().mean()).backward()
        return [out.loss, logits, keys, gradients(model), step(model)]

    same(ask)


def test_a_second_peft_model_over_the_same_base(same: Same) -> None:
    def ask(model: Any) -> Any:
        first = step(model)
        torch.manual_seed(4)
        config = peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False)
        second = peft.get_peft_model(model.unload(), config).train()
        return [first, step(second), step(second, **PADDED)]

    same(ask)


def test_two_models_in_one_process_do_not_disturb_each_other(toy: Callable[..., Any]) -> None:
    stock = [step(toy(family, base=SMALL), **PADDED) for family in ("toy-llama", "toy-qwen2")]
    one, other = (toy(family, base=SMALL) for family in ("toy-llama", "toy-qwen2"))
    patch_model(one, backend="eager", placement="keep")
    patch_model(other, backend="eager", placement="full")
    first, second = call(one, **PADDED), call(other, **PADDED)
    (first.loss + second.loss).backward()
    assert not list(differences(stock, settled([[first.loss, gradients(one)], [second.loss, gradients(other)]])))
    unpatch_model(one)
    assert ledger_of(one) is None
    assert not list(differences(stock[1], step(other, **PADDED)))
    assert not list(differences(stock[0], step(one, **PADDED)))
    assert not ledger_of(other).fallbacks


STOCK: dict[str, Change] = {
    "a hook": lambda model: layers(model)[0].mlp.register_forward_hook(lambda *_: None),
    "a subclass": lambda model: setattr(layers(model)[0], "__class__", HalfLayer),
    "an attention function": _own_attention_function,
    "a trained norm": lambda model: setattr(layers(model)[0].input_layernorm.weight, "requires_grad", True),
}


@pytest.mark.parametrize("after_a_step", [False, True], ids=["before a step", "after a step"])
@pytest.mark.parametrize("change", STOCK)
def test_strict_is_an_error_where_the_ledger_says_stock(
    change: str, after_a_step: bool, toy: Callable[..., Any]
) -> None:
    plain, strict = toy(base=SMALL), toy(base=SMALL)
    ledger = patch_model(plain, backend="eager")
    patch_model(strict, backend="eager", strict=True)
    for model in (plain, strict):
        if after_a_step:
            step(model)
        STOCK[change](model)
    step(plain)
    assert ledger.paths["layers.0"].path == "stock"
    with pytest.raises(BackendError, match=r"layers\.0|runs as stock|run as stock"):
        step(strict)


# Bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["toy-llama", "toy-qwen3"])
def test_without_gradients_training_and_evaluation_have_the_same_bits(
    family: str, dtype: torch.dtype, toy: Callable[..., Any]
) -> None:
    """Stock's, wherever stock's are the same in both modes."""
    model = toy(family, base={**SMALL, "dtype": dtype})

    def bits() -> list[Tensor]:
        found = []
        with torch.no_grad():
            for given in ({"input_ids": IDS}, PLAIN, PADDED):
                for mode in (True, False):
                    out = call(model.train(mode), **given)
                    found += [out.logits.clone(), *([] if out.loss is None else [out.loss.clone()])]
            with model.train().disable_adapter():
                found.append(call(model, **PADDED).logits.clone())
        return found

    stock = bits()
    patch_model(model, backend="eager")
    step(model.train(), **PADDED)
    assert all(map(torch.equal, stock, bits()))
    assert torch.equal(stock[0], stock[1])
