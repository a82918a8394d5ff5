"""What the installed transformers calls the key/value cache: `cache` from 5.24 on, `past_key_values` before."""

from dataclasses import fields

from transformers.modeling_outputs import BaseModelOutputWithPast

KV_CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
"""The keyword of `forward`, and the field of its output."""
