"""Head and cross-entropy together: the logits of all tokens never exist at once.

Only rows whose target counts go through the head, a chunk at a time, and each chunk's logits are overwritten by their
own gradient.  The gradient of the hidden states is finished in the forward; the backward only scales its rows.

Legend: T tokens, D model, N labelled rows, V vocabulary.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fastft.backends import Backend
from fastft.engine.aside import Aside
from fastft.engine.deferred import Deferred, Source
from fastft.engine.first_order import first_order, path_to
from fastft.kernels.cross_entropy import LogitTransform
from fastft.kernels.row_statistics import RowStatistics
from fastft.plan import LOSS_CHUNK_TOKENS

IGNORED = -100
_LOGITS_BYTES = 320 * 2**20


def shifted_targets(labels_BS: torch.Tensor) -> torch.Tensor:
    """The target of each position: the next token's label, and nothing for the last (B × S, int64)."""
    return F.pad(labels_BS, (0, 1), value=IGNORED)[:, 1:]


class Targets:
    """What each position is to predict, and which rows have a target that counts.

    The host must know how many.  It asks when they are wanted, and waits for nothing that was launched since this was
    made: so the layers can be launched first, and run meanwhile.
    """

    def __init__(self, labels_BS: torch.Tensor, *, shifted: bool = False) -> None:
        """`shifted` says that the labels are the targets already."""
        self._labels_BS, self._shifted = labels_BS, shifted
        self._aside = Aside(labels_BS.device)
        self._targets_BS: torch.Tensor | None = None
        self._rows_N: torch.Tensor | None = None

    def targets(self) -> torch.Tensor:
        """The target of each position (B × S, int64)."""
        if self._targets_BS is None:
            with self._aside.asking():
                self._targets_BS = self._labels_BS if self._shifted else shifted_targets(self._labels_BS)
        return self._aside.hand_over(self._targets_BS)

    def rows(self) -> torch.Tensor:
        """The labelled rows' numbers, ascending (N, int64)."""
        if self._rows_N is None:
            with self._aside.asking():
                self._rows_N = labelled_rows(self.targets().reshape(-1))
        return self._aside.hand_over(self._rows_N)


def chunk_for(vocabulary: int) -> int:
    """How many rows have logits at a time where nobody chose: a power of two, 2048 at most and 256 at least.

    The logits of a large vocabulary may be the peak of a whole step (docs/log.md, 2026-11-30).
    """
    rows = LOSS_CHUNK_TOKENS
    while rows > 256 and 2 * rows * vocabulary > _LOGITS_BYTES:
        rows //= 2
    return rows


def labelled_rows(targets_T: torch.Tensor) -> torch.Tensor:
    """Which rows have a target that counts (N, int64).  Waits for the device."""
    return (targets_T != IGNORED).nonzero().squeeze(1)


def labelled(hidden_TD: torch.Tensor, rows_N: torch.Tensor) -> torch.Tensor:
    """Those rows (N × D)."""
    return hidden_TD if rows_N.numel() == hidden_TD.shape[0] else hidden_TD.index_select(0, rows_N)


class Scored(NamedTuple):
    """What comes of rows that went through the head."""

    loss_N: torch.Tensor
    """Cross-entropy, fp32."""
    gradient_ND: torch.Tensor | None
    """Of the rows' hidden states, times `divisor_N`; None where nobody asked for it."""
    divisor_N: torch.Tensor | None
    """fp32."""
    statistics: RowStatistics


def through_head(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    targets_N: torch.Tensor,
    ops: Backend,
    chunk_tokens: int,
    transform: LogitTransform,
    *,
    needs_grad: bool,
    statistics: Collection[str] = (),
) -> Scored:
    """Cross-entropy of labelled rows, its gradient, and the `statistics` of their logits, of which only a chunk exists
    at a time."""
    count, device = hidden_ND.shape[0], hidden_ND.device
    loss_N = torch.empty(count, dtype=torch.float32, device=device)
    gradient_ND = torch.empty_like(hidden_ND) if needs_grad else None
    divisor_N = torch.empty_like(loss_N) if needs_grad else None
    found: list[RowStatistics] = []
    with torch.autocast(device.type, enabled=False):
        for start in range(0, max(count, 1), chunk_tokens):  # once for no row: its statistics have a dtype
            part = slice(start, start + chunk_tokens)
            logits_NV = torch.mm(hidden_ND[part], head_VD.t())
            if statistics:  # before the gradient takes the logits' place
                found.append(ops.row_statistics(logits_NV, targets_N[part], statistics, transform))
            # Scale 1: the division comes in the backward, where an fp16 loss scale is already in the gradient and small
            # values do not underflow.
            scale = 1.0 if needs_grad else None
            loss_N[part], divisor = ops.cross_entropy_(logits_NV, targets_N[part], scale, transform)
            if gradient_ND is not None and divisor_N is not None:
                assert divisor is not None
                # A product's rows are divided after it as well as before it: the backward does it on the way.
                divisor_N[part] = divisor
                torch.mm(logits_NV, head_VD, out=gradient_ND[part])
            del logits_NV
    joined = [None if values[0] is None else torch.cat(values) for values in zip(*found, strict=True)]
    return Scored(loss_N, gradient_ND, divisor_N, RowStatistics(*joined))


