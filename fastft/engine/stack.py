"""A run of decoder layers as one autograd function.

Its arguments are the first layer's input and every adapter; the frozen weights come with the calls.  One function for
all layers, instead of one a layer, costs the host less and lets the engine decide when each intermediate is freed.

Legend: B batch, S sequence, T = B·S tokens, D model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fastft.engine.layer import Saved, backward_layer, forward_layer, pick_rows, spread_rows
from fastft.engine.parts import LayerCall


def run_layers(x_BSD: torch.Tensor, calls: Sequence[LayerCall]) -> torch.Tensor:
    """The output (B × S × D, dtype of `x_BSD`) of the layers one after the other.

    Differentiable in the input and the adapters.  The calls share their `StepContext`s' rows.
    """
    adapters = [matrix for call in calls for matrix in call.parts.adapters]
    output: torch.Tensor = DecoderStack.apply(x_BSD, tuple(calls), *adapters)
    return output


class DecoderStack(torch.autograd.Function):
    """See `run_layers`."""

    @staticmethod
    def forward(
        ctx: Any, x_BSD: torch.Tensor, calls: tuple[LayerCall, ...], *adapters: torch.Tensor | None
    ) -> torch.Tensor:
        """Run the layers; each saves what its policy says."""
        # The adapters reach the linears through the calls; as arguments they are what autograd sees.
        needs_x, _, *needs = ctx.needs_input_grad
        first = 0 if needs_x else _first_trained(calls, needs)
        rows_R = calls[0].context.rows_R
        kept: list[Saved | None] = []
        with torch.autocast(x_BSD.device.type, enabled=False):
            y_TD = pick_rows(x_BSD.reshape(-1, x_BSD.shape[-1]), rows_R)
            for index, call in enumerate(calls):
                y_TD, saved = forward_layer(y_TD, call)
                kept.append(saved if index >= first else None)
                del saved
        if first < len(calls):
            ctx.calls, ctx.kept, ctx.first = calls, kept, first
            ctx.shape, ctx.dtype = x_BSD.shape, x_BSD.dtype
            # Only so that autograd notices when they are changed between forward and backward.
            ctx.save_for_backward(*adapters)
        return spread_rows(y_TD, rows_R, calls[0].context.tokens).view(x_BSD.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        """Gradients of the input (None where nobody asks) and of each adapter matrix."""
        _ = ctx.saved_tensors  # raises where the graph was freed, or an adapter was changed
        calls: tuple[LayerCall, ...] = ctx.calls
        needs_x, _, *needs = ctx.needs_input_grad
        rows_R, tokens = calls[0].context.rows_R, calls[0].context.tokens
        kept = ctx.kept
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.kept = None  # so that each layer's tensors are freed as soon as its backward is done
        elif kept is not None:
            kept = list(kept)
        d_TD: torch.Tensor | None = pick_rows(grad_outputs[0].reshape(-1, ctx.shape[-1]), rows_R).to(ctx.dtype)
        gradients: list[list[torch.Tensor | None]] = []
        for index in reversed(range(ctx.first, len(calls))):
            assert d_TD is not None
            # Popped into the call: nobody else holds them, so the layer can free what it has used.
            d_TD, of_layer = backward_layer(d_TD, kept.pop(), calls[index], needs_dx=needs_x or index > ctx.first)
            gradients.append(of_layer)
        gradients.extend([None] * len(call.parts.adapters) for call in reversed(calls[: ctx.first]))
        flat = [gradient for of_layer in reversed(gradients) for gradient in of_layer]
        return (
            spread_rows(d_TD, rows_R, tokens).view(ctx.shape) if needs_x and d_TD is not None else None,
            None,
            *(gradient if want else None for gradient, want in zip(flat, needs, strict=True)),
        )


def _first_trained(calls: Sequence[LayerCall], needs: Sequence[bool]) -> int:
    """The first layer with an adapter that wants a gradient: nothing is saved below it, and backward stops there."""
    offset = 0
    for index, call in enumerate(calls):
        count = len(call.parts.adapters)
        if any(needs[offset : offset + count]):
            return index
        offset += count
    return len(calls)
