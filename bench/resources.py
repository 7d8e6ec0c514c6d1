"""Compiles every kernel for an architecture, without a GPU; reports registers, memory and spills.

``python -m bench.resources`` prints a Markdown table; ``--json`` one object a line. Run it without
``TRITON_INTERPRET``, which would replace the kernels by interpreted ones.

The launchers themselves are called, with a driver that launches nothing. So each kernel is compiled
exactly as for a GPU of that architecture, for each entry of the tile table and each dtype.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.nvidia.compiler import get_ptxas

from bench.harness import DTYPES
from bench.no_gpu import NoDriver, compiled
from bench.report import Column, Table, print_table
from step37_kernels import RaggedImages, clip_normalize, resize_clip_normalize
from step37_kernels.ops import copy_rows as copy_ops
from step37_kernels.ops import gradient, project, tiles
from step37_kernels.ops import normalize_pixels as pixel_ops
from step37_kernels.ops import order as order_ops
from step37_kernels.ops import plan_rows as plan_ops
from step37_kernels.ops import resize_pass as resize_ops
from step37_kernels.ops import table as table_ops
from step37_kernels.pixels.resize import resize_uint8
from step37_kernels.runs import FlatRuns

SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
HIDDEN, WIDTH, ROWS = 512, 1024, 169
"""Sizes of the tensors with which launchers are called; kernels are not specialised on them."""
CAPABILITY = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "gfx942": 94}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """The resources that one compiled kernel needs.

    Registers and bytes of stack are for each thread, bytes of shared memory for each block.
    ``load_bytes`` is the widest global load or asynchronous copy of a thread, ``store_bytes`` its
    widest store (0 on AMD).
    """

    kernel: str
    variant: str
    arch: str
    gemm: bool  # a matrix product: it has to use the matrix unit
    registers: int
    stack: int
    shared: int
    matrix_unit: bool
    copy_engine: bool
    serialized: bool  # the assembler makes it wait for each ``wgmma`` before the next
    load_bytes: int
    store_bytes: int


Launch = tuple[str, Callable[[], object]]


def _launches(arch: str, dtypes: Iterable[str]) -> Iterator[Launch]:
    """Yield ``(variant, launch)`` of every launch to compile."""
    for ids in (torch.int64, torch.int32):
        for inline, step in ((True, 1), (True, 2), (False, 1)):
            variant = f"{'strided ' * (step > 1)}{str(ids).removeprefix('torch.')} ids"
            variant += ", table" * (not inline)
            yield variant, functools.partial(_plan, ids, inline, step)
    for short in dtypes:
        yield from _inserts(CAPABILITY[arch], DTYPES[short], short)
        yield from _gradients(DTYPES[short], short)
        yield from _tables(DTYPES[short], short)
    for words in (torch.empty(ROWS, dtype=dtype) for dtype in (torch.int32, torch.int64)):
        yield (
            str(words.dtype).removeprefix("torch."),
            functools.partial(order_ops.order_by_id, words, ROWS),
        )
    yield from _pixels(dtypes)


def _plan(dtype: torch.dtype, inline: bool, step: int) -> None:
    table = torch.empty(12, dtype=torch.int64)
    runs = FlatRuns(tokens=(128003, 128000), group_sizes=(2, 1), features=(2, 1), rows=(81, 169))
    ids = torch.empty(1, 2048 * step, dtype=dtype)[:, ::step]
    plan_ops.plan_rows(ids, runs, None if inline else table)


@contextlib.contextmanager
def only(tile: tiles.Tile) -> Iterator[None]:
    """Make inserts use this tile, instead of the table's, inside the ``with`` block."""
    table = project.insert_tile
    project.insert_tile = lambda *_: tile
    try:
        yield
    finally:
        project.insert_tile = table


def insert_blank(
    tile: tiles.Tile, dtype: torch.dtype, *, bias: bool = False, shard: bool = False,
    sources: int = 1, lookup: bool = False, after_plan: bool = False,
) -> None:  # fmt: skip
    """Launch an insert of uninitialised tensors, to have it compiled."""
    weight = torch.empty(HIDDEN, WIDTH, dtype=dtype)
    numbers = torch.empty(sources * ROWS, 1, dtype=torch.int32)
    with only(tile):
        project.project_insert(
            torch.empty((ROWS, HIDDEN) if lookup else (sources * ROWS, 1, HIDDEN), dtype=dtype),
            [torch.empty(ROWS, WIDTH, dtype=dtype)] * sources,
            weight,
            weight[:, 0].contiguous() if bias else None,
            numbers.flatten(),
            numbers,
            torch.empty(1, dtype=torch.int32) if shard else None,
            input_ids=numbers.long() if lookup else None,
            after_plan=after_plan,
        )


