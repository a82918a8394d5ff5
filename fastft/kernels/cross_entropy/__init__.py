"""Cross-entropy over the vocabulary; the gradient overwrites the logits."""

from typing import NamedTuple


class LogitTransform(NamedTuple):
    """What a model does to its head's output before the softmax: `softcap · tanh(multiplier · logits / softcap)`."""

    multiplier: float = 1.0
    softcap: float | None = None
    """None leaves the tanh out."""
