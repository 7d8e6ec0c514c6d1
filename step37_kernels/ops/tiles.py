"""Chooses the tile of the insert's product by the number of feature rows, and divides the work.

The tile is looked up in a table, in Python, at launch. Nothing is searched or tuned at run time, so
every rank of a job runs the same kernel, and a new packed length compiles nothing. The table is
made for the projection of the model (C = 6144, H = 4096), whose width does not vary.
"""

from __future__ import annotations

import bisect
import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from step37_kernels.ops.common import INTERPRETED, ceil_div


@dataclass(frozen=True, slots=True)
class Tile:
    """The block of ``[R, H] = [R, C] · [C, H]`` of one program, and how it is compiled."""

    block_m: int
    """Feature rows of a block: a power of two, or the sum of two, which makes two products."""
    block_n: int
    """Columns of H in a block."""
    block_k: int
    """Columns of C in each step of the reduction."""
    num_warps: int
    num_stages: int
    """Steps for which the copy engine (TMA) loads blocks ahead."""
    library: bool = False
    """No tile is used: the library multiplies (cuBLAS, hipBLAS), and a kernel writes the rows."""

    def __str__(self) -> str:
        """Write the tile as tables show it: ``192×256×64``."""
        return "library" if self.library else f"{self.block_m}×{self.block_n}×{self.block_k}"


LIBRARY = Tile(0, 0, 0, 0, 0, library=True)
MAX_PARTS = 8
"""The most programs that share one tile's reduction."""

# For 16-bit operands on Hopper, chosen by the model of ``bench predict`` for 132 multiprocessors: a
# tile that fills the last wave is faster than a larger one that does not. 192 rows are two
# products, of 128 and 64 rows, with the same block of the weight.
_192x256 = Tile(192, 256, 64, 8, 4)
_128x256 = Tile(128, 256, 64, 8, 4)
_192x128 = Tile(192, 128, 64, 8, 5)
_128x128 = Tile(128, 128, 64, 8, 6)
_HOPPER: tuple[tuple[int, Tile], ...] = (
    # (rows up to, tile), with what that means for pictures of 169 rows at C = 6144, H = 4096. A
    # wave is 132 tiles, one for each multiprocessor. "10: a wave, and 12 split in 8": ten pictures
    # fill one wave; the 12 tiles that are left are shared by 8 programs each.
    (128, _128x128),  # 32 tiles, K split in 4
    (192, _192x128),  # 1: 32, split in 4
    (256, _128x256),
    (384, _192x256),  # 2: 32, split in 4
    (512, _128x256),  # 3: 64, split in 2
    (768, _192x256),  # 4: 64, split in 2
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
    (7296, _128x256),  # 11 and 66 crops: seven waves but for 12
    (2**31, _192x256),
)
# In the interpreter speed does not matter. Tiles are small, so that small shapes have several.
_INTERPRETER = Tile(48, 32, 32, 4, 2)


@functools.lru_cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def takes_tma(matrix: Tensor) -> bool:
    """Whether the copy engine can read a contiguous matrix: base and rows are 16-byte-aligned."""
    row_bytes = matrix.shape[1] * matrix.itemsize
    return matrix.data_ptr() % 16 == 0 and row_bytes > 0 and row_bytes % 16 == 0


@functools.lru_cache
def processors(device: torch.device) -> int:
    """Count the multiprocessors of a GPU."""
    if device.type != "cuda":
        return 3  # in the interpreter: so few that small shapes have several waves
    return torch.cuda.get_device_properties(device).multi_processor_count


def entry(rows: int, dtype: torch.dtype, capability: int) -> Tile:
    """Look up the table's entry for ``rows`` feature rows of ``dtype``; needs no GPU.

    Args:
        rows: feature rows of all sources together.
        dtype: of features and weight.
        capability: 90 for Hopper, 0 for Triton's interpreter; on AMD the one PyTorch reports.
    """
    if capability == 0:
        return _INTERPRETER
    if capability != 90 or dtype.itemsize != 2:
        return LIBRARY
    return _HOPPER[bisect.bisect_left(_HOPPER, rows, key=operator.itemgetter(0))][1]


def insert_tile(sources: Sequence[Tensor], weight: Tensor) -> Tile:
    """The entry for contiguous sources ``[R_i, C]``; the library's where TMA cannot read them."""
    return tile_of(sum(source.shape[0] for source in sources), weight, *sources)


def tile_of(rows: int, weight: Tensor, *sources: Tensor) -> Tile:
    """The entry for ``rows`` feature rows; the library's where TMA cannot read the weight
    ``[H, C]`` or one of the sources that are given."""
    capability = 0 if INTERPRETED else _capability(weight.device)
    tile = entry(rows, weight.dtype, capability)
    return tile if all(map(takes_tma, (*sources, weight))) else LIBRARY


class Schedule(NamedTuple):
    """Divides the tiles of a launch among its programs.

    The first ``whole`` programs compute one tile each. Then come ``tail`` tiles with ``parts``
    programs each, which share the reduction of their tile.
    """

    whole: int
    tail: int
    parts: int

    @property
    def programs(self) -> int:
        return self.whole + self.tail * self.parts

    @property
    def partials(self) -> int:
        """Count the programs that write ``block_m × block_n`` fp32 values for a second launch.

        That launch adds the parts of each tile in order.
        """
        return self.tail * self.parts


def schedule(
    tile: Tile, row_counts: Sequence[int], hidden: int, width: int, processors: int
) -> Schedule:
    """Divide the tiles among programs; each multiprocessor runs one program at a time.

    All waves but the last consist of whole tiles. If the tiles of the last wave would leave more
    than half of the multiprocessors idle, each is split into as many parts as fill them.

    Args:
        tile: a tile that is not the library's entry.
        row_counts: rows of each source; no tile spans two sources.
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
