"""What the installed transformers calls the key/value cache: `cache` from 5.24 on, `past_key_values` before."""

from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

KV_CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
"""The keyword of `forward`, and the field of its output."""


def given_cache(past_key_values: Any, more: dict[str, Any]) -> Any:
    """The cache that a `forward` was given under either name; taken out of its further keywords."""
    cache = more.pop("cache", None)
    return cache if past_key_values is None else past_key_values
