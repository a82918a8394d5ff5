"""What people set on a model, its adapters and its family's code while it is in use, for `situations`."""

import copy
import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastft import patch_model, unpatch_model
from situations.sites import NotHereError, Site, halved, layers_at, linear_weight

Setting = Callable[[Site, str], None]
"""Done to a site, at some layers."""


def _attribute(part: str, name: str, value: Any) -> Setting:
    def change(site: Site, where: str) -> None:
        modules = site.modules(part, where)
        if not any(hasattr(module, name) for module in modules):
            raise NotHereError(name)
        for module in modules:
            setattr(module, name, value)

    return change


def _config(name: str, value: Any) -> Setting:
    def change(site: Site, where: str) -> None:
        if not hasattr(site.causal.config, name):
            raise NotHereError(name)
        setattr(site.causal.config, name, value)

    return change


def _epsilon(site: Site, where: str) -> None:
    for module in site.modules("norm", where):
        setattr(module, "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps", 0.5)


def _in_place(part: str, change: Callable[[Tensor], Any]) -> Setting:
    def do(site: Site, where: str) -> None:
        for module in site.modules(part, where):
            with torch.no_grad():
                change(linear_weight(module))

    return do


def _new_weight(part: str) -> Setting:
    def change(site: Site, where: str) -> None:
        for module in site.modules(part, where):
            weight = linear_weight(module)
            owner = getattr(module, "base_layer", module)
            owner.weight = nn.Parameter(0.5 * weight.detach(), requires_grad=weight.requires_grad)

    return change


def _trained(part: str, flag: bool) -> Setting:
    def change(site: Site, where: str) -> None:
        for module in site.modules(part, where):
            linear_weight(module).requires_grad_(flag)

    return change


def _loras(site: Site) -> Iterator[LoraLayer]:
    found = [module for module in site.net.modules() if isinstance(module, LoraLayer) and "default" in module.scaling]
    if not found:
        raise NotHereError("LoRA")
    return iter(found)


def _each_lora(change: Callable[[LoraLayer], Any]) -> Setting:
    def do(site: Site, where: str) -> None:
        for module in _loras(site):
            change(module)

    return do


def _adapter(change: Callable[[Any], Any], needs: str = "default") -> Setting:
    def do(site: Site, where: str) -> None:
        if needs not in getattr(site.net, "peft_config", {}):
            raise NotHereError(needs)
        change(site.net)

    return do


def _second(net: Any) -> None:
    first = net.peft_config["default"]
    if first.peft_type != "LORA":
        raise NotHereError("LoRA")
    torch.manual_seed(9)
    kept = {"r": 3, "lora_alpha": 6, "init_lora_weights": False, "target_modules": first.target_modules}
    net.add_adapter("third", peft.LoraConfig(**kept))


def _second_and_switched(net: Any) -> None:
    _second(net)
    net.set_adapter("third")


def _second_and_both(net: Any) -> None:
    _second(net)
    net.base_model.set_adapter(["default", "third"])


def _added_and_deleted(net: Any) -> None:
    _second_and_switched(net)
    net.delete_adapter("third")
    net.set_adapter("default")


def _unloaded(site: Site, where: str) -> None:
    if not hasattr(site.net, "merge_and_unload"):
        raise NotHereError("adapter")
    site.net = site.net.merge_and_unload().train()
    for name, parameter in site.net.named_parameters():
        parameter.requires_grad_(name.endswith("q_proj.weight"))


def _half_registry(site: Site, where: str) -> None:
    name = site.causal.config._attn_implementation
    if name not in ALL_ATTENTION_FUNCTIONS:
        raise NotHereError(name)
    before = ALL_ATTENTION_FUNCTIONS[name]
    site.set_item(ALL_ATTENTION_FUNCTIONS, name, lambda *args, **kwargs: halved(before(*args, **kwargs)))


def _half_function(name: str) -> Setting:
    def change(site: Site, where: str) -> None:
        before = getattr(site.modeling, name, None)
        if before is None:
            raise NotHereError(name)
        site.set(site.modeling, name, lambda *args, **kwargs: halved(before(*args, **kwargs)))

    return change


def _half_torch(owner: Any, name: str) -> Setting:
    def change(site: Site, where: str) -> None:
        before = getattr(owner, name)
        site.set(owner, name, lambda *args, **kwargs: halved(before(*args, **kwargs)))

    return change


def _only_itself(site: Site, where: str) -> None:
    """A mask function of the family that lets each token see itself and the one before only."""
    before = getattr(site.modeling, "create_causal_mask", None)
    if before is None:
        raise NotHereError("create_causal_mask")

    def mask(*args: Any, **kwargs: Any) -> Tensor:
        embeds = kwargs["inputs_embeds"]
        ones = torch.ones(embeds.shape[1], embeds.shape[1], dtype=torch.bool)
        allowed = (ones.tril() & ones.triu(-1)).expand(len(embeds), 1, -1, -1)
        return torch.zeros(allowed.shape, dtype=embeds.dtype).masked_fill(~allowed, torch.finfo(embeds.dtype).min)

    site.set(site.modeling, "create_causal_mask", mask)


