"""Compile every kernel for every architecture, without a GPU, and report what it needs.

``python -m bench.resources`` prints a Markdown table; ``--json`` one object a line. Run it without
``TRITON_INTERPRET``, which would replace the kernels by interpreted ones.

For each kernel × tile × dtype × architecture: registers a thread, stack bytes (spills), shared
memory, whether the matrix unit's instruction of that architecture is there, and how wide the
widest global access is.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from step37_kernels.ops import plan, project, project_backward, tiles

HIDDEN, WIDTH = 4096, 6144
MAX_SHARED = {80: 166912, 90: 232448, 100: 232448}
MATRIX_UNIT = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One kernel as its launcher would compile it."""

    kernel: Any
    label: str
    """What the row is called: dtype and tile."""
    pointers: dict[str, str]
    """Pointer arguments and their types."""
    integers: dict[str, bool]
    """Integer arguments; True where the value is a multiple of 16 and specialised as such."""
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    is_gemm: bool = False
    ones: tuple[str, ...] = ()
    """Integer arguments whose value is 1, which the launcher folds in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    kernel: str
    label: str
    arch: int
    is_gemm: bool
    registers: int
    stack: int
    shared: int
    matrix_unit: bool
    global_bytes: int
    """Bytes of the widest global load or store, or of one asynchronous copy."""


def insert_specs(arch: int) -> Iterator[Spec]:
    """The kernels of plan, projection and its backward pass."""
    yield Spec(
        kernel=plan.locate_kernel,
        label="int64 ids",
        pointers={
            "ids_ptr": "*i64",
            "group_ptr": "*i64",
            "starts_ptr": "*i32",
            "found_ptr": "*i32",
            "row_at_ptr": "*i32",
        },
        integers=dict.fromkeys(
            ("batch_size", "seq_len", "stride_b", "stride_s", "num_positions"), False
        ),
        constants={"BLOCK": plan.LOCATE_BLOCK},
        num_warps=plan.LOCATE_WARPS,
    )
    rows = {"offsets_ptr": "*i32", "starts_ptr": "*i32", "row_at_ptr": "*i32"}
    positions = dict.fromkeys(("batch_size", "num_positions"), False)
    block = {"BLOCK": plan.ROW_BLOCK}
    yield Spec(
        kernel=plan.claim_kernel, label="", pointers=rows, integers=positions, constants=block
    )
    yield Spec(
        kernel=plan.settle_kernel,
        label="",
        pointers={**rows, "destinations_ptr": "*i32"},
        integers=positions,
        constants=block,
    )
    for dtype, short in SHORT.items():
        yield from _copy_specs(short)
        for product, tile in tiles.entries(arch, dtype):
            for has_bias in (False, True) if product == "forward" else (False,):
                yield _gemm_spec(product, tile, dtype, has_bias)


def _copy_specs(short: str) -> Iterator[Spec]:
    pointer = f"*{short}"
    for label, one in (("channels-first", "stride_l"), ("contiguous", "stride_c")):
        other = "stride_c" if one == "stride_l" else "stride_l"
        yield Spec(
            kernel=project.pack_rows_kernel,
            label=f"{short} {label}",
            pointers={"source_ptr": pointer, "packed_ptr": pointer},
            integers={
                "rows_each": False,
                "C": True,
                "first_row": False,
                "stride_n": False,
                # L = 169 rows: the stride of the channels-first view is no multiple of 16.
                other: other == "stride_l",
            },
            ones=(one,),
            constants={"BLOCK_L": project.PACK_BLOCK_L, "BLOCK_C": project.PACK_BLOCK_C},
        )
    strides = {"batch_size": False, "stride_s": False, "stride_b": False}
    yield Spec(
        kernel=project_backward.embedding_grad_kernel,
        label=short,
        pointers={"grad_ptr": pointer, "row_at_ptr": "*i32", "out_ptr": pointer},
        integers={"num_positions": False, "H": True, **strides},
        ones=("stride_h",),
        constants={
            "BLOCK_P": project_backward.COPY_BLOCK_P,
            "BLOCK_H": project_backward.COPY_BLOCK_H,
        },
    )
    yield Spec(
        kernel=project_backward.gather_grad_kernel,
        label=short,
        pointers={
            "grad_ptr": pointer,
            "destinations_ptr": "*i32",
            "rows_ptr": pointer,
            "partial_ptr": "*fp32",
        },
        integers={"num_rows": False, "H": True, **strides},
        ones=("stride_h",),
        constants={
            "BIAS_SUM": True,
            "INTERPRET": False,
            "BLOCK_R": project_backward.GATHER_BLOCK_R,
            "BLOCK_H": project_backward.GATHER_BLOCK_H,
        },
    )


def _gemm_spec(
    product: tiles.Product, tile: tiles.Tile, dtype: torch.dtype, has_bias: bool
) -> Spec:
    pointer = f"*{SHORT[dtype]}"
    label = f"{SHORT[dtype]} {tile.block_m}×{tile.block_n}×{tile.block_k}"
    constants: dict[str, Any] = {
        "PRECISION": "ieee",
        "INTERPRET": False,
        **tile.constants(),
    }
    if product == "forward":
        kernel = project.project_scatter_kernel
        pointers = {
            "x_ptr": pointer,
            "weight_ptr": pointer,
            "bias_ptr": pointer,
            "destinations_ptr": "*i32",
            "out_ptr": pointer,
        }
        constants |= {"HAS_BIAS": has_bias, "EVEN_K": WIDTH % tile.block_k == 0}
        label += " bias" if has_bias else ""
    elif product == "grad_features":
        kernel = project_backward.grad_features_kernel
        pointers = {"grad_ptr": pointer, "weight_ptr": pointer, "out_ptr": pointer}
        constants |= {"EVEN_K": HIDDEN % tile.block_k == 0}
    else:
        kernel = project_backward.grad_weight_kernel
        pointers = {"grad_ptr": pointer, "x_ptr": pointer, "out_ptr": pointer}
        accumulate = product == "accumulate_weight"
        constants |= {"ACCUMULATE": accumulate}
        if accumulate:
            pointers["out_ptr"] = "*fp32"
            label += " onto fp32"
    return Spec(
        kernel=kernel,
        label=label,
        pointers=pointers,
        integers={"num_rows": False, "H": True, "C": True},
        constants=constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        is_gemm=True,
    )


def compile_spec(spec: Spec, arch: int) -> Resources:
    """Compile one kernel for ``sm_<arch>`` and read its resources from the binary."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for i, name in enumerate(spec.kernel.arg_names):
        if name in spec.pointers:
            signature[name] = spec.pointers[name]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif name in spec.integers:
            signature[name] = "i32"
            if spec.integers[name]:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[(i,)] = 1 if name in spec.ones else spec.constants[name]
    source = ASTSource(spec.kernel, signature, constants, attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": spec.num_warps, "num_stages": spec.num_stages},
    )
    registers, stack = _resource_usage(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Resources(
        kernel=spec.kernel.__name__,
        label=spec.label,
        arch=arch,
        is_gemm=spec.is_gemm,
        registers=registers,
        stack=stack,
        shared=compiled.metadata.shared,
        matrix_unit=MATRIX_UNIT[arch] in ptx,
        global_bytes=_widest_access(ptx),
    )


def _resource_usage(cubin: bytes) -> tuple[int, int]:
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
    registers = re.search(r"REG:(\d+)", report)
    stack = re.search(r"STACK:(\d+)", report)
    if registers is None or stack is None:
        raise RuntimeError(f"cuobjdump reported no resources:\n{report}")
    return int(registers[1]), int(stack[1])


def _widest_access(ptx: str) -> int:
    """Bytes of the widest ``ld/st.global`` or ``cp.async`` (whose size is written 0x10 or 16)."""
    widths = [
        int(size, 0)
        for size in re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?\], (\w+)", ptx)
    ]
    for vector, bits in re.findall(r"(?:ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bufs](\d+) ", ptx):
        widths.append(int(vector or 1) * int(bits) // 8)
    return max(widths, default=0)


def all_resources(archs: tuple[int, ...]) -> Iterator[Resources]:
    for arch in archs:
        for spec in insert_specs(arch):
            yield compile_spec(spec, arch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", type=int, action="append", choices=sorted(MATRIX_UNIT))
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("bench.resources: unset TRITON_INTERPRET; interpreted kernels do not compile")
    show = functools.partial(print, flush=True)
    if not arguments.json:
        show(f"Triton {triton.__version__}\n")
        show("| kernel | variant | sm | registers | stack | shared | matrix unit | widest access |")
        show("|---|---|---|---|---|---|---|---|")
    for row in all_resources(tuple(arguments.arch or (90,))):
        if arguments.json:
            show(json.dumps(asdict(row)))
        else:
            unit = ("yes" if row.matrix_unit else "no") if row.is_gemm else ""
            show(
                f"| {row.kernel} | {row.label} | {row.arch} | {row.registers} | {row.stack} "
                f"| {row.shared} | {unit} | {row.global_bytes} |"
            )


if __name__ == "__main__":
    main()
