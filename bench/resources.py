"""Compile every kernel for every architecture, without a GPU, and report what it needs.

``python -m bench.resources`` prints a Markdown table; ``--json`` one object a line. Run it without
``TRITON_INTERPRET``, which would replace the kernels by interpreted ones.

The launchers themselves are called, on a driver that launches nothing: what is compiled is what a
GPU of that architecture would get, for each entry of the tile table and each dtype. Reported are
registers a thread, bytes of stack (spills), shared memory, whether the matrix unit's instruction
is there, whether the copy engine (TMA) is used, and how wide the widest global access is.
"""

from __future__ import annotations

import argparse
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
from bench.tune import products
from bench.tune.products import HIDDEN, ROWS, WIDTH, Operands
from step37_kernels import RaggedImages, clip_normalize, dispatch, resize_clip_normalize
from step37_kernels.ops import gemm, gradient, plan, project, project_backward, tiles
from step37_kernels.ops import normalize as pixel_ops
from step37_kernels.ops import resize as resize_ops
from step37_kernels.ops import resize_uint8 as resize_uint8_ops
from step37_kernels.pixels.resize import resize_uint8

SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
MATRIX_UNIT = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma_",
}
CAPABILITY = {"sm_80": 80, "sm_90": 90, "sm_100": 100, "gfx942": 94}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    kernel: str
    variant: str
    arch: str
    gemm: bool
    """A matrix product of 16-bit numbers: it has to use the matrix unit."""
    registers: int
    stack: int
    shared: int
    matrix_unit: bool
    copy_engine: bool
    serialized: bool
    """On sm_90: the assembler found that it has to wait for each ``wgmma`` before the next."""
    load_bytes: int
    """Bytes of the widest global load or asynchronous copy of one thread; 0: none, or on AMD."""
    store_bytes: int
    """Bytes of the widest global store; 0 on AMD."""


def _launches(arch: str, dtypes: Iterable[str]) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    """``(variant, is a 16-bit product, launch)`` of everything that can be launched."""
    for ids in (torch.int64, torch.int32):
        for inline, step in ((True, 1), (True, 2), (False, 1)):
            for seq_len in (2048, 2 * plan.MAX_POSITIONS):
                variant = f"{'strided ' * (step > 1)}{str(ids).removeprefix('torch.')} ids"
                variant += ", tables" * (not inline)
                yield variant, False, functools.partial(_plan, ids, inline, step, seq_len)
    for short in dtypes:
        yield from _copies(DTYPES[short], short)
        yield from _products(CAPABILITY[arch], DTYPES[short], short)
    yield from _pixels(dtypes)


def _plan(dtype: torch.dtype, inline: bool, step: int, seq_len: int) -> None:
    tables = (torch.empty(3, 2, dtype=torch.int64), torch.empty(4, dtype=torch.int32))
    groups, runs = [(128003, 2), (128000, 1)], [(2, 81), (1, 169)]
    ids = torch.empty(1, seq_len * step, dtype=dtype)[:, ::step]
    plan.plan_rows(ids, groups, runs, None if inline else tables)


def _copies(dtype: torch.dtype, short: str) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    features = torch.empty(1, ROWS, WIDTH, dtype=dtype)
    view = torch.empty(1, WIDTH, ROWS, dtype=dtype).transpose(1, 2)
    gradient_output = torch.empty(ROWS, 1, HIDDEN, dtype=dtype)
    positions = torch.empty(ROWS, dtype=torch.int32)
    yield f"{short} contiguous", False, lambda: project.pack_rows([features])
    yield f"{short} channels-first", False, lambda: project.pack_rows([view])
    yield short, False, lambda: project_backward.embedding_grad(gradient_output, positions)
    for bias in (True, False):
        gather = functools.partial(
            project_backward.gather_grad, gradient_output, positions, dtype, bias_sum=bias
        )
        yield f"{short}{' bias' * bias}", False, gather
    for rows, bias in ((True, False), (True, True), (False, True)):
        launch = functools.partial(
            gradient.gradient_rows, gradient_output, positions, positions, dtype,
            embeddings=True, rows=rows, bias=bias,
        )  # fmt: skip
        yield f"{short}{' rows' * rows}{' bias' * bias}", False, launch


def _products(
    capability: int, dtype: torch.dtype, short: str
) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    destinations = torch.empty(ROWS, dtype=torch.int32)
    bias = torch.empty(HIDDEN, dtype=dtype)
    live_rows = torch.empty(1, dtype=torch.int32)
    for product, tile in tiles.entries(capability, dtype):
        options: list[tuple[bool, Tensor | None]] = [(False, None)]
        if dtype == torch.bfloat16:
            biases = (False, True) if product == "forward" else (False,)
            options = [(with_bias, live) for with_bias in biases for live in (None, live_rows)]
        operands = Operands.blank(product, dtype)
        for with_bias, live in options:
            launch = functools.partial(
                products.launch,
                product,
                tile,
                operands,
                destinations,
                bias=bias if with_bias else None,
                live_rows=live,
            )
            variant = f"{short} {tile}{' bias' * with_bias}{' shard' * (live is not None)}"
            variant += " onto fp32" * (product == "accumulate_weight")
            yield variant, dtype != torch.float32, launch


