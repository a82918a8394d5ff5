"""What an output holds and the engine did not compute: made by stock's rules when somebody uses it, and only then.

The output stays Hugging Face's own class, a mapping like any other; only its values may be late.

Legend: B batch, S sequence, D model, V vocabulary.
"""

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map
from transformers.cache_utils import DynamicCache

_READS_NO_VALUE = {
    getattr(torch.Tensor, name).__get__
    for name in (
        "shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_sparse", "is_quantized", "is_meta", "is_leaf",
        "requires_grad", "grad_fn", "output_nr", "grad", "retains_grad",
    )
} | {
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point, torch.Tensor.is_complex,
    torch.Tensor.__len__, torch.Tensor.element_size, torch.Tensor.__hash__,
}  # fmt: skip
_WANTS_GRADIENT = {torch.Tensor.register_hook, torch.Tensor.retain_grad}
_CHANGED = (
    "{what} of a training forward were left out, and cannot be made any more: {changed} changed since. "
    "Read them before that, or call the model under torch.no_grad()"
)


_version_of = attrgetter("_version")


def _autocast_now(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """What makes the state of autocast what it is now."""
    on, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=on)


class Rest:
    """The same call by stock's own code, for what the fused forward left out."""

    def __init__(
        self,
        call: Callable[[], Any],
        parameters: Iterable[torch.Tensor],
        put_back: Callable[[], AbstractContextManager[bool]],
        device: str,
        *,
        given: Iterable[torch.Tensor] = (),
        keep: bool = False,
    ) -> None:
        """`parameters` and `given` are the tensors that the call's result depends on, `device` the type that it
        computes on; `put_back` makes what else it depends on what it is now, and says whether that is possible.

        With `keep`, an optimizer's step that comes while this lives leaves the parameters' values for it.
        """
        self._call, self._put_back = call, put_back
        self._context = _autocast_now(device)
        self.parameters, self._given = list(parameters), list(given)
        self._state, self._was_given = self._now(), list(map(_version_of, self._given))
        self._kept: list[torch.Tensor] | None = None
        if keep:
            _waiting.add(self)

    def __call__(self, what: str, *, differentiable: bool = True) -> Any:
        """Stock's output, with its graph where that is asked for and stock's could still be used: not after a step.

        Raises:
            RuntimeError: something else has changed since the forward.
        """
        if list(map(_version_of, self._given)) != self._was_given:
            raise RuntimeError(_CHANGED.format(what=what, changed="its arguments have"))
        called = _as_called if differentiable else _without_graph
        with self._put_back() as is_as_then, called(), torch.random.fork_rng(), self._context():
            if not is_as_then:
                raise RuntimeError(_CHANGED.format(what=what, changed="the model's layers have"))
            if self._now() == self._state:
                return self._call()
            if self._kept is None:
                raise RuntimeError(_CHANGED.format(what=what, changed="the adapters have"))
            now = [parameter.detach().clone() for parameter in self.parameters]
            # Through `data`, whose changes a graph that is waiting for its backward does not count.
            try:
                self._put(self._kept)
                with torch.no_grad():
                    return self._call()
            finally:
                self._put(now)

    def keep(self) -> None:
        """Keep the parameters' values, if they are still those of the forward."""
        if self._kept is None and self._now() == self._state:
            self._kept = [parameter.detach().clone() for parameter in self.parameters]

    def _put(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data.copy_(value)

    def _now(self) -> list[int]:
        return list(map(_version_of, self.parameters))


_waiting: "weakref.WeakSet[Rest]" = weakref.WeakSet()


def keep_what_waits() -> None:
    """Before an optimizer's step: keep for every output that lives what its rest depends on."""
    for rest in list(_waiting):
        rest.keep()
    _waiting.clear()


@contextmanager
def _as_called() -> Iterator[None]:
    """With a graph.  Whatever is under way where a value is read has no part in how it is made: no inference mode, and
    none of a checkpoint's hooks, which count what one function saves."""
    with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(torch.Tensor.detach, _same):
        yield


@contextmanager
def _without_graph() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class Uses:
    """What a graph knows of the logits' source: it keeps it, and so the hidden states, only once somebody used values
    or looked at their gradient.  For a loss alone nothing is kept."""

    def __init__(self, source: "Source") -> None:
        self.kept: Source | None = None
        self.gradient_is_wanted = False
        """Whether a loss cannot leave the logits' own gradient out."""
        self._source = weakref.ref(source)

    def source(self) -> "Source":
        """Where the logits come from.  Whoever starts a backward at them has them."""
        source = self.kept or self._source()
        assert source is not None
        return source


class LeftOut(NamedTuple):
    """Rows of hidden states that are not there."""

    complete: Callable[[torch.Tensor], torch.Tensor]
    """From the hidden states (B × S × D) to the same with stock's in the rows that were left out."""
    rows_R: torch.Tensor
    """The rows of the B·S that are there."""
    parameters: list[torch.Tensor]
    """What is trained of what they depend on."""


class Source:
    """Where a deferred tensor's values come from."""

    def __init__(
        self, hidden: torch.Tensor, dtype: torch.dtype, make: Callable[[torch.Tensor], torch.Tensor],
        left_out: LeftOut | None, weight: torch.Tensor,
    ) -> None:  # fmt: skip
        self.hidden, self.dtype, self._make, self.left_out = hidden, dtype, make, left_out
        self._weight, self._was = weight, (weight._version, weight.data_ptr())
        self._uses: weakref.ref[Uses] | None = None
        self.autocast = _autocast_now(hidden.device.type)
        self._local: tuple[torch.Tensor, torch.Tensor] | None = None

    def uses(self) -> Uses:
        """What the graphs of these logits share; they keep it."""
        uses = None if self._uses is None else self._uses()
        if uses is None:
            uses = Uses(self)
            self._uses = weakref.ref(uses)
        return uses

    def make(self, hidden: torch.Tensor, *, complete: bool = False) -> torch.Tensor:
        """The values of these hidden states, or of all where rows were left out.

        Raises:
            RuntimeError: the head has changed since the forward.
        """
        if (self._weight._version, self._weight.data_ptr()) != self._was:
            raise RuntimeError(_CHANGED.format(what="Logits", changed="the head has"))
        return self._make(self.left_out.complete(hidden) if complete and self.left_out is not None else hidden)

    def local(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A leaf that stands for the hidden states, and the values as a function of it, where none is left out."""
        self.uses().kept = self
        if self._local is None:
            with _as_called(), self.autocast():
                leaf = self._leaf()
                self._local = leaf, self.make(leaf)
        return self._local

    def completed(self) -> torch.Tensor:
        """The values where some rows of the hidden states were left out: of stock's, in a graph of their own."""
        with _as_called(), self.autocast():
            return self.make(self.hidden, complete=True)

    def detached(self) -> torch.Tensor:
        """The values without a graph."""
        self.uses().kept = self
        with _without_graph(), self.autocast():
            return self.make(self.hidden.detach(), complete=True)

    def gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """The hidden states' gradient, from the values' (B × S × V)."""
        if self.left_out is None:
            leaf, values = self.local()
            (result,) = torch.autograd.grad(
                values, leaf, gradient.to(values.dtype), retain_graph=True, create_graph=torch.is_grad_enabled()
            )
            return result
        is_left_out = torch.ones(gradient.shape[:-1], dtype=torch.bool, device=gradient.device).flatten()
        is_left_out[self.left_out.rows_R] = False
        reaches_padding = bool(gradient.flatten(0, -2)[is_left_out].any())
        if reaches_padding and (torch.is_grad_enabled() or not _is_plain_backward(self.left_out.parameters)):
            raise RuntimeError(
                "rows of padding were left out of this forward, so a function of its logits that PyTorch does not know "
                "has a gradient only in a plain backward(); call .clone() on the logits before it"
            )
        with _as_called(), self.autocast():
            leaf = self._leaf()
            values = self.make(leaf, complete=reaches_padding)
        # What the padding's rows owe to the adapters goes straight to them, in a backward within this one.
        torch.autograd.backward(values, gradient.to(values.dtype))
        assert leaf.grad is not None
        return leaf.grad

    def _leaf(self) -> torch.Tensor:
        return self.hidden.detach().requires_grad_(self.hidden.is_floating_point())


def _is_plain_backward(parameters: list[torch.Tensor]) -> bool:
    """Whether the backward that is under way is for all leaves that it reaches, these among them."""
    try:
        # Of a leaf that was chosen it raises, of one that was not it says no.
        nodes = (get_gradient_edge(parameter).node for parameter in parameters[:1])
        return all(map(torch._C._will_engine_execute_node, nodes))
    except RuntimeError:
        return False


class Deferred(torch.Tensor):
    """A tensor (B × S × V) whose values are computed when somebody uses them; until then it has no memory."""

    source: Source
    _made_values: torch.Tensor | None

    @property
    def is_pending(self) -> bool:
        """Whether nobody has used a value yet."""
        return self._made_values is None

    @torch.compiler.disable(reason="the model is compiled by its own call")
    def compute(self) -> torch.Tensor:
        """The values, differentiable, as they would have been when the model was called."""
        if self._made_values is None:
            with _as_called():
                if self.source.left_out is not None and not self.source.uses().gradient_is_wanted:
                    self._made_values = self.source.completed().to(self.dtype)
                else:
                    self._made_values = _Fulfilled.apply(self)
        return self._made_values

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self.compute())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS_NO_VALUE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in _WANTS_GRADIENT or func is torch.autograd.grad:
            return _of_its_gradient(func, args, kwargs or {})
        if not kwargs and len(args) == 1 and type(args[0]) is cls and args[0].is_pending:
            # What forwards and trainers do on the way to a loss that is computed in fp32 whatever the logits' dtype.
            if func is torch.Tensor.contiguous:
                return args[0]
            if func is torch.Tensor.float:
                return _deferred(args[0].source, args[0].shape, torch.float32)
        args, kwargs = tree_map(computed, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        # Below autograd, which has the tensor's own node in its graph: of the values no other is needed.
        args, kwargs = tree_map(_detached, (args, kwargs or {}))
        return func(*args, **kwargs)


def _detached(value: Any) -> Any:
    return value.source.detached().to(value.dtype) if type(value) is Deferred else value


def _of_its_gradient(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call what looks at the gradient of deferred tensors themselves."""
    if func is torch.autograd.grad:
        given = inspect.signature(func).bind(*args, **kwargs).arguments
        given["outputs"] = tree_map(computed, given["outputs"])
        args, kwargs = (), given
        looked_at = given["inputs"]
    else:
        looked_at = args[0]
    for each in tree_leaves(looked_at):
        if type(each) is Deferred:
            uses = each.source.uses()
            uses.kept, uses.gradient_is_wanted = each.source, True
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def defer(
    hidden: torch.Tensor,
    dtype: torch.dtype,
    make: Callable[[torch.Tensor], torch.Tensor],
    weight: torch.Tensor,
    left_out: LeftOut | None = None,
) -> Deferred:
    """What `make` makes of `hidden` (… × D) with `weight` (V × D), as `dtype`, when it is used."""
    return _deferred(Source(hidden, dtype, make, left_out, weight), (*hidden.shape[:-1], weight.shape[0]), dtype)


def computed(value: Any) -> Any:
    """A deferred tensor's values; anything else as it is."""
    return value.compute() if type(value) is Deferred else value


def _deferred(source: Source, shape: tuple[int, ...], dtype: torch.dtype) -> Deferred:
    made: Deferred = _Promise.apply(source.hidden, source, shape, dtype)
    return made


class _Promise(torch.autograd.Function):
    """The node of a deferred tensor: a gradient of its values, wherever it comes from, goes on to the hidden states."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, source: Source, shape: tuple[int, ...], dtype: torch.dtype) -> Deferred:
        """A tensor of this shape without values."""
        made: Deferred = torch.Tensor._make_wrapper_subclass(Deferred, shape, dtype=dtype, device=hidden.device)
        made.source, made._made_values = source, None
        ctx.uses = source.uses()
        ctx.set_materialize_grads(False)  # zeros for a loss that passes them by would be as large as the logits
        return made

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        """The hidden states' gradient."""
        gradient = grad_outputs[0]
        return None if gradient is None else ctx.uses.source().gradient(gradient), None, None, None


class _Fulfilled(torch.autograd.Function):
    """A deferred tensor's values, whose gradient is the deferred tensor's own."""

    @staticmethod
    def forward(ctx: Any, deferred: Deferred) -> torch.Tensor:
        """The values."""
        source = deferred.source
        values = source.local()[1].detach() if source.left_out is None else source.detached()
        return values.to(deferred.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        """As it came."""
        return grad_outputs[0]


class DeferredCache(DynamicCache):
    """The key/value cache that stock's training forward returns beside what training needs."""

    def __init__(self, make: Callable[[], DynamicCache]) -> None:
        self._make_cache: Callable[[], DynamicCache] | None = make

    def __getattr__(self, name: str) -> Any:
        """Whatever a cache has it has once somebody asks."""
        make = self.__dict__.get("_make_cache")
        if make is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        del self.__dict__["_make_cache"]
        self.__dict__.update(make().__dict__)
        self.__class__ = DynamicCache  # type: ignore[assignment]
        return getattr(self, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled and copied as the cache that it stands for."""
        _ = self.layers
        return self.__reduce_ex__(protocol)
