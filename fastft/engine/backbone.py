"""The decoder without its head, straight through: embedding, positions, all layers as one function, the final norm.

What stock's loop hands to every layer is gathered once and the layers run as one (`stack.py`).  Where anybody could see
a difference (a hook on a layer, hidden states asked for, an argument that the engine does not know, a layer that cannot
run fused) stock's own loop runs instead and calls the layers one by one (`forwards.py`).

Legend: B batch, S sequence, D model.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers.modeling_outputs as outputs_of
from torch import nn

from fastft.adapters.lora import has_hooks
from fastft.engine import inputs, optimizer_step
from fastft.engine.aside import Aside
from fastft.engine.attach import STATE, is_ours
from fastft.engine.context import context_of, why_other_kernel
from fastft.engine.deferred import DeferredCache, LeftOut, Rest
from fastft.engine.forwards import layer_forward
from fastft.engine.host_embedding import keep_on_host
from fastft.engine.inputs import Inputs, LayerKind, owned
from fastft.engine.loss import Targets
from fastft.engine.norm import norm_forward
from fastft.engine.packed import Documents, confirmation, told_documents
from fastft.engine.padding import Padding, padding_of
from fastft.engine.parts import LayerCall, StepContext
from fastft.engine.precision import compute_dtype, why_mixed
from fastft.engine.reading import Stack, layers_and_norm
from fastft.engine.runs import Run
from fastft.engine.stack import run_layers
from fastft.engine.state import (
    EngineSettings,
    ModuleState,
    backward_chunk_of,
    call_original,
    policy_of,
    state_of,
    why_not_differentiated,
)
from fastft.engine.support import is_capturing, why_no_mask, why_sharded, writes_out
from fastft.kernels.attention.library import Seen
from fastft.kernels.attention.seen import documents_of
from fastft.models.kv_cache import KV_CACHE
from fastft.models.spec import LayerSpec
from fastft.plan import Policy

HEAD = "lm_head"
"""The ledger's name of head and loss."""
_KNOWN = inputs.NAMES | inputs.UNSEEN
_READ_AROUND = {"debug_io", "prune_layers", "labels", "logits_to_keep"}
"""Keywords that stock's decorators around the backbone read, or that its caller should have."""


class Stacked(NamedTuple):
    """What a straight forward gives."""

    hidden_BSD: torch.Tensor
    """Behind the final norm."""
    cache: DeferredCache | None
    """Where stock builds one."""
    left_out: LeftOut | None
    """Padding's rows, which are zero; None where none was left out."""


def backbone_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The decoder of a patched model, called by itself or by a head that is not the engine's."""
    state: ModuleState | None = self.__dict__.get(STATE)
    if state is None or state.settings.is_off:
        return call_original(self, args, kwargs)
    return _backbone(self, state, args, kwargs)


