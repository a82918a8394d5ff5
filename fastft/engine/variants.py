"""The adapters of a layer that are variants of LoRA: resolved before it runs, and their gradients after its backward.

Legend: T tokens, O out.
"""

from collections.abc import Iterable, Sequence
from itertools import repeat

import torch

from fastft.adapters.adapted import AdaptedLinear
from fastft.engine.parts import LayerCall


def resolved(
    call: LayerCall, dtype: torch.dtype, kept: tuple[torch.Tensor | None, ...] = ()
) -> tuple[LayerCall, tuple[torch.Tensor | None, ...]]:
    """`call` on a residual stream of this dtype with plain LoRAs only, and what each linear layer keeps of making
    them; `kept`, where it is the same layer's backward."""
    parts = call.parts
    if not parts.has_variants:
        return call, ()
    kept = kept or (None,) * len(parts.linears)
    made = [linear.resolved(parts.dtype or dtype, k) for linear, k in zip(parts.linears, kept, strict=True)]
    linears = iter([linear for linear, _ in made])
    return call._replace(parts=parts.map_linears(lambda _: next(linears))), tuple(k for _, k in made)


def of_variants(
    given: LayerCall, resolved: LayerCall, gradients: Sequence[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """The gradients of what was trained, from those of what it was resolved to."""
    made: list[torch.Tensor | None] = []
    for linear, plain in zip(given.parts.linears, resolved.parts.linears, strict=True):
        of_plain = gradients[len(made) : len(made) + 4]
        made += of_plain if linear.variant is None else linear.variant.gradients(linear, plain, of_plain)
    return made


def output_products(
    dy: Sequence[torch.Tensor], y: Sequence[torch.Tensor | None], group: Sequence[AdaptedLinear], call: LayerCall
) -> list[torch.Tensor | None]:
    """Σ_t dy · (y − bias) (O) of each layer of a group; None where nobody reads it.

    `dy` and `y` are those of each layer, or, of a single layer, parts of them side by side.
    """
    if not any(linear.reads_output for linear in group):
        return [None] * len(group)
    per_layer = len(dy) // len(group)
    made: list[torch.Tensor | None] = []
    for g, linear in enumerate(group):
        if not linear.reads_output:
            made.append(None)
            continue
        pairs = list(zip(dy, y, strict=False))[g * per_layer : (g + 1) * per_layer]
        widths = [d.shape[1] for d, _ in pairs]
        biases: Iterable[torch.Tensor | None] = (
            repeat(None) if linear.bias is None else linear.bias.detach().split(widths)
        )
        sums = [call.ops.column_products(d, t, bias) for (d, t), bias in zip(pairs, biases, strict=False)]
        made.append(sums[0] if len(sums) == 1 else torch.cat(sums))
    return made


def with_term(products_O: torch.Tensor | None, db: torch.Tensor | None, linear: AdaptedLinear) -> torch.Tensor | None:
    """`output_products` of an output without its adapter's term, with it: Σ_t dy · term is B ∘ dB, summed by rows."""
    if products_O is None or db is None or linear.b is None:
        return products_O
    return products_O.add_((db.to(products_O.dtype) * linear.b).sum(dim=1))


def halves(of_gate_up: Sequence[torch.Tensor], call: LayerCall) -> Sequence[torch.Tensor]:
    """Gate and up each, where one linear has both."""
    packed = call.parts.gated and len(of_gate_up) == 1
    return of_gate_up[0].chunk(2, dim=1) if packed else of_gate_up


def by_linear(
    da: list[torch.Tensor | None], db: list[torch.Tensor | None], products: list[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """The gradients of a group of resolved layers, in the order of `LayerParts.adapters`."""
    return [gradient for of_linear in zip(da, db, products, strict=True) for gradient in (*of_linear, None)]
