"""Every kernel compiles for the GPUs it is meant for; no GPU is needed to see that."""

from __future__ import annotations

import json

import pytest

from bench.resources import KERNELS, SHARED_LIMIT
from tests.kernels.checks import run_compiling

COPIES = {"copy_rows_kernel", "place_rows_kernel", "gradient_rows_kernel", "sum_segments_kernel"}


def resources(arch: str, dtypes: list[str]) -> list[dict[str, object]]:
    arguments = ["--json", "--arch", arch, "--dtypes", *dtypes]
    done = run_compiling("-m", "bench.resources", *arguments)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def names(rows: list[dict[str, object]]) -> list[str]:
    return [f"{row['kernel']} {row['variant']}" for row in rows]


@pytest.mark.parametrize(
    "dtypes",
    # fp16 is bf16's code but for the name of its matrix instruction.
    [["bf16", "fp32"], pytest.param(["fp16"], marks=pytest.mark.slow)],
    ids="-".join,
)
@pytest.mark.parametrize(
    "arch",
    ["sm_80", "sm_90", *(pytest.param(a, marks=pytest.mark.slow) for a in ("sm_100", "gfx942"))],
)
def test_every_kernel_compiles_without_spills_and_fits(arch, dtypes):
    rows = resources(arch, dtypes)
    launched = {kernel.__name__ for kernel in KERNELS}
    if arch != "sm_90":  # the library multiplies
        launched -= {"project_insert_kernel", "sum_parts_kernel"}
    elif "fp32" not in dtypes:
        launched -= {"place_rows_kernel"}
    assert {row["kernel"] for row in rows} == launched
    assert not names([row for row in rows if row["stack"]])
    assert not names([row for row in rows if row["shared"] > SHARED_LIMIT[arch]])
    gemms = [row for row in rows if row["gemm"]]
    assert bool(gemms) == (arch == "sm_90")
    assert not names([row for row in gemms if not row["matrix_unit"]])
    if arch.startswith("sm_"):
        vectors = [row for row in rows if row["gemm"] or row["kernel"] in COPIES]
        assert not names([row for row in vectors if row["store_bytes"] < 16])
        loading = [row for row in vectors if not row["copy_engine"]]
        # Of 169 rows channels-first, no two begin at the same place in a vector.
        loading = [row for row in loading if "channels-first" not in row["variant"]]
        assert not names([row for row in loading if row["load_bytes"] < 16])
    if arch == "sm_90":
        assert all(row["copy_engine"] for row in gemms)
        assert not names([row for row in gemms if row["serialized"]])
