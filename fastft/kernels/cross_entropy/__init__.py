"""Cross-entropy over the vocabulary; the gradient overwrites the logits."""

from typing import NamedTuple


class LogitTransform(NamedTuple):
    """What happens to logits before the softmax: `softcap · tanh(multiplier · logits / softcap) / temperature`."""

    multiplier: float = 1.0
    softcap: float | None = None
    """None leaves the tanh out."""
    temperature: float = 1.0
    """What a method of reinforcement learning samples, and scores, at."""