def _loss(site: Site, where: str) -> None:
    if site.head != "causal":
        raise NotHereError("loss")
    site.causal.loss_function = lambda *args, **kwargs: 0.5 * ForCausalLMLoss(*args, **kwargs)


def _dropped(site: Site, where: str) -> None:
    if len(site.layers) < 2:
        raise NotHereError("layer")
    del site.layers[-1]
    site.causal.config.num_hidden_layers = len(site.layers)


def _fewer(site: Site, where: str) -> None:
    """As layer skipping does it: only the configuration says so."""
    site.causal.config.num_hidden_layers = 1


def _swapped(site: Site, where: str) -> None:
    if len(site.layers) < 2:
        raise NotHereError("layer")
    site.layers[0], site.layers[1] = site.layers[1], site.layers[0]


def _one_for_all(site: Site, where: str) -> None:
    for index in range(1, len(site.layers)):
        site.layers[index] = site.layers[0]


def _copied_layer(site: Site, where: str) -> None:
    for layer in layers_at(site, where):
        site.layers[list(site.layers).index(layer)] = copy.deepcopy(layer)


def _shared_weight(site: Site, where: str) -> None:
    """The first layer's first linear is the last's too."""
    [(first, name)], [(last, _)] = site.place("query", "first"), site.place("query", "last")
    setattr(last, name, getattr(first, name))


def _copied(site: Site, where: str) -> None:
    site.net = copy.deepcopy(site.net)


def _saved(site: Site, where: str) -> None:
    file = io.BytesIO()
    torch.save(site.net, file)
    file.seek(0)
    site.net = torch.load(file, weights_only=False)


def _state_dict(site: Site, where: str) -> None:
    halved = {name: 0.5 * tensor if "lora_" in name else tensor for name, tensor in site.net.state_dict().items()}
    site.net.load_state_dict(halved)


def _unpatched(site: Site, where: str) -> None:
    if site.fast:
        unpatch_model(site.net)


def _patched_again(site: Site, where: str) -> None:
    if site.fast:
        patch_model(site.net, backend="eager")


def _to(dtype: torch.dtype) -> Setting:
    def change(site: Site, where: str) -> None:
        site.net.to(torch.float32 if site.exact else dtype)

    return change


def _net(change: Callable[[Any], Any]) -> Setting:
    def do(site: Site, where: str) -> None:
        change(site.net)

    return do


def _causal(change: Callable[[Any], Any]) -> Setting:
    def do(site: Site, where: str) -> None:
        change(site.causal)

    return do


def _as_evaluation(part: str) -> Setting:
    def change(site: Site, where: str) -> None:
        for module in site.modules(part, where):
            module.eval()

    return change


def _head_scaling(module: LoraLayer) -> None:
    module.scaling["default"] = 0.3


def _half_a(module: LoraLayer) -> None:
    with torch.no_grad():
        module.lora_A["default"].weight.mul_(0.5)


def _half_data(module: LoraLayer) -> None:
    weight = module.lora_B["default"].weight
    weight.data = 0.5 * weight.data


def _new_a(module: LoraLayer) -> None:
    linear = module.lora_A["default"]
    linear.weight = nn.Parameter(0.5 * linear.weight.detach())


def _frozen_a(module: LoraLayer) -> None:
    module.lora_A["default"].weight.requires_grad_(False)


def _one_checkpointed(site: Site, where: str) -> None:
    site.layers[0].gradient_checkpointing = True
    site.layers[0]._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)


def _dropouts(site: Site, where: str) -> None:
    for module in site.net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


