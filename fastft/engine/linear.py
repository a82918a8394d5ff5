"""One LoRA linear layer as an autograd function, for models whose decoder layers do not run fused as a whole.

The adapter is added inside the GEMM, the frozen weight gets no gradient, and of the forward only the input and
x·Aᵀ are saved; PEFT's forward also keeps the dropped-out input and its mask, and goes over the output three times.

Legend: T tokens, I in, O out, R rank.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastft.adapters.adapted import AdaptedLinear, Gradients
from fastft.adapters.lora import PACKED, read_linear, stand_in, why_not_alone
from fastft.backends import Backend
from fastft.engine.attach import STATE
from fastft.engine.first_order import first_order, path_to
from fastft.engine.precision import compute_dtype
from fastft.engine.state import ModuleState, call_original, why_not_differentiated
from fastft.engine.watch import Watch, has_global_hooks
from fastft.kernels.lora_linear.reference import drop, lora_linear, lora_linear_backward
from fastft.models.identity import why_no_linear
from fastft.models.quantized import is_packed_for_cpu, is_quantized


class LoraLinear(torch.autograd.Function):
    """`AdaptedLinear`'s y, differentiable in the input, A, B and both biases."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        linear: AdaptedLinear,
        dtypes: tuple[torch.dtype, torch.dtype],
        seed: int,
        ops: Backend,
        *trained: torch.Tensor | None,
    ) -> torch.Tensor:
        """The output (… × O) for `x` (… × I).

        `dtypes` are the one to compute in and the output's; `ops` has what makes narrow gradients.  `trained` are A, B,
        a variant's vector and number, the base layer's bias and B's, which come with `linear` as well; as arguments
        they are what autograd sees.
        """
        compute, output = dtypes
        given = linear
        with _no_autocast(x.device.type):
            linear, of_variant = given.resolved(compute)
            x_TI = x.reshape(-1, x.shape[-1]).to(compute)
            dropped = drop((linear,), len(x_TI), compute, x.device, seed, ops.dropout)
            (y_TO,), low_TR = lora_linear(x_TI, (_with_one_bias(linear),), dropped=dropped)
        needs_x, _, _, _, _, *needs = ctx.needs_input_grad
        if any(ctx.needs_input_grad):
            ctx.linear, ctx.of_variant, ctx.seed, ctx.compute, ctx.ops = given, of_variant, seed, compute, ops
            ctx.shape, ctx.dtype = x.shape, x.dtype
            kept: tuple[torch.Tensor | None, ...]
            if not any(needs[:4]):
                kept = (None, None, path_to(x))
            elif x.dtype == compute and x.is_contiguous():
                kept = (x, low_TR, None)
            else:
                kept = (x_TI, low_TR, path_to(x))
            # W and what is trained only so that autograd notices when they are changed between forward and backward.
            weight = linear.module.weight if needs_x and not is_quantized(linear.module) else None
            # Somebody may change the output in place.
            y = y_TO.clone() if linear.reads_output and y_TO.dtype == output else y_TO
            ctx.save_for_backward(*kept, weight, *trained[:4], y if linear.reads_output else None)
        # Autograd forbids changing in place what a function returns as a view, and models do such things.
        return torch.ops.aten._unsafe_view(y_TO.to(output), (*x.shape[:-1], y_TO.shape[-1]))

    @staticmethod
    @first_order
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        """Gradients of what the forward was given and wants one."""
        x, low_TR, *_, y_TO = ctx.saved_tensors
        x_TI = None if x is None else x.reshape(-1, x.shape[-1])
        given: AdaptedLinear = ctx.linear
        needs_x, _, _, _, _, *needs = ctx.needs_input_grad
        dy = grad_outputs[0]
        dy_TO = dy.reshape(-1, dy.shape[-1]).to(ctx.compute)
        with _no_autocast(dy.device.type):
            linear, _ = given.resolved(ctx.compute, ctx.of_variant)
            dropped = drop((linear,), len(dy_TO), ctx.compute, dy.device, ctx.seed, ctx.ops.dropout)
            made = lora_linear_backward(
                (dy_TO,), x_TI, low_TR, (linear,), dropped=dropped, needs_dx=needs_x, narrow=ctx.ops.narrow_gradients
            )
            biases: list[torch.Tensor | None] = [None, None]
            if any(needs[4:]):
                sum_O = dy_TO.sum(0, dtype=torch.float32)
                for index, (bias, factor) in enumerate([(linear.bias, 1.0), (linear.b_bias, linear.scaling)]):
                    biases[index] = None if bias is None else (factor * sum_O).to(bias.dtype)
            products_O = None if y_TO is None else ctx.ops.column_products(dy_TO, y_TO, linear.bias)
            of_adapter: Gradients = made.da[0], made.db[0], products_O, None
            if given.variant is not None:
                of_adapter = given.variant.gradients(given, linear, of_adapter)
        gradients = (*of_adapter, *biases)
        return (
            made.dx_TI.view(ctx.shape).to(ctx.dtype) if made.dx_TI is not None else None,
            None, None, None, None,
            *(gradient if want else None for gradient, want in zip(gradients, needs, strict=True)),
        )  # fmt: skip


