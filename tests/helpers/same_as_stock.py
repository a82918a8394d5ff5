"""The same question to a stock and to a patched model, and what differs between their answers."""

# B rows, S tokens a row, V vocabulary

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

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


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def own_attention_function(model: Any) -> None:
    ALL_ATTENTION_FUNCTIONS.register("halved_for_a_test", halving(ALL_ATTENTION_FUNCTIONS["sdpa"]))
    model.get_base_model().config._attn_implementation = "halved_for_a_test"


class HalfLayer(modeling_llama.LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states + 0.5 * (super().forward(hidden_states, *args, **kwargs) - hidden_states)


class Squares(torch.autograd.Function):
    """The mean square, by a backward that somebody wrote."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square().mean()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad_outputs[0] * 2 * x / x.numel()