SETTINGS: dict[str, Setting] = {
    "dropouts to 0": _dropouts,
    "scaling of scores": _attribute("attention", "scaling", 0.05),
    "is_causal of attention": _attribute("attention", "is_causal", False),
    "window of attention": _attribute("attention", "sliding_window", 3),
    "soft-cap of attention": _attribute("attention", "attn_logit_softcapping", 0.7),
    "attention not rotated": _attribute("attention", "use_rope", 0),
    "residual multiplier": _attribute("layer", "residual_multiplier", 0.2),
    "epsilon of norms": _epsilon,
    "epsilon of the final norm": _attribute("final norm", "variance_epsilon", 0.5),
    "another activation": lambda site, where: [
        setattr(parent, name, nn.Tanh()) for parent, name in site.place("activation", where)
    ] and None,
    "activation GELU": lambda site, where: [
        setattr(parent, name, nn.GELU()) for parent, name in site.place("activation", where)
    ] and None,
    "angles of the rotation": lambda site, where: [
        module.inv_freq.mul_(0.3) for module in site.modules("rotary", where)
    ] and None,
    "scaling of the rotation": _attribute("rotary", "attention_scaling", 0.5),
    "config.sliding_window": _config("sliding_window", 3),
    "config.is_causal": lambda site, where: setattr(site.causal.config, "is_causal", False),
    "config.final_logit_softcapping": _config("final_logit_softcapping", 0.7),
    "config.logits_scaling": _config("logits_scaling", 5.0),
    "config.output_hidden_states": _config("output_hidden_states", True),
    "config.output_attentions": _config("output_attentions", True),
    "config.use_cache": _config("use_cache", False),
    "eager attention from now on": _causal(lambda model: model.set_attn_implementation("eager")),
    "base weight halved": _in_place("query", lambda weight: weight.mul_(0.5)),
    "norm halved": _in_place("norm", lambda weight: weight.mul_(0.5)),
    "head halved": _in_place("head", lambda weight: weight.mul_(0.5)),
    "embedding halved": _in_place("embedding", lambda weight: weight.mul_(0.5)),
    "new base weight": _new_weight("down"),
    "new norm weight": _new_weight("norm"),
    "new head weight": _new_weight("head"),
    "base weight trained": _trained("query", True),
    "norm trained": _trained("norm", True),
    "final norm trained": _trained("final norm", True),
    "head trained": _trained("head", True),
    "embedding trained": _trained("embedding", True),
    "A frozen": _each_lora(_frozen_a),
    "everything frozen": _net(lambda net: net.requires_grad_(False)),
    "LoRA scaling": _each_lora(_head_scaling),
    "set_scale": _each_lora(lambda module: module.set_scale("default", 0.25)),
    "scale_layer": _each_lora(lambda module: module.scale_layer(3.0)),
    "scale_layer and back": _each_lora(lambda module: (module.scale_layer(3.0), module.unscale_layer())),
    "A halved": _each_lora(_half_a),
    "B halved by data": _each_lora(_half_data),
    "new A": _each_lora(_new_a),
    "adapter added": _adapter(_second),
    "adapter added and switched": _adapter(_second_and_switched),
    "both adapters": _adapter(_second_and_both),
    "adapter added and deleted": _adapter(_added_and_deleted),
    "switched to second": _adapter(lambda net: net.set_adapter("second"), needs="second"),
    "adapters off": _adapter(lambda net: net.base_model.disable_adapter_layers()),
    "adapters off and on": _adapter(
        lambda net: (net.base_model.disable_adapter_layers(), net.base_model.enable_adapter_layers())
    ),
    "merged": _adapter(lambda net: net.merge_adapter()),
    "merged and back": _adapter(lambda net: (net.merge_adapter(), net.unmerge_adapter())),
    "one linear merged": lambda site, where: [
        module.merge() for module in site.modules("query", where) if isinstance(module, BaseTunerLayer)
    ] and None,
    "merged and unloaded": _unloaded,
    "attention function of the registry": _half_registry,
    "apply_rotary_pos_emb": _half_function("apply_rotary_pos_emb"),
    "eager_attention_forward": _half_function("eager_attention_forward"),
    "repeat_kv": _half_function("repeat_kv"),
    "rotate_half": _half_function("rotate_half"),
    "create_causal_mask": _only_itself,
    "F.scaled_dot_product_attention": _half_torch(nn.functional, "scaled_dot_product_attention"),
    "F.silu": _half_torch(nn.functional, "silu"),
    "F.linear": _half_torch(nn.functional, "linear"),
    "F.embedding": _half_torch(nn.functional, "embedding"),
    "F.cross_entropy": _half_torch(nn.functional, "cross_entropy"),
    "nn.Linear.forward": _half_torch(nn.Linear, "forward"),
    "another loss function": _loss,
    "last layer dropped": _dropped,
    "config.num_hidden_layers": _fewer,
    "layers swapped": _swapped,
    "one layer for all": _one_for_all,
    "layer replaced by its copy": _copied_layer,
    "linear shared": _shared_weight,
    "deep copy": _copied,
    "saved and loaded": _saved,
    "state dict loaded": _state_dict,
    "unpatched": _unpatched,
    "patched again": _patched_again,
    "to float64": _to(torch.float64),
    "to bfloat16": _to(torch.bfloat16),
    "inputs require gradients": _net(lambda net: net.enable_input_require_grads()),
    "embedding resized": _causal(lambda model: model.resize_token_embeddings(104, mean_resizing=False)),
    "weights tied": _causal(
        lambda model: setattr(model.get_output_embeddings(), "weight", model.get_input_embeddings().weight)
    ),
    "first layer in evaluation": lambda site, where: site.layers[0].eval() and None,
    "mlp in evaluation": _as_evaluation("mlp"),
    "checkpointing on": _net(
        lambda net: net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ),
    "checkpointing on and off": _net(
        lambda net: (net.gradient_checkpointing_enable(), net.gradient_checkpointing_disable())
    ),
    "one layer checkpointed": _one_checkpointed,
}  # fmt: skip
"""Every one may be done before patching, after it, or after a first step."""
