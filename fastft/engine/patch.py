"""Putting the engine into a Hugging Face model, and taking it out again.

The model stays what it was: modules, parameters, hooks, `save_pretrained` and trainers go on working.  Only
`forward`s are replaced, as instance attributes: of the decoder layers, the final norm, the backbone and the model with
head in a family with a layer specification; of the LoRA linears, the RMSNorms and the model with head in any.
`unpatch_model` removes them.
"""

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fastft.backends import Backend, load_backend
from fastft.engine import adapters_off, optimizer_step, trl_head, walks
from fastft.engine.attach import STATE, WeakModule, attach, detach, list_in
from fastft.engine.backbone import backbone_forward
from fastft.engine.forwards import layer_forward
from fastft.engine.generic import (
    Part,
    decoder_layers,
    find_parts,
    note_part,
)
from fastft.engine.graphs import GRAPH_MODES, GraphMode
from fastft.engine.head import causal_lm_forward_of
from fastft.engine.host_embedding import give_back, why_not_on_host
from fastft.engine.ledger import Ledger
from fastft.engine.logits import deferring_forward_of, why_not_together
from fastft.engine.loss import chunk_for
from fastft.engine.norm import norm_forward
from fastft.engine.reading import layers_and_norm
from fastft.engine.state import READ, EngineSettings, ModuleState, Placed, Read, policy_of, state_of, why_replaced
from fastft.engine.support import why_no_head, why_no_layer, why_no_norm
from fastft.errors import ConfigError, ModelError, unknown_choice
from fastft.kernels.attention.library import ATTENTION
from fastft.kernels.launches import read_launches
from fastft.models.spec import SPECS
from fastft.plan import POLICIES, Policy

log = logging.getLogger("fastft")