@torch.compiler.disable(reason="fastft's layers are compiled already: compile with fullgraph=False")
def _backbone(self: nn.Module, state: ModuleState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    settings = state.settings
    with settings.forward():
        if not settings.knows_head:
            settings.ledger.expected(HEAD, "head_and_loss", _who_has_the_head(state))
        reason = why_not_differentiated() or why_sharded(self)
        if reason is not None:
            settings.ledger.whole(reason)
            with settings.stock_only(reason):
                return call_original(self, args, kwargs)
        given = inputs.bind(self, args, kwargs)
        stacked = "its forward was replaced" if state.replaced else run_straight(self, settings, given)
        if not isinstance(stacked, Stacked):
            return _run_loop(self, settings, given, args, kwargs)
        output = getattr(outputs_of, settings.spec.backbone_output)
        return output(last_hidden_state=stacked.hidden_BSD, **{KV_CACHE: stacked.cache})


def run_straight(
    backbone: nn.Module, settings: EngineSettings, given: dict[str, Any], targets: Targets | None = None
) -> Stacked | str:
    """The backbone's output, or why stock's loop has to run.

    Args:
        given: the arguments by stock's names.
        targets: where only positions with a target will ever be looked at, these: what other padding would have
            seen, and given, is then left out.
    """
    spec, reading, asked = settings.spec, settings.reading, targets
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    tokens = ids if embeds is None else embeds
    if isinstance(tokens, torch.Tensor) and tokens.dim() >= 2:
        settings.place(*tokens.shape[:2])
    if settings.host_embedding:
        keep_on_host(backbone.get_input_embeddings())  # type: ignore[operator]
    # What a changed layer makes come again must be nothing that anybody sees.
    plain = _embeds_plainly(backbone, spec)
    unseen = reading.quiet and not reading.may_drop and plain
    reading.refresh(backbone, spec, settings.resident_layers, while_running=unseen)
    reason = why_not_gathered(backbone, given)
    if reason is not None:
        return reason
    layers, norm = layers_and_norm(backbone, spec)
    reason = reading.why_no_stack or next(filter(None, reading.reasons), None) or _why_wrapped(layers, settings)
    if reason is None and reading.stack is None:
        reason = "it has no layers"
    if reason is None and reading.shares_layers and inputs.builds_cache(backbone, given):
        reason = "layers share a place in the key/value cache"
    if reason is None and settings.inputs_differ is None:
        settings.inputs_differ = inputs.differ_from_stocks(backbone, settings, layers)
    if reason is not None or settings.inputs_differ:
        return reason or "this release of transformers hands other inputs to its layers"
    assert reading.stack is not None
    weight = reading.stack.parts[0].input_norm.weight_D
    # Before the embedding runs, whose hooks may draw random numbers (NEFTune): stock's loop would run them again.
    reason = why_mixed(_input_dtype(backbone, spec, given, weight), weight)
    reason = reason or why_no_mask(layers[0], spec, given.get("attention_mask"), weight.dtype)
    if reason is not None:
        return reason
    gathered = inputs.gather(backbone, spec, given)
    hidden = gathered.hidden_BSD
    reason = why_mixed(hidden.dtype, weight)  # a hook's output, or a wrapper's
    if reason is not None or hidden.device != weight.device:
        return reason or f"its input is on {hidden.device}, its weights on {weight.device}"
    if has_hooks(norm) or not is_ours(norm, norm_forward):
        targets = None  # somebody sees what goes into it
    if not ((plain and given.get("inputs_embeds") is None) or spec.embedding_multiplier is not None):
        # They may be a buffer that somebody fills anew.
        own_BSD = owned(gathered.hidden_BSD)
        gathered = gathered._replace(hidden_BSD=own_BSD, embeds_BSD=own_BSD)
    run = _Run(settings, reading.stack, gathered, layers)
    y_BSD, rows_R = _masked(backbone, run, given, targets)
    if not reading.look.unchanged:
        del y_BSD, run
        reading.ran_whole = False
        return run_straight(backbone, settings, given, asked)
    reading.ran_whole = True
    keeps_rest = rows_R is not None or gathered.builds_cache
    # Who asked for the cache, or reads the logits of a batch with padding, may do so after the optimizer's step.
    keep = rows_R is not None or bool(given.get("use_cache"))
    embeds = gathered.embeds_BSD if has_hooks(getattr(backbone, spec.embedding)) else None  # they run once
    rest = _rest(backbone, settings, given, embeds, keep=keep) if keeps_rest else None
    cache = None
    if gathered.builds_cache:
        assert rest is not None
        cache = DeferredCache(lambda: rest("Keys and values")[KV_CACHE])
    left_out = None
    if rows_R is not None:
        assert rest is not None
        left_out = LeftOut(partial(_completed, rest, rows_R), rows_R, rest.parameters)
    settings.ledger.all_layers_fused(settings.ops.name, spec.layers, len(layers), run.attention_notes)
    return Stacked(norm(y_BSD), cache, left_out)


def _completed(rest: Rest, rows_R: torch.Tensor, hidden_BSD: torch.Tensor) -> torch.Tensor:
    """`hidden_BSD`, whose rows other than `rows_R` were left out, with stock's values in them."""
    whole_TD = rest("Logits of padding", differentiable=torch.is_grad_enabled()).last_hidden_state.flatten(0, 1)
    real_RD = hidden_BSD.flatten(0, 1).index_select(0, rows_R)
    return whole_TD.to(real_RD.dtype).index_copy(0, rows_R, real_RD).view(hidden_BSD.shape)


def _run_loop(
    backbone: nn.Module, settings: EngineSettings, given: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Stock's loop over the layers, each fused or not.

    A cache that stock builds beside, and nobody looks at meanwhile, is left for later: a fused layer fills none.
    """
    reading, config = settings.reading, backbone.config
    told = given.get("position_ids") is not None and given.get("attention_mask") is None  # a cache joins documents
    late = (
        reading.is_fresh
        and reading.quiet
        and not reading.shares_layers
        and any(parts is not None for parts in reading.parts)
        and given.get(KV_CACHE) is None
        and inputs.builds_cache(backbone, given)
        and _is_as_long(given)  # a cache may have a longer one
        and not told
        and given.get("return_dict") is not False
        and getattr(config, "return_dict", True)
    )
    if not late:
        return call_original(backbone, args, kwargs)
    rest = _rest(backbone, settings, given, keep=bool(given.get("use_cache")))
    output = call_original(backbone, (), {**given, "use_cache": False})
    first = next(iter(output))
    values = {first: output[first], KV_CACHE: DeferredCache(lambda: rest("Keys and values")[KV_CACHE])}
    return type(output)(**{**values, **{name: value for name, value in output.items() if name not in values}})


def _is_as_long(given: dict[str, Any]) -> bool:
    """Whether the attention mask, if there is one, has a place for each token and no more."""
    mask, tokens = given.get("attention_mask"), given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if mask is None or tokens is None:
        return True
    return isinstance(mask, torch.Tensor) and mask.shape[-1] == tokens.shape[1]


def why_not_gathered(backbone: nn.Module, given: dict[str, Any]) -> str | None:
    """Why these arguments are for stock's loop, or None."""
    config: Any = backbone.config
    ids, embeds, mask, positions = (
        given.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
    )
    if given.get(KV_CACHE) is not None:
        return "a key/value cache is in use"
    if (ids is None) == (embeds is None) or (ids if embeds is None else embeds).dim() != (2 if embeds is None else 3):  # type: ignore[union-attr]
        return "it needs input_ids or inputs_embeds of one row a sequence"
    if is_capturing():
        return "hidden states are asked for"
    for name in ("output_hidden_states", "output_attentions"):
        asked = given.get(name)
        if getattr(config, name, False) if asked is None else asked is not False:
            return (
                "hidden states are asked for" if name == "output_hidden_states" else "attention weights are asked for"
            )
    if given.get("return_dict") is False or (given.get("return_dict") is None and not config.return_dict):
        return "a tuple is asked for"
    if given.get("is_causal") not in (None, True):
        return "attention was given is_causal"
    others = [name for name, value in given.items() if value is not None and name not in _KNOWN]
    if others:
        spec = state_of(backbone).settings.spec
        read = inputs.read_by_layer(layers_and_norm(backbone, spec)[0][0], spec) | _READ_AROUND
        for name in others:
            if name in read or (name.startswith("output_") and given[name] is not False):
                return f"it was given {name}"
    B, S = (ids if embeds is None else embeds).shape[:2]  # type: ignore[union-attr]
    if S == 0 or B == 0:
        return "the batch is empty"
    if mask is not None and not (isinstance(mask, torch.Tensor) and _fits(mask, B, S)):
        return f"the attention mask is a {type(mask).__name__} of another kind than B × S or B × 1 × S × S"
    if positions is not None and (positions.dim() != 2 or positions.shape[1] != S or positions.shape[0] not in (1, B)):
        return f"positions have the shape {tuple(positions.shape)}"
    return None


def _embeds_plainly(backbone: nn.Module, spec: LayerSpec) -> bool:
    """Whether the embedding is PyTorch's, and nobody hears of its calls."""
    embedding = getattr(backbone, spec.embedding)
    plain = type(embedding).forward is nn.Embedding.forward and "forward" not in embedding.__dict__
    return plain and not has_hooks(embedding)


def _input_dtype(backbone: nn.Module, spec: LayerSpec, given: dict[str, Any], otherwise: torch.Tensor) -> torch.dtype:
    """The dtype that the first layer's input should have, or that of `otherwise` where the embedding does not tell."""
    embeds = given.get("inputs_embeds")
    # As it lies there: to ask for a parametrized one would compute it once more, and move what it keeps.
    told = getattr(backbone, spec.embedding)._parameters.get("weight") if embeds is None else embeds
    known = isinstance(told, torch.Tensor) and told.is_floating_point()
    return told.dtype if known else otherwise.dtype


def _who_has_the_head(state: ModuleState) -> str:
    """Why head and loss are not the engine's where the decoder is called by itself."""
    model = state.settings.model()
    forward = None if model is None else getattr(model.__dict__.get("forward"), "__func__", None)
    owner = getattr(forward, "__globals__", {}).get("__name__", "")
    if owner and not owner.startswith(("fastft.", "transformers.")):
        return f"{owner.partition('.')[0]} replaced the model's forward and computes it"
    return "the decoder is called by itself"


def _fits(mask: torch.Tensor, B: int, S: int) -> bool:
    if mask.dim() == 2:
        return tuple(mask.shape) == (B, S)
    return mask.dim() == 4 and mask.shape[0] in (1, B) and tuple(mask.shape[1:]) == (1, S, S)


def _why_wrapped(layers: list[nn.Module], settings: EngineSettings) -> str | None:
    for index, layer in enumerate(layers):
        if not is_ours(layer, layer_forward) or state_of(layer).replaced:
            return f"the forward of layer {index} was replaced"
        if state_of(layer).settings is not settings:
            return f"layer {index} is another model's"
    return None


class _Run:
    """One forward's layers: run again if what was taken for granted of its masks is not so."""

    def __init__(self, settings: EngineSettings, stack: Stack, gathered: Inputs, layers: list[nn.Module]) -> None:
        self.settings, self.gathered = settings, gathered
        self.stack = stack
        self._writes_out = writes_out(layers[0], settings.spec)
        self._policies: list[Policy] = [policy_of(layer) for layer in layers]
        self._backward_chunks = [backward_chunk_of(layer) for layer in layers]
        hidden = gathered.hidden_BSD
        self._dtype = compute_dtype(hidden)
        self._parts, self._bank = stack.prepare(self._dtype, settings.reading.look)
        drops = [parts.has_dropout for parts in self._parts]
        self.has_dropout = any(drops)
        # Drawn from the CPU's generator, which `torch.manual_seed` fixes, without touching the device's.
        self._seeds = [int(torch.randint(2**62, (), device="cpu").item()) if drop else 0 for drop in drops]
        self.recorded = stack.may_record(hidden.shape[0] * hidden.shape[1], settings.graphs, hidden.device)
        self.attention_notes: dict[int, tuple[str, str]] = {}
        """Layers whose attention is not the one asked for: what runs, and why."""

    def __call__(
        self,
        masks: Callable[[LayerKind], torch.Tensor | None] | None = None,
        rows_R: torch.Tensor | None = None,
        documents: Documents | None = None,
    ) -> torch.Tensor:
        """The output of the last layer (B × S × D)."""
        settings, hidden = self.settings, self.gathered.hidden_BSD
        contexts: dict[Any, StepContext] = {}
        calls = []
        self.attention_notes = {}
        for index, (parts, policy, seed) in enumerate(zip(self._parts, self._policies, self._seeds, strict=True)):
            kind = self.gathered.kinds[index]
            key = kind, parts.softcap, parts.head_dim
            if key not in contexts:
                starts_N, longest = documents or (None, 0)
                mask = None if masks is None else masks(kind)
                written_out = mask is not None and self._writes_out
                seen = Seen(mask, kind.window, parts.softcap, starts_N, longest, written_out)
                contexts[key] = context_of(
                    settings, hidden, seen, self.gathered.angles[kind.rotary], parts.head_dim, self._dtype, rows_R
                )
            context = contexts[key]
            note = why_other_kernel(settings, context)
            if note is not None:
                self.attention_notes[index] = context.attention.name, note
            chunks = settings.mlp_chunk_tokens, self._backward_chunks[index]
            calls.append(LayerCall(settings.ops, parts, context, policy, seed, *chunks))
        graphs = self.stack.graphs(settings.graphs, hidden.device)
        return run_layers(hidden, Run(tuple(calls), self._bank, graphs, self.stack.frozen, settings.reading.look))


def _masked(
    backbone: nn.Module, run: _Run, given: dict[str, Any], targets: Targets | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The layers' output under the masks that stock would have made, and which rows of it are there."""
    mask, reading = given.get("attention_mask"), run.settings.reading
    if mask is None:
        return _documents(run, given), None
    masks = partial(inputs.stocks_mask, backbone, run.settings.spec, given, run.gathered)
    if mask.dim() == 4:
        return run(masks), None
    question = Aside(mask.device)

    def ask() -> Padding:
        with question.asking():
            return padding_of(mask, None if targets is None else targets.targets())

    def needs_mask(padding: Padding) -> bool:
        return padding.real < mask.numel() and (targets is None or not padding.is_right_only)

    y_BSD = None
    if run.recorded and reading.needed_no_mask:
        # What was so the last time is taken for granted until the answer is there, and the device works meanwhile.
        y_BSD = run()
    padding = ask()
    reading.needed_no_mask = not needs_mask(padding)
    if needs_mask(padding):
        del y_BSD
        return run(masks), None
    # A recording has rows for padding too; only, what they hold is nobody's.
    rows_R = None if targets is None or run.recorded else padding.rows_R
    if y_BSD is None:
        y_BSD = run(None, rows_R)
    if rows_R is None and padding.real < mask.numel():
        rows_R = padding.all_rows(mask)
    return y_BSD, rows_R


def _documents(run: _Run, given: dict[str, Any]) -> torch.Tensor:
    """The layers' output where there is no mask: packed documents are told by their positions, if stock tells them."""
    position_ids, gathered = given.get("position_ids"), run.gathered
    if position_ids is None or gathered.builds_cache or not run.settings.spec.separates_documents:
        return run()
    B = len(gathered.hidden_BSD)
    position_ids_BS = position_ids.expand(B, -1)
    guess = told_documents(given, gathered.hidden_BSD) if not run.has_dropout else None
    if guess is None:
        return run(documents=documents_of(position_ids_BS))
    confirmed = confirmation(position_ids_BS, guess)
    y_BSD = run(documents=guess if len(guess[0]) > B + 1 else None)
    if confirmed():
        return y_BSD
    del y_BSD
    return run(documents=documents_of(position_ids_BS))


def _rest(
    backbone: nn.Module,
    settings: EngineSettings,
    given: dict[str, Any],
    embeds_BSD: torch.Tensor | None = None,
    *,
    keep: bool,
) -> Rest:
    """Stock's backbone on the same arguments, or on `embeds_BSD` in their tokens' place."""
    reading = settings.reading
    # The original comes no further than the first; a patched model's own looks at all of them.
    device = next(nn.Module.parameters(backbone)).device.type
    if embeds_BSD is not None:
        given = {**given, "input_ids": None, "inputs_embeds": embeds_BSD}
    # The caller may fill them anew before anything is read; wide ones are not worth a copy, and watched instead.
    given = {name: value.clone() if _is_narrow(value) else value for name, value in given.items()}
    wide = [value for value in given.values() if isinstance(value, torch.Tensor)]

    def call() -> Any:
        with settings.stock_only("it makes what was left out"):
            return call_original(backbone, (), given)

    stack = reading.stack
    if stack is not None and stack.bank is not None:
        adapters: list[torch.Tensor] = list(stack.bank.parameters)
    else:
        adapters = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    if keep:
        optimizer_step.install()
    return Rest(call, adapters, reading.as_it_is(), device, given=wide, keep=keep)


def _is_narrow(value: Any) -> bool:
    """Whether it is a tensor of one number a token."""
    return isinstance(value, torch.Tensor) and value.dim() <= 2