def _inserts(capability: int, dtype: torch.dtype, short: str) -> Iterator[Launch]:
    view = torch.empty(2, WIDTH, ROWS, dtype=dtype).transpose(1, 2)
    apart = view.contiguous()[:, ::2]
    yield f"{short} channels-first", functools.partial(copy_ops.copy_rows, [view])
    yield f"{short} rows apart", functools.partial(copy_ops.copy_rows, [apart])
    entries = dict.fromkeys(tiles.entry(rows, dtype, capability) for rows in range(1, 8192, 64))
    variants: list[dict[str, Any]] = [{}, {"bias": True}, {"shard": True}, {"sources": 4}]
    variants.append({"lookup": True})
    for tile in entries:
        for options in [{}, {"lookup": True}] if tile.library else variants:
            for after_plan in [False] if tile.library else [False, True]:
                variant = f"{short} {tile}" + "".join(f" {name}" for name in options)
                launch = functools.partial(insert_blank, tile, dtype, after_plan=after_plan)
                variant += " behind the plan" * after_plan
                yield variant, functools.partial(launch, **options)


def _gradients(dtype: torch.dtype, short: str) -> Iterator[Launch]:
    grad = torch.empty(ROWS, 1, HIDDEN, dtype=dtype)
    numbers = torch.empty(ROWS, dtype=torch.int32)
    wanted: list[tuple[torch.dtype | None, bool, bool]]
    wanted = [(None, True, False), (None, True, True), (None, False, True)]
    wanted += [(ids, True, bias) for ids in (torch.int64, torch.int32) for bias in (False, True)]
    for ids, rows, bias in wanted:
        launch = functools.partial(
            gradient.gradient_rows, grad, numbers.view(ROWS, 1), numbers, dtype,
            embeddings=ids is None, rows=rows, bias=bias,
            input_ids=None if ids is None else numbers.view(ROWS, 1).to(ids), vocabulary=ROWS,
        )  # fmt: skip
        variant = f"{short}{' rows' * rows}{' bias' * bias}"
        if ids is not None:
            variant += f" order of {str(ids).removeprefix('torch.')} ids"
        yield variant, launch


def _tables(dtype: torch.dtype, short: str) -> Iterator[Launch]:
    """Yield launches of the table's gradient: dense in its dtype, and added to ``main_grad``."""
    grad = torch.empty(ROWS, 1, HIDDEN, dtype=dtype)
    order = torch.empty(ROWS, dtype=torch.int64)
    for add in (False, True):
        out = torch.empty(ROWS, HIDDEN, dtype=torch.float32 if add else dtype)
        launch = functools.partial(table_ops.put_table_gradient, grad, order, order, out, add=add)
        yield f"{short}{' main_grad' * add}", launch


def _pixels(dtypes: Iterable[str]) -> Iterator[Launch]:
    def picture(*shape: int) -> Tensor:
        return torch.empty(*shape, 3, dtype=torch.uint8)

    images = [picture(333, 500), picture(500, 16)]
    for short in dtypes:
        dtype = DTYPES[short]
        for size, rows in ((31, "odd rows"), (32, "aligned rows")):
            square = picture(1, size, size)
            ours: dict[str, Any] = {"dtype": dtype, "impl": "triton"}
            yield f"{short} {rows}", functools.partial(clip_normalize, square, **ours)
            for image, order in zip(images, ("", ", vertical first"), strict=True):
                resize = functools.partial(
                    resize_clip_normalize, [image], size, pillow=(13, 0), **ours
                )
                yield f"{short} {rows}{order}", resize
    ragged = RaggedImages.gather(images)
    yield "uint8", lambda: resize_uint8(ragged, [(20, 30), (30, 20)], impl="triton")


KERNELS = (
    plan_ops.plan_kernel, gradient.gradient_rows_kernel,
    order_ops.order_kernel, table_ops.sum_segments_kernel, table_ops.join_segments_kernel,
    copy_ops.copy_rows_kernel, project.project_insert_kernel, project.sum_parts_kernel,
    project.place_rows_kernel, pixel_ops.normalize_kernel, resize_ops.resize_pass_kernel,
)  # fmt: skip


