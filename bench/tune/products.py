"""The four matrix products by our kernels, each with a tile of one's choice.

For what compiles them (``resources``, ``tune``) and what times them (``tune``), and for tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from step37_kernels.ops import project, project_backward, tiles
from step37_kernels.ops.tiles import Product, Tile

HIDDEN, WIDTH, ROWS = 4096, 6144, 169


@dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """One set of inputs, and the memory that the result goes to."""

    x: Tensor
    """``[R, C]``"""
    grad: Tensor
    """``[R, H]``"""
    weight: Tensor
    """``[H, C]``"""
    out: Tensor
    """``[positions, 1, H]`` of forward, ``[H, C]`` of the weight's products, else empty."""

    @classmethod
    def blank(cls, product: Product, dtype: torch.dtype) -> Operands:
        """Of the model's widths and a picture's rows, with nothing in them: to compile for."""
        weight = torch.empty(HIDDEN, WIDTH, dtype=dtype)
        outs = {
            "forward": torch.empty(ROWS, 1, HIDDEN, dtype=dtype),
            "grad_features": weight[:0],
            "grad_weight": torch.empty_like(weight),
            "accumulate_weight": torch.empty(HIDDEN, WIDTH),
        }
        return cls(
            x=torch.empty(ROWS, WIDTH, dtype=dtype),
            grad=torch.empty(ROWS, HIDDEN, dtype=dtype),
            weight=weight,
            out=outs[product],
        )


@contextlib.contextmanager
def only(tile: Tile) -> Iterator[None]:
    """Whatever the table says, launches in here take this tile."""
    table = tiles.pick
    tiles.pick = lambda *_: tile
    try:
        yield
    finally:
        tiles.pick = table


def launch(
    product: Product,
    tile: Tile,
    operands: Operands,
    destinations: Tensor,
    *,
    bias: Tensor | None = None,
    live_rows: Tensor | None = None,
) -> Tensor:
    """The product with this tile: ``operands.out``, or a new tensor for ``grad_features``.

    ``destinations`` (``[R]`` int32) and ``bias`` are forward's.
    """
    x, grad, weight, out = operands.x, operands.grad, operands.weight, operands.out
    with only(tile):
        if product == "forward":
            project.project_scatter(x, weight, bias, destinations, live_rows, out)
        elif product == "grad_features":
            return project_backward.grad_features(grad, weight, live_rows)
        else:
            accumulate = product == "accumulate_weight"
            project_backward.grad_weight_into(grad, x, live_rows, out, accumulate=accumulate)
        return out
