"""Quantities in words."""

from datetime import UTC, datetime, timedelta

import pytest

from fastft.units import age, gib


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(5, "just now"), (-60, "just now"), (61, "1 minute ago"), (7300, "2 hours ago"), (90_000, "1 day ago"),
     (260_000, "3 days ago")],
)  # fmt: skip
def test_age(seconds: int, words: str) -> None:
    now = datetime(2026, 1, 10, tzinfo=UTC)
    assert age((now - timedelta(seconds=seconds)).isoformat(), now) == words
    assert age("yesterday", now) == "at an unknown time"


def test_gib() -> None:
    assert gib(7.8 * 2**30) == "7.80 GiB"
    assert gib(0) == "0.00 GiB"