def resources(arch: str, dtypes: Iterable[str] = tuple(DTYPES)) -> Iterator[Resources]:
    """Compile every kernel for ``arch`` and these dtypes; yields what each needs."""
    NoDriver(arch).install()
    seen: set[int] = set()
    for variant, launch in _launches(arch, dtypes):
        launch()
        for kernel in KERNELS:
            for binary in compiled(kernel):
                if id(binary) not in seen:
                    seen.add(id(binary))
                    yield _read(kernel, binary, variant=variant, arch=arch)


def _read(kernel: Any, binary: Any, *, variant: str, arch: str) -> Resources:
    is_gemm = kernel is project.project_insert_kernel
    load_bytes = store_bytes = 0
    if arch.startswith("gfx"):
        assembly = binary.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+", assembly)
        stack = _number("ScratchSize: ", assembly)
    else:
        assembly = binary.asm["ptx"]
        registers, stack = usage(binary.asm["cubin"])
        load_bytes, store_bytes = _widest(assembly, "ld"), _widest(assembly, "st")
    return Resources(
        kernel=kernel.__name__, variant=variant, arch=arch, gemm=is_gemm,
        registers=registers, stack=stack, shared=binary.metadata.shared,
        matrix_unit="wgmma.mma_async" in assembly,
        copy_engine="cp.async.bulk.tensor" in assembly,
        serialized=is_gemm and _serialized(assembly),
        load_bytes=load_bytes, store_bytes=store_bytes,
    )  # fmt: skip


def _number(label: str, text: str) -> int:
    found = re.search(label + r"(\d+)", text)
    if found is None:
        raise RuntimeError(f"no number after {label!r} in the binary's report:\n{text[-2000:]}")
    return int(found[1])


def _told_of(binary: bytes, suffix: str, tool: str, *options: str) -> str:
    """Run a tool on a file with these bytes; returns what it prints."""
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(binary)
        file.flush()
        command = [tool, file.name, *options]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _serialized(ptx: str) -> bool:
    """Whether the assembler reports ``wgmma`` instructions that cannot overlap."""
    options = ("--verbose", "-arch=sm_90a", "-o", os.devnull)
    told = _told_of(ptx.encode(), ".ptx", get_ptxas(90).path, *options)
    return "wgmma.mma_async instructions are serialized" in told


def usage(cubin: bytes) -> tuple[int, int]:
    """Read registers and bytes of stack of a thread from a binary for NVIDIA."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    told = _told_of(cubin, ".cubin", str(tool), "--dump-resource-usage")
    return _number("REG:", told), _number("STACK:", told)


def _widest(ptx: str, access: str) -> int:
    """Find the bytes of the widest ``ld.global`` (or ``cp.async``), or ``st.global``."""
    widths = [
        int(vector or 1) * int(bits) // 8
        for vector, bits in re.findall(access + r"\.global[\w.:]*?(?:\.v(\d))?\.[bufs](\d+) ", ptx)
    ]
    if access == "ld":  # sizes of cp.async are written 0x10 or 16
        sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?\], (\w+)", ptx)
        widths += [int(size, 0) for size in sizes]
    return max(widths, default=0)


COLUMNS = (
    "kernel", "variant", "registers", "stack", "shared", "matrix unit", "TMA", "widest load",
    "widest store",
)  # fmt: skip


def _cells(row: Resources) -> tuple[Any, ...]:
    unit = ("yes" if row.matrix_unit else "no") if row.gemm else ""
    unit += " (serialized)" * row.serialized
    names = (row.kernel, row.variant, row.registers, row.stack, row.shared, unit)
    return (*names, "yes" * row.copy_engine, row.load_bytes or None, row.store_bytes or None)


def main() -> None:
    """Print the table of one architecture, or one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", choices=sorted(CAPABILITY), default="sm_90")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("bench.resources: unset TRITON_INTERPRET; interpreted kernels do not compile")
    found = resources(arguments.arch, arguments.dtypes)
    if arguments.json:
        for row in found:
            print(json.dumps(asdict(row)), flush=True)
        return
    print()
    title = f"{arguments.arch}, Triton {triton.__version__}"
    print_table(Table(title=title, columns=[*map(Column, COLUMNS)], lines=map(_cells, found)))


if __name__ == "__main__":
    main()