def linear_cross_entropy(
    hidden_TD: torch.Tensor,
    head_VD: torch.Tensor,
    targets_T: torch.Tensor,
    ops: Backend,
    *,
    divisor: torch.Tensor | float | None = None,
    chunk_tokens: int = 2048,
    transform: LogitTransform = LogitTransform(),  # noqa: B008
    rows_N: torch.Tensor | None = None,
    logits: Deferred | None = None,
) -> torch.Tensor:
    """Σ cross-entropy of the rows whose target is not −100, over `divisor` (their count where it is None).

    Returns an fp32 scalar.  Where no row has a target it is 0 over the divisor: a mean of nothing is NaN, as in stock,
    and its gradients are 0.  `head_VD` is frozen.  `transform` comes between the logits and the softmax.  `rows_N` is
    `labelled_rows(targets_T)`, where the caller has it, and `logits` what it hands out as the logits: where somebody
    looks at their gradient, the hidden states' comes through them.
    """
    rows_N = labelled_rows(targets_T) if rows_N is None else rows_N
    total: torch.Tensor = LinearCrossEntropy.apply(
        hidden_TD, head_VD, targets_T, rows_N, ops, chunk_tokens, transform, logits
    )
    over = float(rows_N.numel()) if divisor is None else divisor
    # Outside of the function: autograd watches a tensor that divides, and differentiates it where it is to be.
    return total / (over.to(total.device) if isinstance(over, torch.Tensor) else over)


class LinearCrossEntropy(torch.autograd.Function):
    """See `linear_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        head_VD: torch.Tensor,
        targets_T: torch.Tensor,
        rows_N: torch.Tensor,
        ops: Backend,
        chunk_tokens: int,
        transform: LogitTransform,
        logits: Deferred | None,
    ) -> torch.Tensor:
        """The sum, and the gradient of the labelled rows before all divisions."""
        needs_grad = ctx.needs_input_grad[0]
        hidden_ND = labelled(hidden_TD, rows_N)
        loss_N, gradient_ND, row_divisor_N, _ = through_head(
            hidden_ND, head_VD, targets_T[rows_N], ops, chunk_tokens, transform, needs_grad=needs_grad
        )
        total = loss_N.sum()
        if needs_grad:
            ctx.shape = hidden_TD.shape
            ctx.uses = None if logits is None else logits.source.uses()
            ctx.save_for_backward(gradient_ND, row_divisor_N, rows_N, targets_T, path_to(hidden_TD))
        return total

    @staticmethod
    @first_order
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        """The hidden states' gradient: zero in rows without a target."""
        gradient_ND, row_divisor_N, rows_N, targets_T, _ = ctx.saved_tensors
        if ctx.uses is not None and ctx.uses.gradient_is_wanted:
            gradient_TV = _of_logits(ctx.uses.source(), targets_T, rows_N, grad_outputs[0].float())
            return *[None] * 7, gradient_TV
        # In fp32, whatever the gradient's dtype: in its 16 bits the factor would be rounded, and so move every gradient
        # of the row by up to 0.4 %, or make an fp16 loss scale of 2¹⁶ infinite.
        factor_N = grad_outputs[0].float() / row_divisor_N
        scaled_ND = torch.mul(gradient_ND, factor_N.unsqueeze(1), out=torch.empty_like(gradient_ND))
        if rows_N.numel() == ctx.shape[0]:
            return scaled_ND, *[None] * 7
        gradient_TD = gradient_ND.new_zeros(ctx.shape).index_copy_(0, rows_N, scaled_ND)
        return gradient_TD, *[None] * 7


def _of_logits(source: Source, targets_T: torch.Tensor, rows_N: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The gradient of the logits themselves, in their shape: softmax less one-hot in labelled rows, times `factor`."""
    logits = source.detached()
    gradient_TV = torch.zeros_like(logits).flatten(0, -2)
    gradient_NV = logits.flatten(0, -2)[rows_N].float().softmax(-1)
    gradient_NV[torch.arange(rows_N.numel(), device=rows_N.device), targets_T[rows_N]] -= 1
    return gradient_TV.index_copy_(0, rows_N, gradient_NV.mul_(factor).to(logits.dtype)).view_as(logits)
