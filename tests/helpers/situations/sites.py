"""Where in a model something can be changed, for `situations`: its parts by name, and what is put back afterwards."""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

_MISSING = object()


class NotHereError(Exception):
    """This model has nothing that could be changed so."""


@dataclass
class Site:
    """A model in one run, and what was done around it."""

    net: Any
    """The model as it is called; a change may put another one here."""
    fast: bool
    """Whether the model is to be patched."""
    exact: bool = False
    """Whether it is to stay in fp32."""
    undo: ExitStack = field(default_factory=ExitStack)
    """Puts back what reaches beyond this model: classes, registries, global hooks."""
    seen: list[Any] = field(default_factory=list)
    """What hooks saw, in their order."""
    head: str = "causal"
    sees_cache: bool = True
    """Whether key/value caches are looked at."""

    @property
    def causal(self) -> Any:
        """The Hugging Face model."""
        get = getattr(self.net, "get_base_model", None)
        return get() if callable(get) else self.net

    @property
    def backbone(self) -> Any:
        return self.causal.base_model

    @property
    def layers(self) -> nn.ModuleList:
        """The list of decoder layers itself."""
        return next(module for module in self.backbone.modules() if isinstance(module, nn.ModuleList))

    @property
    def modeling(self) -> Any:
        """The module in which Hugging Face defines the family."""
        return sys.modules[type(self.layers[0]).__module__]

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of a class or module until the run is over."""
        before = vars(owner).get(name, _MISSING)
        setattr(owner, name, value)
        self.undo.callback(delattr, owner, name) if before is _MISSING else self.undo.callback(
            setattr, owner, name, before
        )

    def set_item(self, table: Any, name: str, value: Any) -> None:
        """Set an entry of a registry until the run is over."""
        before = table[name]
        table[name] = value
        self.undo.callback(table.__setitem__, name, before)

    def place(self, part: str, where: str) -> list[tuple[nn.Module, str]]:
        """The modules called `part`, each as its parent and its name there.

        Raises:
            NotHereError: there is none.
        """
        found = list(PARTS[part](self, where))
        if not found:
            raise NotHereError(part)
        return found

    def modules(self, part: str, where: str) -> list[nn.Module]:
        """The modules called `part`."""
        return [getattr(parent, name) for parent, name in self.place(part, where)]


Places = list[tuple[Any, str]]


def layers_at(site: Site, where: str) -> list[Any]:
    """All decoder layers, the first, or the last."""
    layers = list(site.layers)
    return {"all": layers, "first": layers[:1], "last": layers[-1:]}[where]


def _each_layer(fits: Callable[[str, nn.Module], bool]) -> Callable[[Site, str], Places]:
    """The first module below each layer, breadth first, that fits."""

    def find(site: Site, where: str) -> Places:
        found = []
        for layer in layers_at(site, where):
            below = sorted(layer.named_modules(), key=lambda one: one[0].count("."))
            path = next((path for path, module in below if path and fits(path.rpartition(".")[2], module)), None)
            if path is not None:
                above, _, name = path.rpartition(".")
                found.append((layer.get_submodule(above), name))
        return found

    return find


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, BaseTunerLayer) and "Linear" in type(module).__name__)


def _of_lora(table: str) -> Callable[[Site, str], Places]:
    def find(site: Site, where: str) -> Places:
        layers = layers_at(site, where)
        owners = [next((m for m in layer.modules() if isinstance(m, LoraLayer)), None) for layer in layers]
        tables = [getattr(owner, table) for owner in owners if owner is not None]
        return [(each, "default") for each in tables if "default" in each]

    return find


def _named(owner: Callable[[Site], Any], *names: str) -> Callable[[Site, str], Places]:
    def find(site: Site, where: str) -> Places:
        return [(owner(site), name) for name in names if isinstance(getattr(owner(site), name, None), nn.Module)][:1]

    return find


def _layer(site: Site, where: str) -> Places:
    layers = list(site.layers)
    return [(site.layers, str(layers.index(layer))) for layer in layers_at(site, where)]


PARTS: dict[str, Callable[[Site, str], Places]] = {
    "layer": _layer,
    "attention": _each_layer(lambda name, module: name in ("self_attn", "self_attention", "attention", "attn")),
    "mlp": _each_layer(lambda name, module: name == "mlp"),
    "norm": _each_layer(lambda name, module: "Norm" in type(module).__name__),
    "head norm": _each_layer(lambda name, module: name == "q_norm"),
    "last norm": _each_layer(
        lambda name, module: name in ("post_feedforward_layernorm", "post_attention_layernorm", "ln_2")
    ),
    "activation": _each_layer(lambda name, module: name in ("act_fn", "activation_fn", "act")),
    "query": _each_layer(lambda name, module: _is_linear(module)),
    "down": _each_layer(
        lambda name, module: _is_linear(module) and name in ("down_proj", "dense_4h_to_h", "fc2", "o_proj")
    ),
    "lora A": _of_lora("lora_A"),
    "lora B": _of_lora("lora_B"),
    "lora dropout": _of_lora("lora_dropout"),
    "embedding": _named(lambda site: site.backbone, "embed_tokens", "word_embeddings", "embed_in", "wte"),
    "final norm": _named(lambda site: site.backbone, "norm", "ln_f", "final_layer_norm", "final_layernorm"),
    "rotary": _named(lambda site: site.backbone, "rotary_emb"),
    "head": _named(lambda site: site.causal, "lm_head", "score"),
    "backbone": _named(lambda site: site.causal, "model", "transformer", "gpt_neox"),
    "model": lambda site, where: [(site, "causal")],
    "peft model": lambda site, where: [(site, "net")],
}
"""What a change can be about."""
INNER = (
    "layer", "attention", "mlp", "norm", "activation", "query", "down", "lora A", "lora B", "head norm", "last norm",
)  # fmt: skip
"""Parts of which each layer has one."""


def halved(out: Any) -> Any:
    """What a module gave, the first tensor of it halved."""
    if isinstance(out, Tensor):
        return 0.5 * out
    if isinstance(out, ModelOutput):
        name = next(iter(out.keys()))
        out[name] = halved(out[name])
        return out
    if isinstance(out, (tuple, list)):
        return type(out)([halved(out[0]), *out[1:]])
    return out


def noted(value: Any) -> list[Tensor]:
    """Copies of all tensors in what a hook got."""
    if isinstance(value, Tensor):
        return [value.detach().clone()]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for each in value for tensor in noted(each)]
    return []


def linear_weight(module: nn.Module) -> nn.Parameter:
    """The weight of a linear layer, below its adapter if it has one."""
    while isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()  # type: ignore[assignment]
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        raise NotHereError("weight")
    return weight  # type: ignore[return-value]