def patch_model(
    model: nn.Module,
    *,
    backend: str,
    placement: Policy | Sequence[Policy] | Callable[[int, int], Placed] | None = None,
    attention: str = "auto",
    loss_chunk_tokens: int | None = None,
    mlp_chunk_tokens: int | None = None,
    resident_layers: int = 0,
    host_embedding: bool = False,
    graphs: GraphMode = "auto",
    kernels: Mapping[str, Sequence[int]] | None = None,
    strict: bool = False,
) -> Ledger:
    """Replace the `forward`s of a Hugging Face model, or of the `PeftModel` around it.

    A causal language model of a family with a layer specification (`fastft.models.spec`) runs decoder layer by decoder
    layer.  Any other model runs part by part: LoRA linears, RMSNorms, head and loss; the rest of it stays stock, and so
    do its gradient checkpointing and its attention.  Adapters on modules that had none need a new patch there.

    Args:
        model: stays the same object; patching it again replaces the settings.
        backend: eager or triton.
        placement: one policy for all decoder layers, one a layer, or a function from a micro-batch's rows and
            tokens a row to one a layer; None is `full` where gradient checkpointing is on (and, up to 4096
            tokens, MLPs whose backward takes half of them at a time), else `light`, and lets
            `gradient_checkpointing_enable` change it later.
        attention: a name of `fastft.kernels.attention`, or auto.
        loss_chunk_tokens: how many labelled rows have logits at a time; None for 2048, or so many fewer that the
            logits of a large vocabulary take no more than 320 MiB in 16 bits.
        mlp_chunk_tokens: about how many tokens a layer's MLP takes at a time, for long sequences in little memory; None
            for all.  A layer whose policy saves gate and up, or whose MLP has adapters with dropout, takes all.  Where
            `placement` is a function, its answer counts.
        resident_layers: so many layers, the first ones, keep their quantized weights dense as well, and need not
            dequantize them at each use.
        host_embedding: the input embedding stays in host memory, from where the GPU reads the rows that it needs.
        graphs: auto replays CUDA graphs where a step is small enough to be bound by its launches, on for any size,
            off never.  Where `placement` is a function, its answer counts.
        kernels: the Triton kernels' launches where they are not the defaults, as `fastft.plan.Choices.kernels` has
            them.  They hold for this model.
        strict: a decoder layer, norm, LoRA linear, or head with loss that cannot run fused is an error instead of a
            line in the ledger.  What the engine has nothing for, whatever is changed about it, is no error: decoder
            layers without a specification, other norms, adapters on anything but linear layers.

    Raises:
        ModelError: neither a Hugging Face model nor anything that PEFT adapted.
        BackendError: the backend cannot run here; or `strict` and something cannot run fused.
        ConfigError: unknown policy or attention, not one policy a layer, an empty chunk; or placement, attention,
            mlp_chunk_tokens or graphs chosen for a model without a layer specification.
        PlanError: a kernel or launch that is not declared in `fastft.kernels.launches`.
    """
    causal_lm = base_model(model)
    family = getattr(getattr(causal_lm, "config", None), "model_type", type(causal_lm).__name__)
    if attention not in (*ATTENTION, "auto"):
        raise unknown_choice("attention", attention, [*ATTENTION, "auto"])
    if graphs not in GRAPH_MODES:
        raise unknown_choice("graphs", graphs, GRAPH_MODES)
    if loss_chunk_tokens is None:
        loss_chunk_tokens = chunk_for(_vocabulary_of(causal_lm))
    if loss_chunk_tokens < 1:
        raise ConfigError("loss_chunk_tokens is not valid", got=loss_chunk_tokens, allowed="1 or more", fix="use 2048")
    if mlp_chunk_tokens is not None and mlp_chunk_tokens < 1:
        raise ConfigError(
            "mlp_chunk_tokens is not valid", got=mlp_chunk_tokens, allowed="1 or more, or None",
            fix="use 4096, or leave it out",
        )  # fmt: skip
    ops = load_backend(backend).with_launches(read_launches(kernels or {}))
    unspecified = _why_unspecified(causal_lm, family)
    if unspecified is not None:
        asked = {
            "placement": placement is not None,
            "attention": attention != "auto",
            "mlp_chunk_tokens": mlp_chunk_tokens is not None,
            "resident_layers": resident_layers > 0,
            "host_embedding": host_embedding,
            "graphs": graphs == "on",
        }
        chosen = [name for name, was in asked.items() if was]
        ledger = _patch_parts_only(causal_lm, unspecified, chosen, ops, loss_chunk_tokens, strict=strict)
        _install_around(model, causal_lm)
        return ledger
    if host_embedding and (reason := why_not_on_host(causal_lm)) is not None:
        raise ConfigError(
            "the embedding cannot be kept in host memory", got=reason,
            allowed="a frozen nn.Embedding of its own on a GPU", fix="leave out host_embedding",
        )  # fmt: skip
    spec = SPECS[family]
    backbone = attrgetter(spec.backbone)(causal_lm)
    layers, final_norm = layers_and_norm(backbone, spec)
    chooser = placement if callable(placement) else None
    policies = _policies("light" if placement is None or callable(placement) else placement, len(layers))
    unpatch_model(model)
    ledger = Ledger(strict=strict, model=type(causal_lm).__name__)
    settings = EngineSettings(
        ops=ops,
        spec=spec,
        model=WeakModule(causal_lm),
        ledger=ledger,
        placement=policies,
        attention=attention,
        loss_chunk_tokens=loss_chunk_tokens,
        placement_is_fixed=placement is not None,
        choose_placement=chooser,
        graphs=graphs,
        mlp_chunk_tokens=mlp_chunk_tokens,
        resident_layers=resident_layers,
        host_embedding=host_embedding,
    )
    # A head that scores sequences, or classifies tokens, is small: it stays Hugging Face's.
    predicts = _predicts_tokens(causal_lm)
    settings.knows_head = not predicts
    if predicts:
        replaced = None if trl_head.trls_head(causal_lm) is not None else why_replaced(causal_lm)
        head_reason = replaced or why_no_head(causal_lm.get_output_embeddings())
        _note(ledger, "lm_head", "head_and_loss", ops.name, head_reason)
    for index, layer in enumerate(layers):
        _note(
            ledger,
            f"{spec.layers}.{index}",
            "decoder_layer",
            ops.name,
            why_replaced(layer) or why_no_layer(layer, spec, index),
        )
    _note(ledger, spec.final_norm, "norm", ops.name, why_replaced(final_norm) or why_no_norm(final_norm, spec))

    parts = [
        part for part in find_parts(causal_lm, settings) if part.kind != "adapter" and part.module is not final_norm
    ]
    for part in parts:
        # Those of a fused layer count only if it runs stock one day; they note themselves then.
        of_layer, inside = ".".join(part.name.split(".")[:2]), part.name.startswith(f"{spec.layers}.")
        if not inside or of_layer not in ledger.paths or ledger.paths[of_layer].path == "stock":
            note_part(ledger, part, ops.name)

    kind: Any = type(causal_lm)
    if predicts:
        _install(causal_lm, causal_lm_forward_of(kind), ModuleState(settings, "lm_head"))
    else:
        attach(causal_lm, {}, **{STATE: ModuleState(settings, "model")})
    causal_lm.__dict__[READ] = Read()
    _install(backbone, backbone_forward, ModuleState(settings, "backbone"))
    for layer, index in {layer: index for index, layer in reversed(list(enumerate(layers)))}.items():
        _install(layer, layer_forward, ModuleState(settings, f"{spec.layers}.{index}", index))
    _install(final_norm, norm_forward, ModuleState(settings, spec.final_norm))
    _install_parts(parts)
    _install_around(model, causal_lm)
    walks.install(backbone)  # asked for its parameters at each reference's forward
    ledger.tell()
    return ledger


def _install_around(model: Any, causal_lm: Any) -> None:
    """What stands on the PEFT model around, and the list of patched models."""
    for each in dict.fromkeys((model, causal_lm)):
        walks.install(each)
    trl_head.install(model)
    adapters_off.install(model)
    list_in(_patched, causal_lm)


