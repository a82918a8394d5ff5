"""Log-probabilities of labelled rows, and what else methods ask of their logits, without the logits of all of them.

Preference and reinforcement learning weight each token's log-probability on its own.  That weight multiplies a row of
the hidden states' gradient, so the gradient is finished in the forward, as that of the loss is, and the backward only
scales its rows.  An entropy that is differentiated is rare: its backward goes through the head once more.

Legend: T tokens, D model, N labelled rows, V vocabulary.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch

from fastft.backends import Backend
from fastft.engine.first_order import first_order, path_to
from fastft.engine.loss import labelled, through_head
from fastft.kernels.cross_entropy import LogitTransform
from fastft.kernels.row_statistics import RowStatistics
from fastft.kernels.row_statistics.reference import entropy_gradient


class LogProbs(NamedTuple):
    """Of each labelled row."""

    log_probs_N: torch.Tensor
    """Of its target; fp32, differentiable in the hidden states."""
    statistics: RowStatistics
    """The entropy is differentiable in the hidden states, too."""


def linear_log_probs(
    hidden_TD: torch.Tensor,
    head_VD: torch.Tensor,
    targets_T: torch.Tensor,
    rows_N: torch.Tensor,
    ops: Backend,
    *,
    chunk_tokens: int = 2048,
    transform: LogitTransform = LogitTransform(),  # noqa: B008
    statistics: Collection[str] = (),
) -> LogProbs:
    """The log-probability of each target that counts, and the `statistics` of its row of logits.

    Args:
        hidden_TD: what the head takes, in the dtype to compute in.
        head_VD: frozen, in the same dtype.
        targets_T: the target of each row (int64).
        rows_N: the rows with a target that counts, ascending.
        ops: the backend.
        chunk_tokens: rows of logits at a time.
        transform: what comes between the head and the softmax.
        statistics: of `fastft.kernels.row_statistics.NAMES`.
    """
    log_probs_N, *found = LinearLogProbs.apply(
        hidden_TD, head_VD, targets_T, rows_N, ops, chunk_tokens, transform, tuple(statistics)
    )
    return LogProbs(log_probs_N, RowStatistics(*found))


class LinearLogProbs(torch.autograd.Function):
    """See `linear_log_probs`."""

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
        statistics: tuple[str, ...],
    ) -> tuple[torch.Tensor | None, ...]:
        """The log-probabilities and the statistics."""
        needs_grad = ctx.needs_input_grad[0]
        hidden_ND = labelled(hidden_TD, rows_N)
        scored = through_head(
            hidden_ND, head_VD, targets_T[rows_N], ops, chunk_tokens, transform,
            needs_grad=needs_grad, statistics=statistics,
        )  # fmt: skip
        found = scored.statistics
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in found if t is not None and t is not found.entropy_N))
        if needs_grad:
            ctx.shape, ctx.chunk_tokens, ctx.transform = hidden_TD.shape, chunk_tokens, transform
            # The rows themselves only where somebody may ask for the entropy's gradient.
            of_entropy = (None, None, None) if found.entropy_N is None else (hidden_ND, head_VD, found.entropy_N)
            ctx.save_for_backward(scored.gradient_ND, scored.divisor_N, rows_N, path_to(hidden_TD), *of_entropy)
        return scored.loss_N.neg_(), *found

    @staticmethod
    @first_order
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> Any:
        """The hidden states' gradient: zero in rows without a target."""
        gradient_ND, divisor_N, rows_N, _, *of_entropy = ctx.saved_tensors
        of_log_probs_N, of_entropy_N, *_ = grad_outputs
        total_ND = None
        if of_log_probs_N is not None:
            # In fp32, as in the loss's backward.
            factor_N = of_log_probs_N.float().neg() / divisor_N
            total_ND = torch.mul(gradient_ND, factor_N.unsqueeze(1), out=torch.empty_like(gradient_ND))
        if of_entropy_N is not None:
            own_ND = _entropy_backward(ctx, of_entropy_N.float(), *of_entropy)
            total_ND = own_ND if total_ND is None else total_ND.add_(own_ND)
        if total_ND is not None and rows_N.numel() != ctx.shape[0]:
            total_ND = total_ND.new_zeros(ctx.shape).index_copy_(0, rows_N, total_ND)
        return total_ND, *[None] * 7


def _entropy_backward(
    ctx: Any, factor_N: torch.Tensor, hidden_ND: torch.Tensor, head_VD: torch.Tensor, entropy_N: torch.Tensor
) -> torch.Tensor:
    gradient_ND = torch.empty_like(hidden_ND)
    for start in range(0, len(hidden_ND), ctx.chunk_tokens):
        part = slice(start, start + ctx.chunk_tokens)
        logits_NV = torch.mm(hidden_ND[part], head_VD.t())
        gradient_NV = entropy_gradient(logits_NV, entropy_N[part], factor_N[part], ctx.transform)
        torch.mm(gradient_NV, head_VD, out=gradient_ND[part])
    return gradient_ND