class Reading:
    """What was read from a LoRA layer, for as long as nothing about the layer changes.  A copy of it starts empty."""

    def __init__(self) -> None:
        self._watch: Watch | None = None
        self._read: tuple[str | None, AdaptedLinear | None] = None, None

    def __reduce__(self) -> tuple[type["Reading"], tuple[()]]:
        """Nothing of this is worth copying: it is read again from the copied layer."""
        return Reading, ()

    def of(self, module: nn.Module) -> tuple[str | None, AdaptedLinear | None]:
        """Why `module` cannot be computed alone, or its tensors."""
        if self._watch is None or not self._watch.unchanged():
            reason = why_not_alone(module)
            self._read = reason, read_linear(module) if reason is None else None
            self._watch = Watch([module])
        return self._read


@dataclass
class LinearState(ModuleState):
    """What a patched LoRA layer knows."""

    @property
    def reading(self) -> Reading:
        """What was read of it."""
        return self.settings.read_of(self.name, Reading)


@stand_in
def linear_forward(self: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """A PEFT LoRA layer: `x` (… × I) to (… × O), in the dtype that PEFT would give it."""
    state: ModuleState | None = self.__dict__.get(STATE)
    # In inference, quantized layers have kernels of their own for single tokens.  Where nothing is differentiated all
    # is stock's, but for dropout: a reentrant checkpoint runs its first forward so, and the second draws the same mask.
    if state is None or state.settings.why_stock is not None or (state.settings.is_off and not _drops(self)):
        return call_original(self, (x, *args), kwargs)
    assert isinstance(state, LinearState)
    ledger, ops = state.settings.ledger, state.settings.ops
    reason, linear = state.replaced or why_not_differentiated(), None
    if reason is None:
        reason, linear = state.reading.of(self)
    reason = reason or _why_not_now(linear, x, args, kwargs)
    if reason is not None and torch.is_grad_enabled():
        ledger.stock(state.name, "linear", reason)
    if reason is not None or linear is None or linear.a is None:
        # Without an adapter there is nothing to gain.
        return call_original(self, (x, *args), kwargs)
    ledger.fused(state.name, "linear", ops.name)
    # Drawn from the CPU's generator, which gradient checkpointing puts back before it runs the forward again.
    seed = int(torch.randint(2**62, (), device="cpu").item()) if linear.dropout > 0 else 0
    trained = *linear.trained, linear.bias, linear.b_bias
    return LoraLinear.apply(x, linear, _dtypes(linear, x), seed, ops, *trained)


def _drops(module: Any) -> bool:
    dropouts = getattr(module, "lora_dropout", {})
    return any(isinstance(each, nn.Dropout) and each.training and each.p > 0 for each in dropouts.values())


def _why_not_now(
    linear: AdaptedLinear | None, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    if args or kwargs:
        given = [name for name, value in kwargs.items() if value is not None]
        if args or given:
            return f"it was given {', '.join(given) or 'more than its input'}"
    if linear is None:
        return None
    if (reason := why_no_linear()) is not None:
        return reason
    if has_global_hooks():
        return "hooks on all modules are registered"
    if is_quantized(linear.module):
        return PACKED if is_packed_for_cpu(linear.module) else None
    dtype = linear.module.weight.dtype
    if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        return f"its weight is {dtype}, its input {x.dtype}"
    return None


def _dtypes(linear: AdaptedLinear, x: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
    """What to compute in, and the output's: those of the base layer, whose output PEFT adds the adapter's to."""
    compute = compute_dtype(x)
    if not is_quantized(linear.module):
        return compute, compute
    # bitsandbytes casts its input, and its output back.
    if torch.is_autocast_enabled(x.device.type):
        return compute, torch.promote_types(x.dtype, compute)
    # An 8-bit layer has none of its own.
    of_base = getattr(linear.module, "compute_dtype", None)
    return of_base if isinstance(of_base, torch.dtype) else compute, x.dtype


def _with_one_bias(linear: AdaptedLinear) -> AdaptedLinear:
    if linear.b_bias is None:
        return linear
    bias_O = linear.scaling * linear.b_bias.float()
    return linear._replace(bias=bias_O if linear.bias is None else bias_O + linear.bias)


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    # To enter autocast only to switch it off costs as much as two launches.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
