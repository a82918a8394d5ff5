"""What else than the target's log-probability people ask of a row of logits, and the gradient of its entropy."""

from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

NAMES = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class RowStatistics(NamedTuple):
    """Of each row of z = transform(logits), with p = softmax(z); None what was not asked for.

    The names are those of TRL's `FusedCausalLMOutput`.
    """

    entropy_N: "Tensor | None" = None
    """−Σ p·log p, fp32."""
    log_sum_sq_probs_N: "Tensor | None" = None
    """log Σ p², fp32."""
    mean_logits_N: "Tensor | None" = None
    """The mean of z, fp32."""
    is_top1_N: "Tensor | None" = None
    """Whether the target is the first of the likeliest, bool."""


def unknown(names: Collection[str]) -> list[str]:
    """Those of `names` that nothing here computes."""
    return sorted(set(names) - set(NAMES))
