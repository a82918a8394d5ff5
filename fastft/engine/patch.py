"""Putting the engine into a Hugging Face model, and taking it out again.

The model stays what it was: modules, parameters, hooks, `save_pretrained` and trainers go on working.  Only the
`forward`s of the decoder layers, of the final norm, of the backbone and of the model with head are replaced, as
instance attributes; `unpatch_model` removes them.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from fastft.backends import load_backend
from fastft.engine.forwards import backbone_forward, layer_forward
from fastft.engine.head import causal_lm_forward
from fastft.engine.ledger import Ledger
from fastft.engine.norm import norm_forward
from fastft.engine.state import STATE, EngineSettings, ModuleState, policy_of, state_of
from fastft.engine.support import why_no_head, why_no_layer, why_no_norm
from fastft.errors import ConfigError, ModelError, unknown_choice
from fastft.kernels.attention.library import ATTENTION
from fastft.models.spec import SPECS
from fastft.plan import POLICIES, Policy

log = logging.getLogger("fastft")


def patch_model(
    model: nn.Module,
    *,
    backend: str,
    placement: Policy | Sequence[Policy] | Callable[[int, int], list[Policy]] | None = None,
    attention: str = "auto",
    loss_chunk_tokens: int = 2048,
    strict: bool = False,
) -> Ledger:
    """Replace the `forward`s of a Hugging Face causal language model, or of the `PeftModel` around it.

    Args:
        model: stays the same object; patching it again replaces the settings.
        backend: eager or triton.
        placement: one policy for all decoder layers, one a layer, or a function from a micro-batch's rows and
            tokens a row to one a layer; None is `full` where gradient checkpointing is on, else `light`, and lets
            `gradient_checkpointing_enable` change it later.
        attention: a name of `fastft.kernels.attention`, or auto.
        loss_chunk_tokens: how many labelled rows have logits at a time.
        strict: a module that cannot run fused is an error instead of a line in the ledger.

    Raises:
        ModelError: the model's family has no layer specification, or it is no causal language model.
        BackendError: the backend cannot run here; or `strict` and something cannot run fused.
        ConfigError: unknown policy or attention, not one policy a layer, or an empty loss chunk.
    """
    causal_lm = base_model(model)
    family = getattr(getattr(causal_lm, "config", None), "model_type", type(causal_lm).__name__)
    if family not in SPECS:
        raise ModelError(
            "the model type is not supported", got=family, allowed=list(SPECS),
            fix="choose backend peft, which trains any model that PEFT knows",
        )  # fmt: skip
    if not type(causal_lm).__name__.endswith("ForCausalLM"):
        raise ModelError(
            "the model is no causal language model", got=type(causal_lm).__name__, fix="choose backend peft"
        )
    if attention not in (*ATTENTION, "auto"):
        raise unknown_choice("attention", attention, [*ATTENTION, "auto"])
    if loss_chunk_tokens < 1:
        raise ConfigError("loss_chunk_tokens is not valid", got=loss_chunk_tokens, allowed="1 or more", fix="use 2048")
    spec = SPECS[family]
    ops = load_backend(backend)
    backbone = causal_lm.model
    layers = list(backbone.layers)
    chooser = placement if callable(placement) else None
    policies = _policies("light" if placement is None or callable(placement) else placement, len(layers))
    unpatch_model(model)
    settings = EngineSettings(
        ops=ops,
        spec=spec,
        ledger=Ledger(strict=strict),
        placement=policies,
        attention=attention,
        loss_chunk_tokens=loss_chunk_tokens,
        placement_is_fixed=placement is not None,
        choose_placement=chooser,
    )
    ledger = settings.ledger
    head_reason = _replaced(causal_lm) or why_no_head(causal_lm.get_output_embeddings())
    _note(ledger, "lm_head", "head_and_loss", ops.name, head_reason)
    for index, layer in enumerate(layers):
        _note(ledger, f"layers.{index}", "decoder_layer", ops.name, _replaced(layer) or why_no_layer(layer, spec))
    _note(ledger, "norm", "norm", ops.name, _replaced(backbone.norm) or why_no_norm(backbone.norm, spec))

    _install(causal_lm, causal_lm_forward, ModuleState(settings, "lm_head"))
    _install(backbone, backbone_forward, ModuleState(settings, "backbone"))
    for index, layer in enumerate(layers):
        _install(layer, layer_forward, ModuleState(settings, f"layers.{index}", index))
    _install(backbone.norm, norm_forward, ModuleState(settings, "norm"))
    causal_lm.gradient_checkpointing_enable = MethodType(_gradient_checkpointing_enable, causal_lm)
    causal_lm.gradient_checkpointing_disable = MethodType(_gradient_checkpointing_disable, causal_lm)
    return ledger


def unpatch_model(model: nn.Module) -> None:
    """Put every original `forward` back; nothing happens to a model that is not patched."""
    causal_lm = base_model(model)
    if STATE not in causal_lm.__dict__:
        return
    for module in causal_lm.modules():
        if STATE in module.__dict__:
            _uninstall(module)
    for name in ("gradient_checkpointing_enable", "gradient_checkpointing_disable"):
        causal_lm.__dict__.pop(name, None)


def ledger_of(model: nn.Module) -> Ledger | None:
    """The path ledger of a patched model, else None."""
    causal_lm = base_model(model)
    return state_of(causal_lm).settings.ledger if STATE in causal_lm.__dict__ else None


def placement_of(model: nn.Module) -> list[Policy] | None:
    """The policies of a patched model's layers, else None."""
    causal_lm = base_model(model)
    if STATE not in causal_lm.__dict__ or any(STATE not in layer.__dict__ for layer in causal_lm.model.layers):
        return None
    return [policy_of(layer) for layer in causal_lm.model.layers]


