"""The variants of LoRA that the engine computes, a row each."""

from typing import Any

from fastft.adapters.adalora import AdaLora
from fastft.adapters.adapted import Variant
from fastft.adapters.dora import Dora

VARIANTS: tuple[Variant, ...] = (AdaLora(), Dora())


def variant_of(module: Any, adapter: str) -> Variant | None:
    """The variant that a `LoraLayer`'s adapter of this name is, or None."""
    return next((variant for variant in VARIANTS if variant.has(module, adapter)), None)
