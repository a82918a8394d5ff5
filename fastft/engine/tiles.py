"""The MLP over some rows at a time: every row of it is for itself, so gate and up need not exist for all at once.

Legend: T tokens, D model, F feed-forward.
"""

from collections.abc import Callable, Sequence

import torch

from fastft.engine.parts import LayerCall
from fastft.engine.saved import SAVED, Activations

TILE_STEP = 64
"""Tiles have a multiple of so many rows: no GEMM has a ragged edge but the last, and all stay aligned."""
_MADE_BY_MLP = frozenset({"low_gate_up", "low_down", "down", "down_rstd"})
_READ_BY_MLP = _MADE_BY_MLP | {"x", "x2", "rstd2", "h2"}

Block = Callable[[Activations, LayerCall], tuple[Activations, torch.Tensor]]
"""From x₂ and its normalised form to the layer's output."""
MLPGradients = tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor | None]]
"""Of x₂, of h₁ where the MLP reads that, and of the adapters of gate, up and down."""
BlockBackward = Callable[[torch.Tensor, Activations, LayerCall, bool], MLPGradients]
"""From the gradient of the layer's output."""


def in_tiles(block: Block, made: Activations, call: LayerCall) -> tuple[Activations, torch.Tensor]:
    """`block`, tile by tile: the layer's output (T × D), and `made` with what the policy saves of the MLP."""
    T = len(made.x)
    tiles = tiles_of(T, call)
    if len(tiles) == 1:
        return block(made, call)
    y_TD = made.x.new_empty(made.x.shape)
    whole: dict[str, torch.Tensor] = {}
    for rows in tiles:
        part, y_TD[rows] = block(_tile(made, rows), call)
        for name in _MADE_BY_MLP & SAVED[call.policy]:
            of_tile = getattr(part, name)
            if of_tile is not None:
                if name not in whole:
                    whole[name] = of_tile.new_empty(T, *of_tile.shape[1:])
                whole[name][rows] = of_tile
        del part  # its gate and up would live through the next tile
    return made._replace(**whole), y_TD


def backward_in_tiles(
    backward: BlockBackward, dy_TD: torch.Tensor, made: Activations, call: LayerCall, overwrite: bool
) -> MLPGradients:
    """`backward`, tile by tile: only the adapters' gradients are sums over rows, and those are added in fp32.

    With `overwrite`, what was saved may be overwritten; `dy_TD` never is.
    """
    tiles = tiles_of(len(dy_TD), call)
    if len(tiles) == 1:
        return backward(dy_TD, made, call, overwrite)
    d_TD = dy_TD.new_empty(dy_TD.shape)
    sums: list[torch.Tensor | None] = []
    for rows in tiles:
        dx2, dh1, gradients = backward(dy_TD[rows], _tile(made, rows), call, overwrite)
        d_TD[rows] = dx2 if dh1 is None else dh1
        del dx2, dh1  # they would live through the next tile
        sums = add_gradients(sums, gradients)
    matrices = call.parts.adapters[-len(sums) :]
    summed = [None if s is None or m is None else s.to(m.dtype) for s, m in zip(sums, matrices, strict=True)]
    return (dy_TD, d_TD, summed) if call.parts.mlp_norm is None else (d_TD, None, summed)


def tiles_of(rows: int, call: LayerCall) -> list[slice]:
    """The rows that the MLP takes at a time: about `call.mlp_chunk_tokens` in each tile, or all of them."""
    if call.mlp_chunk_tokens is None or rows <= call.mlp_chunk_tokens or not _may_tile(call):
        return [slice(0, rows)]
    share = -(-rows // -(-rows // call.mlp_chunk_tokens))
    size = -(-share // TILE_STEP) * TILE_STEP
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def add_gradients(
    sums: Sequence[torch.Tensor | None], gradients: Sequence[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """`sums`, overwritten, plus a tile's gradients, in fp32 at least; empty sums are none yet."""
    wide = [None if g is None else g.to(torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    if not sums:
        return wide
    return [s if s is None or g is None else s.add_(g) for s, g in zip(sums, wide, strict=True)]


def _may_tile(call: LayerCall) -> bool:
    """Whether gate and up are nobody's after the MLP, and each row's output depends on that row alone.

    A dropout mask is a function of its shape too: that of a tile is not the tile of a mask.
    """
    linears = (*call.parts.gate_up, call.parts.down)
    return "gate" not in SAVED[call.policy] and not any(linear.dropout > 0 for linear in linears)


def _tile(made: Activations, rows: slice) -> Activations:
    """These rows of what the MLP reads."""
    read = (None if t is None or name not in _READ_BY_MLP else t[rows] for name, t in made._asdict().items())
    return Activations(*read)  # type: ignore[arg-type]
