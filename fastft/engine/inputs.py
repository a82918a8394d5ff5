"""What stock's backbone hands to its layers, gathered once for all of them.

The arguments are stock's, under stock's names, and so is the code that makes embeddings, angles and masks of them: only
the loop over the layers is not.  `differ_from_stocks` compares with that loop once a model, on a few tokens.

Legend: B batch, S sequence, D model, d head size.
"""

import functools
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import nn

from fastft.engine.parts import window_of
from fastft.engine.reading import layers_and_norm
from fastft.engine.state import EngineSettings, call_original
from fastft.kernels.attention.seen import Seen, documents_of, mask_of
from fastft.models.identity import attention_function
from fastft.models.kv_cache import KV_CACHE
from fastft.models.spec import LayerSpec

NAMES = frozenset(
    {
        "input_ids", "attention_mask", "position_ids", KV_CACHE, "inputs_embeds", "use_cache", "output_hidden_states",
        "output_attentions", "return_dict", "is_causal",
    }
)  # fmt: skip
"""Arguments of a backbone that the engine knows."""
UNSEEN = frozenset(
    {
        "num_items_in_batch", "ignore_index", "shift_labels", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q",
        "max_length_k",
    }
)  # fmt: skip
"""Keywords that reach stock's layers and change nothing there."""


@functools.cache
def _parameters(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


@functools.cache
def _words(function: Any) -> frozenset[str]:
    """The strings in a function, names of keywords that it looks for among them."""
    return frozenset(constant for constant in inspect.unwrap(function).__code__.co_consts if isinstance(constant, str))


def read_by_layer(layer: nn.Module, spec: LayerSpec) -> frozenset[str]:
    """Names of the arguments that a layer, its attention, or what that calls takes; all others are passed on unread."""
    function = attention_function(spec, attrgetter(spec.attention)(layer).config)
    named = _parameters(type(layer).forward) | _parameters(type(attrgetter(spec.attention)(layer)).forward)
    return named if function is None else named | _parameters(function) | _words(function)


class LayerKind(NamedTuple):
    """What the loop over the layers tells some of them, and others otherwise."""

    window: int | None
    rotary: str | None
    """A layer type where each has angles of its own."""


class Inputs(NamedTuple):
    """What all layers of a forward are told."""

    embeds_BSD: torch.Tensor
    """What the embedding gives, or the caller."""
    hidden_BSD: torch.Tensor
    """The first layer's input."""
    angles: dict[str | None, tuple[torch.Tensor, torch.Tensor]]
    """Cosines and sines (1 or B × S × d), by `LayerKind.rotary`."""
    kinds: list[LayerKind]
    builds_cache: bool
    """Whether stock would build a key/value cache on the way."""


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by the names that the class's own `forward` has for them; those that are None may be missing.

    Raises:
        TypeError: as stock's `forward` would.
    """
    given = dict(kwargs)
    if args:
        kind: Any = type(module)
        names = _names(kind)
        if len(args) > len(names):
            type(module).forward(module, *args, **kwargs)  # raises
            raise TypeError(f"{type(module).__name__} takes {len(names)} positional arguments, {len(args)} were given")
        for name, value in zip(names, args, strict=False):
            if name in given:
                raise TypeError(f"{type(module).__name__}.forward() got multiple values for argument '{name}'")
            given[name] = value
    for name in ("past_key_values", "cache"):
        if name != KV_CACHE and name in given:
            value = given.pop(name)
            given[KV_CACHE] = value if given.get(KV_CACHE) is None else given[KV_CACHE]
    return given


@functools.cache
def _names(kind: Any) -> tuple[str, ...]:
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def gather(backbone: nn.Module, spec: LayerSpec, given: dict[str, Any]) -> Inputs:
    """What these arguments make every layer be told, but for its mask."""
    config: Any = backbone.config
    hidden = embeds = given.get("inputs_embeds")
    if hidden is None:
        hidden = embeds = getattr(backbone, spec.embedding)(given["input_ids"])
    if spec.embedding_multiplier is not None:
        hidden = hidden * getattr(backbone, spec.embedding_multiplier)
    assert isinstance(embeds, torch.Tensor)
    assert isinstance(hidden, torch.Tensor)
    position_ids = given.get("position_ids")
    if position_ids is None:
        position_ids = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
    layers, _ = layers_and_norm(backbone, spec)
    types = config.layer_types if spec.rotary_by_layer_type else [None] * len(layers)
    kinds = [LayerKind(window_of(config, spec, index), types[index]) for index in range(len(layers))]
    rotary = getattr(backbone, spec.rotary_embedding)
    angles = {
        kind: rotary(hidden, position_ids, kind) if kind is not None else rotary(hidden, position_ids=position_ids)
        for kind in dict.fromkeys(kind.rotary for kind in kinds)
    }
    return Inputs(embeds, hidden, angles, kinds, builds_cache(backbone, given))


def owned(hidden_BSD: torch.Tensor) -> torch.Tensor:
    """The caller's hidden states, as nobody fills them anew before the backward reads them.

    Stock's backward reads only what its norm makes of them.  Where they are differentiated, PyTorch says that they
    changed.
    """
    return hidden_BSD if hidden_BSD.requires_grad else hidden_BSD.clone()


def builds_cache(backbone: nn.Module, given: dict[str, Any]) -> bool:
    """Whether stock would build a key/value cache where none is given."""
    use_cache = given.get("use_cache")
    if use_cache is None:
        use_cache = getattr(backbone.config, "use_cache", None)
    checkpoints = getattr(backbone, "gradient_checkpointing", False) and backbone.training
    return bool(use_cache) and not checkpoints


def stocks_mask(
    backbone: nn.Module, spec: LayerSpec, given: dict[str, Any], gathered: Inputs, kind: LayerKind
) -> torch.Tensor | None:
    """The mask (B or 1 × 1 × S × S) that stock makes for layers of this kind; None for plain causal attention."""
    module = sys.modules[spec.module]
    make = module.create_causal_mask if kind.window is None else module.create_sliding_window_causal_mask
    mask: torch.Tensor | None = make(
        config=backbone.config,
        inputs_embeds=gathered.hidden_BSD,
        attention_mask=given["attention_mask"],
        position_ids=given.get("position_ids"),
        **{KV_CACHE: None},
    )
    return mask


class Captured(NamedTuple):
    """What stock's loop handed to one layer."""

    hidden_BSD: torch.Tensor
    attention_mask: torch.Tensor | None
    position_embeddings: tuple[torch.Tensor, torch.Tensor]


class AllCapturedError(Exception):
    """Every layer was called, so there is nothing more to see."""


class Capture(NamedTuple):
    """What the layers were handed so far, where they compute nothing."""

    handed: list[Captured]
    layers: int

    def take(self, one: Captured) -> None:
        """Keep what a layer was handed.

        Raises:
            AllCapturedError: it was the last one.
        """
        self.handed.append(one)
        if len(self.handed) == self.layers:
            raise AllCapturedError


def differ_from_stocks(backbone: nn.Module, settings: EngineSettings, layers: list[nn.Module]) -> bool:
    """Whether stock's loop hands its layers something else than `gather` and the engine's masks say.

    Asked of a few tokens, with masks, with packed positions, and without either; the layers compute nothing.
    """
    spec = settings.spec
    weight = settings.reading.stack.parts[0].input_norm.weight_D  # type: ignore[union-attr]
    generator = torch.Generator("cpu").manual_seed(0)
    embeds = torch.randn(2, 7, weight.numel(), generator=generator, device="cpu").to(weight.device, weight.dtype)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]], device=weight.device)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]], device=weight.device)
    batches: list[dict[str, Any]] = [{}, {"position_ids": positions}, {"attention_mask": mask}]
    if builds_cache(backbone, {"use_cache": True}):  # else only where there are gradients
        batches.append({"use_cache": True, "position_ids": positions})
    with _without_trace(getattr(backbone, spec.rotary_embedding)):
        return any(
            _differs(backbone, settings, {"inputs_embeds": embeds, "use_cache": False, **more}) for more in batches
        )


