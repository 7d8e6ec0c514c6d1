"""The tile table of the matrix products: device capability × rows × operand width, in one place.

Looked up in Python at launch; nothing is autotuned at run time, so every rank of a job runs the
same kernel and a new packed length compiles nothing. The bucket bounds are row counts R; the width
of the projection (C = 6144, H = 4096) is the model's and does not vary.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from step37_kernels.ops.common import INTERPRETED, ceil_div

Product = Literal["forward", "grad_features", "grad_weight", "accumulate_weight"]
"""``accumulate_weight`` is grad_weight on top of what ``main_grad`` holds."""

_PRODUCTS: tuple[Product, ...] = get_args(Product)


@dataclass(frozen=True, eq=False)  # compared by identity: it is a key of every launch
class Tile:
    """One program's share of an ``[M, N] = [M, K] · [K, N]`` product, and how it is compiled."""

    block_m: int
    """Feature rows; of the insert's tiles also a sum of two powers of two: two products."""
    block_n: int
    """Columns of H."""
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    tma: bool = False
    """Blocks come by the copy engine, where the operands' memory allows (:func:`tile_for`)."""
    persistent: bool = False
    """One program per multiprocessor walks over tiles: the next loads while the last is stored."""
    split_k: int = 1
    """Programs that share one tile's reduction; a second pass adds their parts in order."""
    subtiles: int = 1
    """2: the epilogue goes through the tile by halves, with fewer registers."""
    library: bool = False
    """Not a tile: the library multiplies (cuBLAS, hipBLAS), one more kernel places the rows."""

    def __post_init__(self) -> None:
        if self.persistent and self.split_k > 1:
            raise ValueError("Tile: persistent programs do not split K")
        if self.subtiles not in (1, 2):
            raise ValueError(f"Tile: subtiles must be 1 or 2, got {self.subtiles}")

    def __str__(self) -> str:
        """As tables show it: ``128×256×64 TMA persistent halves``."""
        if self.library:
            return "library"
        parts = [f"{self.block_m}×{self.block_n}×{self.block_k}"]
        parts += ["TMA"] * self.tma + ["persistent"] * self.persistent
        parts += [f"split {self.split_k}"] * (self.split_k > 1) + ["halves"] * (self.subtiles > 1)
        return " ".join(parts)

    @functools.cached_property
    def by_pointers(self) -> Tile:
        """The tile for operands that the copy engine does not take."""
        return dataclasses.replace(self, tma=False, persistent=False) if self.tma else self

    def constants(self) -> dict[str, int | bool]:
        """The constexpr arguments of the kernels."""
        return {
            "TMA": self.tma,
            "PERSISTENT": self.persistent,
            "SPLIT_K": self.split_k,
            "SUBTILES": self.subtiles,
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
        }

    def options(self) -> dict[str, int | bool]:
        """All that a launch takes."""
        return self.constants() | {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True, slots=True)
class _Buckets:
    """``tiles[i]`` serves row counts up to ``bounds[i]``, the last tile all above."""

    bounds: tuple[int, ...]
    tiles: tuple[Tile, ...]

    def pick(self, rows: int) -> Tile:
        return self.tiles[bisect.bisect_left(self.bounds, rows)]


