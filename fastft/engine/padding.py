"""What a (B × S) attention mask hides.

Legend: B rows, S tokens a row, R real tokens.
"""

from typing import NamedTuple

import torch

from fastft.engine.loss import IGNORED

_WORTH_LEAVING_OUT = 0.05
"""Share of padding from which on leaving it out pays for the copies around attention."""


class Padding(NamedTuple):
    """An answer about a mask."""

    is_right_only: bool
    """Whether every row has its ones first, at least one, and no target outside of them: causal attention never looks
    to the right, so no real token could see the padding anyway."""
    real: int
    """How many ones it has."""
    rows_R: torch.Tensor | None
    """Which of the B·S tokens are real (ascending, int64), where it is right padding only, and enough of it to be worth
    leaving out."""

    def all_rows(self, mask: torch.Tensor) -> torch.Tensor:
        """Which of the B·S tokens are real (ascending, int64), however many."""
        return self.rows_R if self.rows_R is not None else _real_rows(mask != 0, self.real)


def padding_of(mask: torch.Tensor, targets: torch.Tensor | None = None) -> Padding:
    """What a (B × S) mask hides, where `targets` (B × S) are to be predicted.  Costs one host synchronisation."""
    mask_BS = mask != 0
    right = (mask_BS[:, 1:] <= mask_BS[:, :-1]).all() & mask_BS[:, 0].all()
    if targets is not None:
        right &= (mask_BS | (targets.to(mask.device) == IGNORED)).all()
    right_only, real = torch.stack([right.long(), mask_BS.sum()]).tolist()
    worth_it = right_only and real < (1 - _WORTH_LEAVING_OUT) * mask.numel()
    return Padding(bool(right_only), real, _real_rows(mask_BS, real) if worth_it else None)


def _real_rows(mask_BS: torch.Tensor, real: int) -> torch.Tensor:
    # A stable sort brings the real ones to the front in their order; `nonzero` would synchronise again.
    return mask_BS.flatten().logical_not().to(torch.uint8).argsort(stable=True)[:real]
