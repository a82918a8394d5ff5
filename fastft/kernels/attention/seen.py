"""What each query may attend to, and the masks that say so.

Legend: B rows, S tokens of a row, R and C some of its queries and keys, N packed documents.
"""

from typing import NamedTuple

import torch


class Seen(NamedTuple):
    """What each query may attend to: itself and what stands before it, less what the fields take away."""

    mask: torch.Tensor | None = None
    """(B or 1, 1, S, S), boolean (true = attend) or additive.  It says all: `window` and `documents` are then
    ignored."""
    window: int | None = None
    """A query sees itself and the window − 1 tokens before it, as with Hugging Face's `sliding_window`."""
    softcap: float | None = None
    """Scores become softcap · tanh(scores / softcap) before mask and softmax (Gemma 2, arXiv:2408.00118)."""
    documents: torch.Tensor | None = None
    """(N+1,), int32: where each packed document starts among the flattened B·S tokens, and B·S at the end.  No document
    crosses a row, and there is no attention from one to another."""
    longest: int = 0
    """Tokens of the longest of `documents`: a number of the host, so that a launch need not wait for the device."""

    written_out: bool = False
    """Whether the scores under `mask` are stock's own product, softmax and all: a query that an additive mask hides
    everything from sees everything alike then, which a kernel's backward cannot tell from its logarithm of a sum."""

    def longest_in(self, tokens: int) -> int:
        """The longest sequence in rows of `tokens`."""
        return tokens if self.documents is None else self.longest

    def window_in(self, tokens: int) -> int | None:
        """The window, or None where no sequence in rows of `tokens` is longer than it."""
        return self.window if self.window is not None and self.window < self.longest_in(tokens) else None

    def is_causal_only(self, tokens: int) -> bool:
        """Whether queries in rows of `tokens` see all that stands before them."""
        return self.mask is None and self.documents is None and self.window_in(tokens) is None


def mask_of(
    seen: Seen, B: int, S: int, device: torch.device, queries: range | None = None, keys: range | None = None
) -> torch.Tensor:
    """What `queries` (all) see of `keys` (all): (B or 1, 1, R, C), boolean, true = attend.

    Where `seen.mask` is given it is that, boolean or additive.
    """
    queries, keys = queries or range(S), keys or range(S)
    rows, columns = slice(queries.start, queries.stop), slice(keys.start, keys.stop)
    if seen.mask is not None:
        return seen.mask[:, :, rows, columns]
    query_R1 = torch.arange(queries.start, queries.stop, device=device)[:, None]
    key_C = torch.arange(keys.start, keys.stop, device=device)
    mask_RC = key_C <= query_R1
    if seen.window is not None:
        mask_RC &= key_C > query_R1 - seen.window
    if seen.documents is None:
        return mask_RC[None, None]
    tokens = torch.arange(B * S, dtype=seen.documents.dtype, device=device)
    document_BS = torch.bucketize(tokens, seen.documents[1:], right=True).view(B, S)
    same_BRC = document_BS[:, rows, None] == document_BS[:, None, columns]
    return (same_BRC & mask_RC)[:, None]


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A boolean mask as the additive one that the operators take; an additive one as it is."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


def document_starts(position_ids_BS: torch.Tensor) -> torch.Tensor:
    """(B, S), boolean: where a document starts, which is where a position is not the one before it plus one, and at the
    start of every row: the rule of transformers' `find_packed_sequence_indices`."""
    starts_BS = torch.ones_like(position_ids_BS, dtype=torch.bool)
    starts_BS[:, 1:] = position_ids_BS[:, 1:] != position_ids_BS[:, :-1] + 1
    return starts_BS


def documents_of(position_ids_BS: torch.Tensor) -> tuple[torch.Tensor, int] | None:
    """The packed documents that position ids tell of: `Seen.documents` and `Seen.longest`.

    Waits for the device once.

    Args:
        position_ids_BS: integers; expanded to all rows of the batch where they share one.

    Returns:
        None where every row is one document.
    """
    B, S = position_ids_BS.shape
    # Asking the device for the indices and then for the longest would be two waits.
    starts = document_starts(position_ids_BS).flatten().cpu().nonzero().squeeze(1)
    if starts.numel() == B:
        return None
    cumulative = torch.cat([starts, starts.new_tensor([B * S])]).int()
    longest = int(cumulative.diff().max())
    return cumulative.to(position_ids_BS.device, non_blocking=True), longest
