"""The tile table of the matrix products: device capability × rows × operand width, in one place.

Looked up in Python at launch; nothing is autotuned at run time, so every rank of a job runs the
same kernel and a new packed length compiles nothing. The bucket bounds are row counts R; the width
of the projection (C = 6144, H = 4096) is the model's and does not vary.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from step37_kernels.ops.common import INTERPRETED

Product = Literal["forward", "grad_features", "grad_weight", "accumulate_weight"]
"""``accumulate_weight`` is grad_weight on top of what ``main_grad`` holds."""

_PRODUCTS: tuple[Product, ...] = get_args(Product)


@dataclass(frozen=True, slots=True)
class Tile:
    """One program's share of an ``[M, N] = [M, K] · [K, N]`` product, and how it is compiled."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int

    def constants(self) -> dict[str, int]:
        """The constexpr arguments of the kernels."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
        }

    def options(self) -> dict[str, int]:
        """All that a launch takes."""
        return self.constants() | {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True, slots=True)
class _Buckets:
    """``tiles[i]`` serves row counts up to ``bounds[i]``, the last tile all above."""

    bounds: tuple[int, ...]
    tiles: tuple[Tile, ...]

    def pick(self, rows: int) -> Tile:
        return self.tiles[bisect.bisect_left(self.bounds, rows)]


# 16-bit operands on Hopper: chosen from what compiles without spills; speeds await a GPU.
_HOPPER: dict[Product, _Buckets] = {
    "forward": _Buckets(
        (512, 2048),
        (
            Tile(128, 64, 128, 8, 4, 3),
            Tile(128, 128, 64, 8, 8, 4),
            Tile(128, 256, 64, 8, 8, 3),
        ),
    ),
    "grad_features": _Buckets(
        (512, 2048),
        (
            Tile(128, 64, 128, 8, 4, 3),
            Tile(128, 128, 64, 8, 8, 4),
            Tile(128, 256, 64, 8, 8, 3),
        ),
    ),
    "grad_weight": _Buckets((), (Tile(128, 256, 64, 8, 8, 3),)),
    # Twice as wide, the tile of main_grad does not fit into the registers beside the addresses.
    "accumulate_weight": _Buckets((), (Tile(128, 128, 64, 8, 8, 4),)),
}
# 99 to 163 KiB of shared memory a block, no wgmma: smaller tiles.
_DEFAULT: dict[Product, _Buckets] = {
    product: _Buckets((512,), (Tile(64, 64, 64, 8, 4, 3), Tile(128, 128, 32, 8, 8, 3)))
    for product in _PRODUCTS
}
# fp32 multiplies on the CUDA cores: the accumulator and both operands live in registers.
_FLOAT32: dict[Product, _Buckets] = {
    product: _Buckets((), (Tile(64, 64, 16, 8, 8, 3),)) for product in _PRODUCTS
}
# The interpreter checks arithmetic, not speed: small tiles, so that small shapes have several.
_INTERPRETER: dict[Product, _Buckets] = {
    product: _Buckets((), (Tile(16, 32, 32, 2, 4, 2),)) for product in _PRODUCTS
}


def _table(capability: int, itemsize: int) -> dict[Product, _Buckets]:
    if itemsize == 4:
        return _FLOAT32
    return _HOPPER if capability == 90 else _DEFAULT


def tile_for(product: Product, rows: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The tile of a product with ``rows`` feature rows of ``dtype`` on ``device``."""
    if INTERPRETED:
        return _INTERPRETER[product].pick(rows)
    major, minor = torch.cuda.get_device_capability(device)
    return _table(10 * major + minor, dtype.itemsize)[product].pick(rows)


def entries(capability: int, dtype: torch.dtype) -> Iterator[tuple[Product, Tile]]:
    """Every (product, tile) that a device of this capability may launch; for compile checks."""
    for product, buckets in _table(capability, dtype.itemsize).items():
        for tile in buckets.tiles:
            yield product, tile