# 16-bit operands on Hopper. Up to some hundred rows the number of tiles decides: there should be
# one for each of the 132 multiprocessors, and the weight is read once. From there to a few
# thousand, two programs with 98 KiB each share a multiprocessor, so that one's loads hide the
# other's store; with more rows wider tiles read less. Chosen by counting; speeds await a GPU.
_HOPPER: dict[Product, _Buckets] = {
    "forward": _Buckets(
        (64, 128, 256, 2048),
        (
            Tile(64, 64, 128, 8, 4, 4, tma=True, split_k=2),
            Tile(128, 64, 128, 8, 4, 4, tma=True, split_k=2),
            Tile(128, 64, 128, 8, 4, 4, tma=True),
            Tile(128, 128, 64, 8, 8, 3, tma=True),
            # In one piece, Triton 3.6's ptxas waits for each wgmma before it issues the next.
            Tile(128, 256, 64, 8, 8, 4, tma=True, subtiles=2),
        ),
    ),
    "grad_features": _Buckets(
        (64, 128, 2048),
        (
            Tile(64, 64, 128, 8, 4, 4, tma=True),
            Tile(128, 64, 128, 8, 4, 4, tma=True),
            Tile(128, 128, 64, 8, 8, 3, tma=True),
            Tile(128, 256, 64, 8, 8, 4, tma=True),
        ),
    ),
    "grad_weight": _Buckets(
        (512,),
        (
            Tile(128, 128, 64, 8, 8, 3, tma=True),
            Tile(128, 256, 64, 8, 8, 4, tma=True),
        ),
    ),
    "accumulate_weight": _Buckets(
        (512,),
        (
            Tile(128, 128, 64, 8, 8, 3, tma=True),
            Tile(128, 256, 64, 8, 8, 4, tma=True, subtiles=2),
        ),
    ),
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


@functools.lru_cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def takes_tma(matrix: Tensor) -> bool:
    """Whether the copy engine can read a contiguous matrix: 16-byte-aligned base and rows."""
    row_bytes = matrix.shape[1] * matrix.itemsize
    return matrix.data_ptr() % 16 == 0 and row_bytes > 0 and row_bytes % 16 == 0


def pick(product: Product, rows: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The table's tile of a product with ``rows`` feature rows of ``dtype`` on ``device``."""
    if INTERPRETED:
        return _INTERPRETER[product].pick(rows)
    return _table(_capability(device), dtype.itemsize)[product].pick(rows)


def tile_for(product: Product, rows: int, a: Tensor, b: Tensor) -> Tile:
    """The tile with which to multiply two contiguous matrices, ``rows`` feature rows in one."""
    tile = pick(product, rows, a.dtype, a.device)
    return tile if tile.tma and takes_tma(a) and takes_tma(b) else tile.by_pointers


def entries(capability: int, dtype: torch.dtype) -> Iterator[tuple[Product, Tile]]:
    """Every (product, tile) that a device of this capability may launch; for compile checks."""
    for product, buckets in _table(capability, dtype.itemsize).items():
        for tile in buckets.tiles:
            yield product, tile
            if tile.tma:
                yield product, tile.by_pointers


# --- The insert ---------------------------------------------------------------------------------

LIBRARY = Tile(0, 0, 0, 1, 0, 0, library=True)
MAX_PARTS = 8

# 16-bit operands on Hopper, by the model of ``bench predict`` for 132 multiprocessors: a wave that
# fits beats a tile that is large. 192 rows are two products, 128 + 64, on one block of the weight.
_192x256 = Tile(192, 256, 64, 1, 8, 4, tma=True)
_128x256 = Tile(128, 256, 64, 1, 8, 4, tma=True)
_192x128 = Tile(192, 128, 64, 1, 8, 5, tma=True)
_128x128 = Tile(128, 128, 64, 1, 8, 6, tma=True)
_HOPPER_INSERT: tuple[tuple[int, Tile], ...] = (
    # rows up to, tile; pictures of 169 rows; tiles of C = 6144, H = 4096 in waves of 132
    (128, _128x128),  # 32 tiles, K split in 4
    (192, _192x128),  # 1: 32, split in 4
    (256, _128x256),
    (384, _192x256),  # 2: 32, split in 4
    (512, _128x256),  # 3: 64, split in 2
    (768, _192x128),  # 4: 128
    (1280, _128x256),  # 5: 112; 6: 128; 7: a wave, and 28 split in 4
    (1920, _192x256),  # 8, 9: 128; 10, 11: a wave, and 12 split in 8, 28 in 4
    (2048, _128x256),  # 12: a wave, and 124
    (2304, _192x256),  # 13: a wave, and 60 split in 2
    (2560, _128x256),  # 14, 15: two waves, and 40 split in 3, 56 in 2
    (3840, _192x256),  # 16: a wave, and 108
    (4224, _128x256),
    (5376, _192x256),
    (5632, _128x256),
    (7104, _192x256),  # 39: four waves, and 32 split in 4
    (7296, _128x256),
    (2**31, _192x256),
)
# The interpreter checks arithmetic, not speed: small tiles, so that small shapes have several.
_INTERPRETER_INSERT = Tile(48, 32, 32, 1, 4, 2, tma=True)


def entry(rows: int, dtype: torch.dtype, capability: int) -> Tile:
    """The table's entry for ``rows`` feature rows of ``dtype``; needs no GPU.

    Args:
        rows: of all sources together.
        dtype: of features and weight.
        capability: 90 for Hopper, 0 for Triton's interpreter; of AMD what PyTorch says.
    """
    if capability == 0:
        return _INTERPRETER_INSERT
    if capability != 90 or dtype.itemsize != 2:
        return LIBRARY
    return next(tile for most, tile in _HOPPER_INSERT if rows <= most)


def insert_tile(sources: Sequence[Tensor], weight: Tensor) -> Tile:
    """The entry for contiguous sources ``[R_i, C]``; the library's where TMA cannot read them."""
    capability = 0 if INTERPRETED else _capability(weight.device)
    tile = entry(sum(map(len, sources)), weight.dtype, capability)
    return tile if all(map(takes_tma, (*sources, weight))) else LIBRARY


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which programs of a launch have which tile: first one for each of ``whole`` tiles, then
    ``parts`` for each of ``tail`` more, which share its reduction."""

    whole: int
    tail: int
    parts: int

    @property
    def programs(self) -> int:
        return self.whole + self.tail * self.parts

    @property
    def partials(self) -> int:
        """Programs that leave ``block_m × block_n`` fp32 values to a second launch, which adds
        the parts of each tile in order."""
        return self.tail * self.parts


def schedule(
    tile: Tile, row_counts: Sequence[int], hidden: int, width: int, processors: int
) -> Schedule:
    """One program to a multiprocessor: full waves of whole tiles; those of the last wave, if they
    would leave more than half of the multiprocessors idle, in as many parts as these can take.

    Args:
        tile: not the library's.
        row_counts: rows of each source; no tile spans two of them.
        hidden, width: H and C.
        processors: multiprocessors of the GPU.
    """
    rows = sum(ceil_div(count, tile.block_m) for count in row_counts)
    tiles = rows * ceil_div(hidden, tile.block_n)
    tail = tiles % processors
    most = min(MAX_PARTS, ceil_div(width, tile.block_k))
    parts = min(most, processors // tail) if tail else 1
    if parts <= 1:
        return Schedule(whole=tiles, tail=0, parts=1)
    return Schedule(whole=tiles - tail, tail=tail, parts=parts)
