import pytest

from autotune.forecast import beaten_by_one_alike, far_behind, forecast
from devices import GPU
from fastft.config import RunConfig
from fastft.models.shapes import SHAPES
from fastft.plan import Choices, Policy, Trial

SHAPE = SHAPES["llama-3-8b"]
CONFIG = RunConfig(model="llama-3-8b", sequence_tokens=2048, dtype="bf16")


def choices(policy: Policy = "light", size: int = 4, backend: str = "triton", resident: int = 0) -> Choices:
    return Choices(
        backend=backend, micro_batch=size, accumulation=16 // size, placement=[policy] * SHAPE.layers,
        resident_layers=resident,
    )  # fmt: skip


def trial(of: Choices, milliseconds: float, verdict: str = "ok") -> Trial:
    return Trial.model_validate({"choices": of, "verdict": verdict, "step_time_ms": [milliseconds]})


def time(of: Choices, config: RunConfig = CONFIG) -> float:
    return forecast(of, config, SHAPE, GPU)


def test_what_does_more_takes_longer() -> None:
    assert time(choices("light")) == time(choices("keep")) < time(choices("mlp")) < time(choices("full"))
    assert time(choices("mlp")) < time(choices("offload_mlp")) < time(choices("full")) < time(choices("offload"))
    assert time(choices(size=16)) < time(choices(size=4)) < time(choices(size=1))
    assert time(choices()) < time(choices(backend="eager")) < time(choices(backend="peft"))
    nf4 = CONFIG.model_copy(update={"quantization": "nf4"})
    assert time(choices(), CONFIG) == time(choices(resident=32), nf4) < time(choices(resident=16), nf4)


@pytest.mark.parametrize(
    ("of", "measured"),
    [
        # Dense weights, an H100, 1, 2 and 4 × 2,048: docs/log.md, 2026-11-25, "What a step costs".
        (choices(size=1), 17588 / 16707), (choices(size=2), 17588 / 17040),
        # bf16, an H200, 16 and 4 × 2,048: docs/log.md, 2026-11-21, "Tuning an 8B shape".
        (choices(size=16), 16622 / 16819),
        # NF4: docs/log.md, 2026-11-25, "QLoRA on an H200".
        (choices("mlp"), 544 / 439), (choices("full"), 591 / 439), (choices("offload_mlp"), 537 / 439),
        (choices("offload"), 593 / 439),
    ],
)  # fmt: skip
def test_the_forecast_is_within_a_few_percent_of_what_was_measured(of: Choices, measured: float) -> None:
    assert time(of) / time(choices()) == pytest.approx(measured, rel=0.05)


def test_what_is_far_behind_is_not_tried() -> None:
    best = trial(choices(), 100.0)
    assert far_behind(choices("full"), [best], CONFIG, SHAPE, GPU) is not None
    assert far_behind(choices(size=2), [best], CONFIG, SHAPE, GPU) is None
    # Stock is only forecast once it ran.
    assert far_behind(choices(backend="peft"), [best], CONFIG, SHAPE, GPU) is None
    stock = choices("light", 8, "peft")
    for behind, hopeless in ((1.09, False), (1.11, True)):
        ran = [best, trial(stock, 100.0 * behind)]
        assert (far_behind(stock, ran, CONFIG, SHAPE, GPU) is not None) == hopeless
    # Of a micro-batch that never ran, arithmetic may be wrong by more.
    for behind, hopeless in ((1.19, False), (1.21, True)):
        other = trial(choices("light", 4, "peft"), 100.0 * behind * time(choices("light", 4, "peft")) / time(stock))
        assert (far_behind(stock, [best, other], CONFIG, SHAPE, GPU) is not None) == hopeless
    # What is behind a trial that does not fit is behind nothing.
    assert far_behind(choices("full"), [trial(choices(), 100.0, "over_cap")], CONFIG, SHAPE, GPU) is None
    # The nearest micro-batch counts, not the best.
    slow = trial(choices(size=1), 300.0)
    assert far_behind(choices("mlp", 1), [best, slow], CONFIG, SHAPE, GPU) is not None


def test_what_is_fitted_with_headroom_is_tried_only_if_the_default_does_not_fit() -> None:
    nf4 = CONFIG.model_copy(update={"quantization": "nf4"})

    def beaten(candidate: Choices, *trials: Trial) -> bool:
        return beaten_by_one_alike(candidate, trials, nf4, SHAPE, GPU) is not None

    assert beaten(choices(resident=12), trial(choices(resident=13), 100.0))
    assert not beaten(choices(resident=12), trial(choices(resident=13), 100.0, "over_cap"))
    assert not beaten(choices(resident=13), trial(choices(resident=12), 100.0))
    assert not beaten(choices(), trial(choices(), 100.0))  # tuned launches are no forecast's business
    assert not beaten(choices(size=2), trial(choices(), 100.0))
    mixed = choices().model_copy(update={"placement": ["mlp"] * 5 + ["light"] * 27})
    assert beaten(mixed, trial(choices(), 100.0))
    # The price of a policy that did not run is news.
    assert not beaten(choices("mlp"), trial(choices(), 100.0))
    assert not beaten(choices("mlp"), trial(mixed, 100.0))
