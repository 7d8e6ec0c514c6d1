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
import triton
import triton.language as tl
from torch import Tensor

from step37_kernels.ops.common import INTERPRETED, ceil_div

Product = Literal["forward", "grad_features", "grad_weight", "accumulate_weight"]
"""``accumulate_weight`` is grad_weight on top of what ``main_grad`` holds."""

_PRODUCTS: tuple[Product, ...] = get_args(Product)


@dataclass(frozen=True, eq=False)  # compared by identity: it is a key of every launch
class Tile:
    """One program's share of an ``[M, N] = [M, K] · [K, N]`` product, and how it is compiled."""

    block_m: int
    block_n: int
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
    return matrix.data_ptr() % 16 == 0 and matrix.shape[1] * matrix.itemsize % 16 == 0


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
"""The most programs that share one tile's reduction evenly; uneven shares touch one more."""

# 16-bit operands on Hopper, by the model of `bench predict`: for 1 … 16 pictures of 169 rows, and
# beyond. 192 rows are two products, 128 + 64, with an accumulator each; both read the weight's
# block from shared memory once it is there.
_192x256 = Tile(192, 256, 64, 1, 8, 4, tma=True)
_128x256 = Tile(128, 256, 64, 1, 8, 4, tma=True)
_192x128 = Tile(192, 128, 64, 1, 8, 5, tma=True)
_128x128 = Tile(128, 128, 64, 1, 8, 6, tma=True)
_INSERT = _Buckets(
    # 128, then 169 k for the k below
    (128, 192, 384, 512, 704, 1024, 1183, 1920, 2048, 2304, 2560),
    (
        _128x128,
        _192x128,  # k = 1
        _192x256,  # 2
        _128x256,  # 3
        _192x256,  # 4
        _128x256,  # 5, 6
        _128x256,  # 7
        _192x256,  # 8 … 11
        _128x256,  # 12
        _192x256,  # 13
        _128x256,  # 14, 15
        _192x256,  # 16 and more
    ),
)
_INSERT_INTERPRETED = Tile(48, 32, 32, 1, 4, 2, tma=True)


def entry(rows: int, dtype: torch.dtype, capability: int) -> Tile:
    """The table's entry for ``rows`` feature rows of ``dtype`` on a GPU of this capability (90:
    Hopper; any number that is none of NVIDIA's for AMD). Needs no GPU."""
    if capability == 90 and dtype.itemsize == 2:
        return _INSERT.pick(rows)
    return LIBRARY


@triton.jit
def tail_share(tail, programs, blocks, MOST: tl.constexpr):
    """Blocks of the reduction that each program takes of ``tail`` tiles, fewer than programs.

    The tiles' blocks lie in one line, and each program takes the next share of it. Shares that cut
    every tile into equal parts leave the fewest parts to add up, and are taken unless others are
    shorter by a fifth. A share of ``blocks`` leaves the tiles whole.

    Works on tensors in a kernel, and as ``tail_share.fn`` on the host's numbers.
    """
    some = tail + (tail == 0)
    parts = programs // some
    parts = parts - (parts - MOST) * (parts > MOST)
    even = (blocks + parts - 1) // parts
    share = (some * blocks + programs - 1) // programs
    least = (blocks + MOST - 1) // MOST
    share = share + (least - share) * (share < least)
    return share + (even - share) * (even * 4 <= share * 5)


@dataclass(frozen=True, slots=True)
class Schedule:
    """How the programs of a launch share the tiles of a product."""

    tiles: int
    programs: int
    """One a multiprocessor, but for one that is left to the copies of text rows."""
    tail: int
    """Tiles of the last, incomplete wave: those before are walked over whole."""
    share: int
    """Blocks of the reduction that each program takes of the tail (:func:`tail_share`)."""
    blocks: int
    """Blocks of a whole reduction."""

    @property
    def waves(self) -> int:
        """Complete ones."""
        return self.tiles // self.programs

    @property
    def split(self) -> bool:
        """Whether parts of tiles are left to a second launch, which adds them up in order."""
        return self.tail > 0 and self.share < self.blocks

    @property
    def partials(self) -> int:
        """Slots of ``block_m × block_n`` fp32 values for the parts; some stay empty."""
        return self.tail + self.programs if self.split else 0


def schedule(
    tile: Tile, row_counts: Sequence[int], hidden: int, width: int, processors: int
) -> Schedule:
    """The share of each program where a source of each of ``row_counts`` has tiles of its own."""
    tiles = sum(ceil_div(rows, tile.block_m) for rows in row_counts) * ceil_div(
        hidden, tile.block_n
    )
    programs, blocks = processors - 1, ceil_div(width, tile.block_k)
    tail = tiles % programs
    share = tail_share.fn(tail, programs, blocks, MAX_PARTS)
    return Schedule(tiles=tiles, programs=programs, tail=tail, share=share, blocks=blocks)
