"""A run of decoder layers as one autograd function.

Its arguments are the first layer's input and every adapter; the frozen weights come with the calls.  One function for
all layers, instead of one a layer, costs the host less and lets the engine decide when each intermediate is freed.

Legend: B batch, S sequence, T = B·S tokens, D model.
"""

from itertools import chain
from operator import attrgetter
from typing import Any

import torch

from fastft.engine.first_order import first_order, path_to
from fastft.engine.offload import ParkedLayer, goes_to_host
from fastft.engine.runs import Kept, Run, backward_run, first_trained, forward_run

_version = attrgetter("_version")


def run_layers(x_BSD: torch.Tensor, run: Run) -> torch.Tensor:
    """The output (B × S × D, dtype of `x_BSD`) of the layers one after the other; differentiable in `x_BSD` and the
    adapters."""
    output: torch.Tensor = DecoderStack.apply(x_BSD, run, torch.is_grad_enabled(), *run.adapters)
    return output


class DecoderStack(torch.autograd.Function):
    """See `run_layers`."""

    @staticmethod
    def forward(
        ctx: Any, x_BSD: torch.Tensor, run: Run, has_backward: bool, *adapters: torch.Tensor | None
    ) -> torch.Tensor:
        """Run the layers; each saves what its policy says."""
        needs_x, _, _, *needs = ctx.needs_input_grad
        # Without gradients `needs` is the same, but nothing is saved for a backward that does not come.
        first = (0 if needs_x else first_trained(run, needs)) if has_backward else len(run.calls)
        ctx.in_use, kept = None, None
        with torch.autocast(x_BSD.device.type, enabled=False):
            if run.graphs is not None and first < len(run.calls):
                ctx.in_use = run.graphs.take(x_BSD, run, first, needs_x)
            if ctx.in_use is not None:
                y_BSD = ctx.in_use.forward(x_BSD, run)  # which reads only what it holds itself
            else:
                if run.bank is not None:
                    run.bank.refresh()
                y_BSD, kept = forward_run(x_BSD, run.calls, first, look=run.look)
        if not run.look.at_all():
            ctx.in_use = None
        elif first < len(run.calls):
            ctx.run, ctx.kept, ctx.first, ctx.dtype = run, kept, first, x_BSD.dtype
            ctx.versions = _versions(run, first)
            x = x_BSD if needs_x and kept is not None and _keeps(x_BSD, run, kept) else path_to(x_BSD)
            told = [] if kept is None else _told(run, first)
            # Only so that autograd notices when they are changed between forward and backward.
            ctx.save_for_backward(x, *told, *adapters)
        return y_BSD

    @staticmethod
    @first_order
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        """Gradients of the input (None where nobody asks) and of each adapter matrix."""
        _ = ctx.saved_tensors  # raises where the graph was freed, or something was changed
        needs_x, _, _, *needs = ctx.needs_input_grad
        run, dy_BSD = ctx.run, grad_outputs[0].to(ctx.dtype)
        if ctx.versions != _versions(run, ctx.first):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                "frozen weight of a decoder layer, since the forward that this is the backward of"
            )
        if ctx.in_use is not None:
            dx_BSD, gradient_N = ctx.in_use.backward(dy_BSD)
            gradients = run.bank.hand_out(gradient_N, copy=True)
        else:
            kept, last = ctx.kept, not torch._C._autograd._get_current_graph_task_keep_graph()
            if not last:
                kept = list(kept)
            else:
                ctx.kept = None  # so that each layer's tensors are freed as soon as its backward is done
            dx_BSD, gradients = backward_run(dy_BSD, run.calls, kept, ctx.first, needs_dx=needs_x, last=last)
            if run.bank is not None:
                gradients = run.bank.hand_out(run.bank.join(gradients))
        return (
            dx_BSD,
            None,
            None,
            *(gradient if want else None for gradient, want in zip(gradients, needs, strict=True)),
        )


def _versions(run: Run, first: int) -> int:
    """Grows whenever a frozen tensor that the backward reads is changed in place.

    To save them, which is autograd's own way, costs the host no less, and whoever has hooks on what is saved
    (`torch.autograd.graph.save_on_cpu`) would get the weights of all layers back at once.
    """
    return sum(map(_version, chain.from_iterable(run.frozen[first:])))


def _told(run: Run, first: int) -> list[torch.Tensor | None]:
    """The tensors that the layers were told, which may be the caller's: masks, documents and angles."""
    contexts = {id(call.context): call.context for call in run.calls[first:]}.values()
    told = [t for c in contexts for t in (c.seen.mask, c.seen.documents, c.cos_Sd, c.sin_Sd)]
    return [None if t is None or t.is_inference() else t for t in told]


def _keeps(x_BSD: torch.Tensor, run: Run, kept: Kept) -> bool:
    """Whether the run's input itself waits for the backward, and no copy of it: it is then saved at no cost."""
    moved = isinstance(kept[0], ParkedLayer) and goes_to_host(x_BSD)
    return run.calls[0].context.rows_R is None and not moved