@contextmanager
def _without_trace(rotary: nn.Module) -> Iterator[None]:
    """Whatever is asked of the angles meanwhile: dynamic ones remember the longest sequence that they saw."""
    before = [(m, dict(m.__dict__), dict(m._buffers)) for m in rotary.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            for now, then in ((module.__dict__, attributes), (module._buffers, buffers)):
                now.clear()
                now.update(then)


def _differs(backbone: nn.Module, settings: EngineSettings, given: dict[str, Any]) -> bool:
    spec = settings.spec
    with torch.no_grad():
        handed: list[Captured] = []
        settings.captured = Capture(handed, len(layers_and_norm(backbone, spec)[0]))
        try:
            call_original(backbone, (), given)
        except AllCapturedError:  # nothing behind the layers runs: a hook there would see it
            pass
        finally:
            settings.captured = None
        ours = gather(backbone, spec, given)
        documents = None
        if "position_ids" in given and not ours.builds_cache and spec.separates_documents:
            documents = documents_of(given["position_ids"])
        if len(handed) != len(ours.kinds):
            return True
        B, S, _ = ours.hidden_BSD.shape
        for captured, kind in zip(handed, ours.kinds, strict=True):
            starts_N, longest = documents or (None, 0)
            mask = None if "attention_mask" not in given else stocks_mask(backbone, spec, given, ours, kind)
            seen = Seen(mask, kind.window, None, starts_N, longest)
            if not torch.equal(captured.hidden_BSD, ours.hidden_BSD):
                return True
            if not all(map(torch.equal, captured.position_embeddings, ours.angles[kind.rotary])):
                return True
            theirs = Seen(captured.attention_mask)
            device = ours.hidden_BSD.device
            if not torch.equal(_allowed(theirs, B, S, device), _allowed(seen, B, S, device)):
                return True
    return False


def _allowed(seen: Seen, B: int, S: int, device: torch.device) -> torch.Tensor:
    """(B × 1 × S × S): which key each query sees."""
    mask = mask_of(seen, B, S, device)
    return (mask if mask.dtype == torch.bool else mask >= 0).expand(B, 1, S, S)