def base_model(model: nn.Module) -> Any:
    """The Hugging Face model inside a `PeftModel`, or `model` itself."""
    get = getattr(model, "get_base_model", None)
    return get() if callable(get) else model


def _policies(placement: Policy | Sequence[Policy], layers: int) -> list[Policy]:
    policies = [placement] * layers if isinstance(placement, str) else list(placement)
    for policy in policies:
        if policy not in POLICIES:
            raise unknown_choice("policy", policy, POLICIES)
    if len(policies) != layers:
        raise ConfigError(
            "placement does not name every layer", got=f"{len(policies)} policies", allowed=f"1 or {layers}",
            fix="give one policy for all layers, or one a layer",
        )  # fmt: skip
    return policies


def _note(ledger: Ledger, name: str, kind: str, backend: str, reason: str | None) -> None:
    if reason is None:
        ledger.fused(name, kind, backend)
    else:
        ledger.stock(name, kind, reason)


_FORWARDS = (causal_lm_forward, backbone_forward, layer_forward, norm_forward)


def _replaced(module: nn.Module) -> str | None:
    """The reason in the ledger where somebody else gave this module, as an instance, another `forward` before."""
    if "forward" in module.__dict__ and STATE not in module.__dict__:
        return "its forward was replaced"
    return None


def _install(module: nn.Module, forward: Callable[..., Any], state: ModuleState) -> None:
    if STATE in module.__dict__:
        # A wrapper over an earlier patch is still there, and what it calls is this very forward: a second one on top
        # would call itself for ever.
        state.original = state_of(module).original
        module.__dict__[STATE] = state
        return
    state.original = module.__dict__.get("forward")
    module.__dict__[STATE] = state
    module.__dict__["forward"] = MethodType(forward, module)


def _uninstall(module: nn.Module) -> None:
    state = state_of(module)
    current = module.__dict__.get("forward")
    if not (isinstance(current, MethodType) and current.__func__ in _FORWARDS):
        # Somebody wrapped the patched forward (a trainer, say): what they hold must go on working.
        log.warning("%s: its forward was wrapped after patching and stays fused", state.name)
        return
    del module.__dict__[STATE]
    if state.original is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = state.original


def _gradient_checkpointing_enable(
    self: nn.Module,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    every_n_layers: int = 1,
    offload: bool = False,
) -> None:
    """As Hugging Face's, which also makes the embeddings require a gradient; the engine needs none there."""
    settings = state_of(self).settings
    if settings.placement_is_fixed:
        log.info("gradient checkpointing stays as placed: %s", ", ".join(settings.placement))
        return
    if offload:
        log.warning("activation offload is not available yet; the layers' inputs stay on the device")
    for index, layer in enumerate(self.model.layers):  # type: ignore[union-attr, arg-type]
        layer.gradient_checkpointing = index % every_n_layers == 0
        # What a layer that runs as stock calls.  The reentrant variant gives the same gradients, if any at all.
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def _gradient_checkpointing_disable(self: nn.Module) -> None:
    for layer in self.model.layers:  # type: ignore[union-attr]
        layer.gradient_checkpointing = False
