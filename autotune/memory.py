"""What the probes say about memory beyond the points they measured: peak = model + a · tokens, over the micro-batches
of one backend and uniform placement."""

from collections.abc import Iterable
from dataclasses import dataclass

from autotune.ranking import MEASURED
from autotune.space import uniform_policy
from fastft.plan import Choices, Policy, Trial


@dataclass(frozen=True)
class PeakFit:
    """peak_bytes ≈ base_bytes + bytes_per_token · tokens of a micro-batch."""

    base_bytes: float
    bytes_per_token: float
    points: int

    def predict(self, tokens: int) -> float:
        """The peak for micro-batches of `tokens` tokens."""
        return self.base_bytes + self.bytes_per_token * tokens


def fit_peaks(trials: Iterable[Trial], sequence_tokens: int) -> dict[tuple[str, Policy], PeakFit]:
    """One fit a backend and uniform placement.

    Least squares where two or more micro-batches were measured; with one, the line from the measured model to
    the measured peak.  The slope is never negative.
    """
    points: dict[tuple[str, Policy], list[tuple[int, int, int]]] = {}
    for trial in trials:
        policy = uniform_policy(trial.choices)
        if trial.verdict in MEASURED and policy and trial.peak_bytes is not None and trial.model_bytes is not None:
            tokens = trial.choices.micro_batch * sequence_tokens
            points.setdefault((trial.choices.backend, policy), []).append((tokens, trial.peak_bytes, trial.model_bytes))
    fits = {}
    for which, measured in points.items():
        sizes = [tokens for tokens, _, _ in measured]
        mean_size = sum(sizes) / len(sizes)
        mean_peak = sum(peak for _, peak, _ in measured) / len(measured)
        if len(set(sizes)) == 1:
            model = min(model for _, _, model in measured)
            fits[which] = PeakFit(model, max(0.0, (mean_peak - model) / mean_size), 1)
            continue
        covariance = sum((tokens - mean_size) * (peak - mean_peak) for tokens, peak, _ in measured)
        slope = max(0.0, covariance / sum((tokens - mean_size) ** 2 for tokens in sizes))
        fits[which] = PeakFit(mean_peak - slope * mean_size, slope, len(set(sizes)))
    return fits


def predicted_too_large(
    candidate: Choices, trials: Iterable[Trial], sequence_tokens: int, limit_bytes: int, margin: float = 1.05
) -> bool:
    """Whether at least two measured micro-batches of the same kind say that `candidate` exceeds the limit clearly."""
    policy = uniform_policy(candidate)
    if policy is None:
        return False
    fit = fit_peaks(trials, sequence_tokens).get((candidate.backend, policy))
    tokens = candidate.micro_batch * sequence_tokens
    return fit is not None and fit.points >= 2 and fit.predict(tokens) > margin * limit_bytes
