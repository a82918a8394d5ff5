"""What an output holds and the engine did not compute: made by stock's rules when somebody uses it, and only then.

The output stays Hugging Face's own class, a mapping like any other; only its values may be late.

Legend: B batch, S sequence, D model, V vocabulary.
"""

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._pytree import tree_map
from transformers.cache_utils import DynamicCache

_READS_NO_VALUE = {
    getattr(torch.Tensor, name).__get__
    for name in (
        "shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_sparse", "is_quantized", "is_meta", "is_leaf",
        "requires_grad", "grad_fn", "output_nr",
    )
} | {
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point, torch.Tensor.is_complex,
    torch.Tensor.__len__, torch.Tensor.element_size, torch.Tensor.__hash__,
}  # fmt: skip
_CHANGED = (
    "{what} of a training forward were left out, and cannot be made any more: the adapters have changed since. "
    "Read them before the optimizer's step, or call the model under torch.no_grad()"
)


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
        version: Callable[[], int],
        device: str,
        *,
        keep: bool = False,
    ) -> None:
        """`parameters` and `version` are what the call's result depends on, `device` the type that it computes on.

        With `keep`, an optimizer's step that comes while this lives leaves the parameters' values for it.
        """
        self._call, self._version = call, version
        self._context = _autocast_now(device)
        self._parameters = list(parameters)
        self._state = self._now()
        self._kept: list[torch.Tensor] | None = None
        if keep:
            _waiting.add(self)

    def __call__(self, what: str) -> Any:
        """Stock's output, with its graph; without one, as stock's could not be used any more, after a step.

        Raises:
            RuntimeError: something else has changed since the forward.
        """
        if self._now() == self._state:
            with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(), self._context():
                return self._call()
        if self._kept is None or self._version() != self._state[0]:
            raise RuntimeError(_CHANGED.format(what=what))
        now = [parameter.detach().clone() for parameter in self._parameters]
        # Through `data`, whose changes a graph that is waiting for its backward does not count.
        try:
            self._put(self._kept)
            with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(), self._context():
                return self._call()
        finally:
            self._put(now)

    def keep(self) -> None:
        """Keep the parameters' values, if they are still those of the forward."""
        if self._kept is None and self._now() == self._state:
            self._kept = [parameter.detach().clone() for parameter in self._parameters]

    def _put(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.data.copy_(value)

    def _now(self) -> tuple[int, list[int]]:
        return self._version(), [parameter._version for parameter in self._parameters]


_waiting: "weakref.WeakSet[Rest]" = weakref.WeakSet()


def keep_what_waits() -> None:
    """Before an optimizer's step: keep for every output that lives what its rest depends on."""
    for rest in list(_waiting):
        rest.keep()
    _waiting.clear()


class _Source:
    """Where a deferred tensor's values come from."""

    def __init__(
        self, hidden: torch.Tensor, dtype: torch.dtype, make: Callable[[torch.Tensor], torch.Tensor],
        complete: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> None:  # fmt: skip
        self.hidden, self.dtype, self.make, self.complete = hidden, dtype, make, complete
        self.autocast = _autocast_now(hidden.device.type)
        self._local: tuple[torch.Tensor, torch.Tensor] | None = None

    def local(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A leaf that stands for the hidden states, and the values as a function of it."""
        if self._local is None:
            with torch.inference_mode(False), torch.enable_grad(), self.autocast():
                leaf = self.hidden.detach().requires_grad_(self.hidden.is_floating_point())
                self._local = leaf, self.make(leaf)
        return self._local

    def completed(self) -> torch.Tensor:
        """The values where some rows of the hidden states were left out: of stock's, in a graph of their own."""
        assert self.complete is not None
        with torch.inference_mode(False), torch.enable_grad(), self.autocast():
            return self.make(self.complete(self.hidden))


class Deferred(torch.Tensor):
    """A tensor (B × S × V) whose values are computed when somebody uses them; until then it has no memory."""

    source: _Source
    _made_values: torch.Tensor | None

    @property
    def is_pending(self) -> bool:
        """Whether nobody has used a value yet."""
        return self._made_values is None

    def compute(self) -> torch.Tensor:
        """The values, differentiable, as they would have been when the model was called."""
        if self._made_values is None:
            with torch.inference_mode(False), torch.enable_grad():
                if self.source.complete is not None:
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
        # Below autograd, where computing the values would lose their gradient in silence.
        raise NotImplementedError(f"{func} was called on logits that were not computed")


def defer(
    hidden: torch.Tensor,
    width: int,
    dtype: torch.dtype,
    make: Callable[[torch.Tensor], torch.Tensor],
    complete: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Deferred:
    """What `make` makes of `hidden` (… × D): … × `width`, as `dtype`, when it is used.

    `complete` gives the hidden states in full where rows of `hidden` were left out.
    """
    return _deferred(_Source(hidden, dtype, make, complete), (*hidden.shape[:-1], width), dtype)


def computed(value: Any) -> Any:
    """A deferred tensor's values; anything else as it is."""
    return value.compute() if type(value) is Deferred else value


def _deferred(source: _Source, shape: tuple[int, ...], dtype: torch.dtype) -> Deferred:
    made: Deferred = _Promise.apply(source.hidden, source, shape, dtype)
    return made


class _Promise(torch.autograd.Function):
    """The node of a deferred tensor: a gradient of its values, wherever it comes from, goes on to the hidden states."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, source: _Source, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Deferred:
        """A tensor of this shape without values."""
        made: Deferred = torch.Tensor._make_wrapper_subclass(Deferred, shape, dtype=dtype, device=hidden.device)
        made.source, made._made_values = source, None
        ctx.source = source
        return made

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        """The hidden states' gradient."""
        if ctx.source.complete is not None:
            raise RuntimeError(
                "rows of padding were left out of this forward, so a function of its logits that PyTorch does not know "
                "has no gradient; call .clone() on the logits before it"
            )
        leaf, values = ctx.source.local()
        (gradient,) = torch.autograd.grad(
            values, leaf, grad_outputs[0].to(values.dtype), retain_graph=True, create_graph=torch.is_grad_enabled()
        )
        return gradient, None, None, None


class _Fulfilled(torch.autograd.Function):
    """A deferred tensor's values, whose gradient is the deferred tensor's own."""

    @staticmethod
    def forward(ctx: Any, deferred: Deferred) -> torch.Tensor:
        """The values."""
        _, values = deferred.source.local()
        return values.detach().to(deferred.dtype)

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
        return getattr(self, name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled and copied as the cache that it stands for."""
        _ = self.layers
        real = DynamicCache.__new__(DynamicCache)
        real.__dict__.update(self.__dict__)
        return real.__reduce_ex__(protocol)
