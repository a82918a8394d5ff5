"""Streams beside the one that computes."""

from functools import cache
from typing import Literal

import torch


@cache
def side_stream(device: torch.device, purpose: Literal["copies", "questions"]) -> torch.cuda.Stream:
    """The one stream of a GPU for `purpose`."""
    return torch.cuda.Stream(device)