def _why_unspecified(model: Any, family: str) -> str | None:
    """Why no layer specification describes this model, or None."""
    spec = SPECS.get(family)
    if spec is None:
        return f"no layer specification for {family}"
    try:
        layers, norm = layers_and_norm(attrgetter(spec.backbone)(model), spec)
        known = all(isinstance(module, nn.Module) for module in (*layers, norm)) and bool(layers)
    except (AttributeError, TypeError):
        known = False
    return None if known else f"{type(model).__name__} is built otherwise than {spec.model_class}"


def _vocabulary_of(model: Any) -> int:
    """How many logits a token has; 0 where nothing says so."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if isinstance(config, PreTrainedConfig) else config
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) else 0


def _predicts_tokens(model: Any) -> bool:
    """Whether the head is a language model's."""
    return type(model).__name__.endswith("ForCausalLM")


def _patch_parts_only(
    model: Any, unspecified: str, chosen: list[str], ops: Backend, loss_chunk_tokens: int, *, strict: bool
) -> Ledger:
    if not isinstance(model, PreTrainedModel) and not any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise ModelError(
            "the model is neither Hugging Face's nor adapted by PEFT", got=type(model).__name__,
            fix="add adapters first, with peft.get_peft_model",
        )  # fmt: skip
    if chosen:
        raise ConfigError(
            f"{' and '.join(chosen)} cannot be chosen for this model", got=unspecified, allowed=list(SPECS),
            fix="leave it out; gradient_checkpointing_enable and attn_implementation are Hugging Face's here",
        )  # fmt: skip
    unpatch_model(model)
    ledger = Ledger(strict=strict, model=type(model).__name__)
    settings = EngineSettings(
        ops=ops,
        model=WeakModule(model),
        spec=None,  # type: ignore[arg-type]  # no forward of a part reads it
        ledger=ledger,
        placement=[],
        attention="auto",
        loss_chunk_tokens=loss_chunk_tokens,
        placement_is_fixed=False,
    )
    has_head = isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None
    if has_head:
        _note(ledger, "lm_head", "head_and_loss", ops.name, why_replaced(model) or why_not_together(model))
    log.info("%s runs part by part, because %s", type(model).__name__, unspecified)
    for name, _ in decoder_layers(model):
        ledger.beyond(name, "decoder_layer", unspecified)
    parts = list(find_parts(model, settings))
    for part in parts:
        note_part(ledger, part, ops.name)
    if has_head:
        kind: Any = type(model)
        _install(model, deferring_forward_of(kind), ModuleState(settings, "lm_head"))
    else:
        attach(model, {}, **{STATE: ModuleState(settings, "model")})
    model.__dict__[READ] = Read()
    _install_parts(parts)
    ledger.tell()
    return ledger


def _install_parts(parts: Sequence[Part]) -> None:
    for part in parts:
        if part.forward is not None and part.state is not None and why_replaced(part.module) is None:
            _install(part.module, part.forward, part.state)


def unpatch_model(model: nn.Module) -> None:
    """Put every original `forward` back; nothing happens to a model that is not patched."""
    causal_lm = base_model(model)
    for module in dict.fromkeys((*model.modules(), *causal_lm.modules())):
        if isinstance(module, nn.Embedding):
            give_back(module)
        detach(module)
    _patched.discard(causal_lm)
    forget_the_gone()


def forget_the_gone() -> None:
    """Watch no optimizer any more, and leave the models' classes as they were, if there is no patched model any more:
    all were unpatched, or are gone."""
    if not _patched:
        optimizer_step.uninstall()
        walks.uninstall()


_patched: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Models that are patched and live, deep copies among them."""


def ledger_of(model: nn.Module) -> Ledger | None:
    """The path ledger of a patched model, else None."""
    causal_lm = base_model(model)
    return state_of(causal_lm).settings.ledger if STATE in causal_lm.__dict__ else None


def placement_of(model: nn.Module) -> list[Policy] | None:
    """The policies of a patched model's layers; None where it is not patched, or runs only part by part."""
    causal_lm = base_model(model)
    if STATE not in causal_lm.__dict__ or not state_of(causal_lm).settings.placement:
        return None
    layers = _layers(causal_lm)
    return None if any(STATE not in layer.__dict__ for layer in layers) else [policy_of(layer) for layer in layers]


def base_model(model: nn.Module) -> Any:
    """The Hugging Face model inside a `PeftModel`, or `model` itself."""
    get = getattr(model, "get_base_model", None)
    return get() if callable(get) else model


def _layers(causal_lm: nn.Module) -> Any:
    """The decoder layers of a patched model."""
    spec = state_of(causal_lm).settings.spec
    return attrgetter(f"{spec.backbone}.{spec.layers}")(causal_lm)


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


def _install(module: nn.Module, forward: Callable[..., Any], state: ModuleState) -> None:
    state.original = module.__dict__.get("forward")
    attach(module, {"forward": forward}, **{STATE: state})
