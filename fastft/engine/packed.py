"""Where packed documents start: position ids say it, but to read them the host waits for the device.

So a batch may tell it beforehand, in the arguments that Hugging Face's flash attention takes: `cu_seq_lens_q` and
`max_length_q`, as `DataCollatorWithFlattening(return_flash_attn_kwargs=True)` makes them.  They are taken as a guess,
which the position ids confirm while the device is at work: what is computed is what the position ids say.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from fastft.engine.aside import Aside
from fastft.kernels.attention.seen import document_starts, documents_of

Documents = tuple[torch.Tensor, int]
"""`Seen.documents` and `Seen.longest`."""


def tell_documents(batch: Mapping[str, Any]) -> dict[str, Any]:
    """`batch` and, if it is on the CPU and has position ids but no mask, where its documents start.

    Args:
        batch: B × S tensors, `position_ids` among them.

    Returns:
        The batch with `cu_seq_lens_q` and `cu_seq_lens_k`, one int32 tensor of `Seen.documents`, and `max_length_q` and
        `max_length_k`, the longest document.
    """
    position_ids_BS = batch.get("position_ids")
    if position_ids_BS is None or position_ids_BS.device.type != "cpu" or batch.get("attention_mask") is not None:
        return dict(batch)
    B, S = position_ids_BS.shape
    rows = torch.arange(0, B * S + 1, S, dtype=torch.int32), S
    starts, longest = documents_of(position_ids_BS) or rows
    return {
        **batch,
        "cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


def told_documents(told: Mapping[str, Any], inputs: torch.Tensor) -> Documents | None:
    """What a batch tells of its documents; None if it does not, or of another batch than `inputs` (B × S, …)."""
    starts, longest = told.get("cu_seq_lens_q"), told.get("max_length_q")
    B, S = inputs.shape[:2]
    if not isinstance(starts, torch.Tensor) or not isinstance(longest, int):
        return None
    fits = starts.dim() == 1 and B < len(starts) <= B * S + 1 and 0 < longest <= S
    if not fits or starts.dtype != torch.int32 or starts.device != inputs.device:
        return None
    # What is wrong is found out later; until then no kernel may read beyond the batch.
    return starts.clamp(0, B * S), longest


def confirmation(position_ids_BS: torch.Tensor, documents: Documents) -> Callable[[], bool]:
    """To be asked later: whether the position ids say `documents`, without waiting for what was launched since."""
    return partial(_are_documents, position_ids_BS, documents, Aside(position_ids_BS.device))


def _are_documents(position_ids_BS: torch.Tensor, documents: Documents, aside: Aside) -> bool:
    starts, longest = documents
    with aside.asking():
        said_T = document_starts(position_ids_BS).flatten()
        tokens = len(said_T)
        told_T = torch.zeros_like(said_T).index_fill_(0, starts[:-1].long().clamp(max=tokens - 1), True)
        same = (told_T == said_T).all() & (said_T.sum() == len(starts) - 1)
        return bool(same & (starts[-1] == tokens) & (starts.diff().max() == longest))
