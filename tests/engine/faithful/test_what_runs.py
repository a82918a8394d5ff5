"""What runs is the code that stock would run, with the adapters that are active now."""

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from transformers.models.llama import modeling_llama

from same_as_stock import (
    IDS,
    MASK,
    PADDED,
    Ask,
    Change,
    HalfLayer,
    Same,
    call,
    gradients,
    layers,
    own_attention_function,
    replaced,
    step,
    trained,
)


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
    "an attention function of another name": own_attention_function,
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
    # By half, for two losses that are all but equal leave little else than their rounding.
    (out.loss - 0.5 * reference.loss.detach()).square().backward()
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