def _pixels(dtypes: Iterable[str]) -> Iterator[tuple[str, bool, Callable[[], object]]]:
    def picture(*shape: int) -> Tensor:
        return torch.empty(*shape, 3, dtype=torch.uint8)

    images = [picture(333, 500), picture(500, 16)]
    for short in dtypes:
        dtype = DTYPES[short]
        for size, rows in ((31, "odd rows"), (32, "aligned rows")):
            square = picture(1, size, size)
            normalize = functools.partial(clip_normalize, square, dtype=dtype)
            yield f"{short} {rows}", False, normalize
            for image, order in zip(images, ("", ", vertical first"), strict=True):
                resize = functools.partial(
                    resize_clip_normalize, [image], size, dtype=dtype, pillow=(13, 0)
                )
                yield f"{short} {rows}{order}", False, resize
    ragged = RaggedImages.gather(images)
    yield "uint8", False, lambda: resize_uint8(ragged, [(20, 30), (30, 20)])


KERNELS = (
    plan.plan_kernel,
    plan.locate_kernel,
    plan.assign_kernel,
    gradient.gradient_rows_kernel,
    project.pack_rows_kernel,
    project.project_scatter_kernel,
    gemm.sum_splits_kernel,
    project_backward.embedding_grad_kernel,
    project_backward.gather_grad_kernel,
    project_backward.grad_features_kernel,
    project_backward.grad_weight_kernel,
    pixel_ops.normalize_kernel,
    resize_ops.first_pass_kernel,
    resize_ops.second_pass_kernel,
    resize_uint8_ops.filter_pass_kernel,
)


def resources(arch: str, dtypes: Iterable[str] = tuple(DTYPES)) -> Iterator[Resources]:
    """What every kernel needs on ``arch``, as its launchers compile it for these of DTYPES."""
    NoDriver(arch).install()
    dispatch.kernels_run_on_cpu = lambda: True
    seen: set[int] = set()
    for variant, is_gemm, launch in _launches(arch, dtypes):
        launch()
        for kernel in KERNELS:
            for binary in compiled(kernel):
                if id(binary) not in seen:
                    seen.add(id(binary))
                    product = is_gemm and kernel is not gemm.sum_splits_kernel
                    yield _read(kernel.__name__, variant, arch, product, binary)


def _read(name: str, variant: str, arch: str, is_gemm: bool, binary: Any) -> Resources:
    serialized = False
    if arch.startswith("gfx"):
        assembly = binary.asm["amdgcn"]
        registers, stack = (
            _number(r"\.vgpr_count:\s+", assembly),
            _number("ScratchSize: ", assembly),
        )
        load_bytes = store_bytes = 0
    else:
        assembly = binary.asm["ptx"]
        registers, stack = usage(binary.asm["cubin"])
        load_bytes, store_bytes = _widest(assembly, "ld"), _widest(assembly, "st")
        serialized = is_gemm and arch == "sm_90" and _serialized(assembly)
    return Resources(
        kernel=name,
        variant=variant,
        arch=arch,
        gemm=is_gemm,
        registers=registers,
        stack=stack,
        shared=binary.metadata.shared,
        matrix_unit=MATRIX_UNIT[arch] in assembly,
        copy_engine="cp.async.bulk.tensor" in assembly,
        serialized=serialized,
        load_bytes=load_bytes,
        store_bytes=store_bytes,
    )


def _number(label: str, text: str) -> int:
    found = re.search(label + r"(\d+)", text)
    if found is None:
        raise RuntimeError(f"no number after {label!r} in the binary's report:\n{text[-2000:]}")
    return int(found[1])


def _serialized(ptx: str) -> bool:
    """Whether the assembler reports ``wgmma`` instructions that cannot overlap."""
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        file.write(ptx.encode())
        file.flush()
        report = subprocess.run(
            [get_ptxas(90).path, "--verbose", "-arch=sm_90a", file.name, "-o", os.devnull],
            capture_output=True,
            text=True,
            check=True,
        )
    return "wgmma.mma_async instructions are serialized" in report.stdout + report.stderr


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack of a kernel for NVIDIA."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return _number("REG:", report), _number("STACK:", report)


def _widest(ptx: str, access: str) -> int:
    """Bytes of the widest ``ld.global`` or ``st.global``; a ``cp.async`` is a load, too."""
    widths = [
        int(vector or 1) * int(bits) // 8
        for vector, bits in re.findall(access + r"\.global[\w.:]*?(?:\.v(\d))?\.[bufs](\d+) ", ptx)
    ]
    if access == "ld":  # its size is written 0x10 or 16
        sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?\], (\w+)", ptx)
        widths += [int(size, 0) for size in sizes]
    return max(widths, default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", choices=sorted(CAPABILITY), default="sm_90")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("bench.resources: unset TRITON_INTERPRET; interpreted kernels do not compile")
    show = functools.partial(print, flush=True)
    if not arguments.json:
        show(f"\n## {arguments.arch}, Triton {triton.__version__}\n")
        show(
            "| kernel | variant | registers | stack | shared | matrix unit | TMA "
            "| widest load | widest store |"
        )
        show("|---|---|---|---|---|---|---|---|---|")
    for row in resources(arguments.arch, arguments.dtypes):
        if arguments.json:
            show(json.dumps(asdict(row)))
        else:
            unit = ("yes" if row.matrix_unit else "no") if row.gemm else ""
            unit += " (serialized)" * row.serialized
            show(
                f"| {row.kernel} | {row.variant} | {row.registers} | {row.stack} "
                f"| {row.shared} | {unit} | {'yes' * row.copy_engine} "
                f"| {row.load_bytes or ''} | {row.store_bytes or ''} |"
            )


if __name__ == "__main__":
    main()
