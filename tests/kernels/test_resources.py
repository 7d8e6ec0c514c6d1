"""Every kernel compiles for the GPUs it is meant for; no GPU is needed to see that."""

from __future__ import annotations

import json

import pytest

from tests.kernels.checks import run_compiling

SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}


def resources(arch: int) -> list[dict[str, object]]:
    done = run_compiling("-m", "bench.resources", "--json", "--arch", str(arch))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def name(row: dict[str, object]) -> str:
    return f"{row['kernel']} {row['label']} sm_{row['arch']}"


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_compiles_without_spills_and_fits(arch):
    rows = resources(arch)
    assert {row["kernel"] for row in rows} >= {
        "locate_kernel",
        "claim_kernel",
        "settle_kernel",
        "pack_rows_kernel",
        "project_scatter_kernel",
        "embedding_grad_kernel",
        "gather_grad_kernel",
        "grad_features_kernel",
        "grad_weight_kernel",
    }
    spilling = [name(row) for row in rows if row["stack"]]
    assert not spilling
    too_large = [name(row) for row in rows if row["shared"] > SHARED_LIMIT[arch]]
    assert not too_large
    gemms = [row for row in rows if row["is_gemm"]]
    narrow = [name(row) for row in gemms if row["global_bytes"] < 16]
    assert not narrow
    without = [name(row) for row in gemms if not row["matrix_unit"] and "fp32" not in row["label"]]
    assert not without
