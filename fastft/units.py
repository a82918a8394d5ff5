"""Quantities in words."""

from datetime import UTC, datetime


def gib(count: float) -> str:
    """A number of bytes for people: `7.80 GiB`."""
    return f"{count / 2**30:.2f} GiB"


def age(created_at: str, now: datetime | None = None) -> str:
    """How long ago an ISO 8601 time was, in words: `3 days ago`; `at an unknown time` if it cannot be read."""
    try:
        created = datetime.fromisoformat(created_at)
    except ValueError:
        return "at an unknown time"
    created = created if created.tzinfo else created.replace(tzinfo=UTC)
    seconds = ((now or datetime.now(UTC)) - created).total_seconds()
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        count = int(seconds // length)
        if count >= 1:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"
