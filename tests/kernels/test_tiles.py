"""Whatever the tile table says, the products are right: every kind of tile on the reference."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.tune.products import Operands, launch, only
from step37_kernels import plan_insert, project_and_insert
from step37_kernels.ops import gemm, project, project_backward, tiles
from step37_kernels.ops.common import INTERPRETED
from step37_kernels.testing import make_insert_case
from tests.kernels.checks import assert_gradients, assert_output
from tests.kernels.strategies import feature_groups, token_ids

KINDS = {
    "pointers by halves": {"subtiles": 2},
    "pointers with split K": {"split_k": 2},
    "copy engine": {"tma": True},
    "copy engine by halves": {"tma": True, "subtiles": 2},
    "copy engine with split K": {"tma": True, "split_k": 3},
    "persistent": {"tma": True, "persistent": True},
    "persistent by halves": {"tma": True, "persistent": True, "subtiles": 2},
}
BASE = tiles.Tile(16, 32, 32, 2, 4, 2) if INTERPRETED else tiles.Tile(64, 64, 32, 2, 4, 3)


real_num_programs = gemm.num_programs
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


TABLE = [
    pytest.param(capability, product, tile, dtype, id=f"{capability} {product} {tile}")
    for capability, dtype in [(90, torch.bfloat16), (80, torch.float16), (0, torch.float32)]
    for product, tile in tiles.entries(capability, dtype)
]
"""All that may be launched: on Hopper, on other devices, and (0) on any."""


def only_tile(kind: dict[str, object]) -> AbstractContextManager[None]:
    """The only tile there is, for all products."""
    return only(dataclasses.replace(BASE, **kind))


def main_grad_of(weight: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 1, weight.numel(), device=weight.device).view(weight.shape)


@every_kind
@settings(max_examples=max(6, settings.default.max_examples // 4))
@given(
    arguments=st.fixed_dictionaries(
        {
            "input_ids": token_ids(),
            "groups": feature_groups(),
            # Rows of 40 and 36 bf16 values are multiples of 16 bytes and not: with 36 the copy
            # engine is not asked, and more than one block of K is there to split.
            "hidden": st.sampled_from([40, 64]),
            "width": st.sampled_from([36, 96, 136]),
            "seed": st.integers(0, 2**31),
            "bias": st.booleans(),
        }
    )
)
def test_every_kind_of_tile_gives_the_references_output_and_gradients(device, kind, arguments):
    case = make_insert_case(**arguments, dtype=torch.bfloat16, device=device)
    plan = plan_insert(case.input_ids, case.plan_groups, impl="triton")
    with only_tile(kind):
        output = project_and_insert(
            case.embeddings, case.features, case.weight, case.bias, plan, impl="triton"
        )
        assert_output(case, output)
        assert_gradients(case, output, case.grad_output)


@every_kind
def test_a_sum_on_top_of_main_grad_is_the_same_with_every_kind_of_tile(device, kind):
    case = make_insert_case(
        input_ids=torch.tensor([[7, 0, 0, 0, 7, 0, 0]]),
        groups=[(7, [(1, 3), (1, 2)])],
        seed=0,
        hidden=72,
        width=104,
        dtype=torch.bfloat16,
        device=device,
    )
    plan = plan_insert(case.input_ids, case.plan_groups, impl="triton")

    def weight_gradient(fusion: bool) -> torch.Tensor:
        case.weight.grad = None
        case.weight.main_grad = main_grad_of(case.weight)
        output = project_and_insert(
            case.embeddings,
            case.features,
            case.weight,
            case.bias,
            plan,
            impl="triton",
            gradient_accumulation_fusion=fusion,
        )
        with only_tile(kind):
            output.backward(case.grad_output)
        return case.weight.main_grad if fusion else case.weight.grad

    exact = weight_gradient(False).float()
    fused = weight_gradient(True) - main_grad_of(case.weight)
    # One rounding to bf16 apart, and the fp32 sum with numbers below 1.
    bound = exact.abs() * torch.finfo(torch.bfloat16).eps + 4 * torch.finfo(torch.float32).eps
    assert (fused - exact).abs().le(bound).all()


@pytest.mark.skipif(INTERPRETED, reason="tiles of this size are for compiled kernels")
@pytest.mark.parametrize(("capability", "product", "tile", "dtype"), TABLE)
def test_every_entry_of_the_table_multiplies_exactly(device, capability, product, tile, dtype):
    here = tiles._capability(torch.device(device))
    if capability and (capability == 90) != (here == 90):
        pytest.skip(f"not a tile of sm_{here}")
    # Two blocks each way, the second one incomplete, and K long enough to use each stage twice.
    m, n = tile.block_m + 24, tile.block_n + 40
    k = tile.split_k * tile.block_k * (2 * tile.num_stages + 1) + 8
    rows, hidden, width = {"forward": (m, n, k), "grad_features": (m, k, n)}.get(product, (k, m, n))
    live = rows - 3

    def whole_numbers(*shape: int) -> torch.Tensor:
        """So small that every sum is exact, in whatever order it is taken."""
        return torch.randint(-3, 4, shape, generator=generator).to(dtype).to(device)

    generator = torch.Generator().manual_seed(0)
    x, grad = whole_numbers(rows, width), whole_numbers(rows, hidden)
    weight, bias = whole_numbers(hidden, width), whole_numbers(hidden)
    x[live:] = 0  # as the plan packs them: rows past the live ones count for nothing
    grad[live:] = 0
    exact_x, exact_grad, exact_weight = x.double(), grad.double(), weight.double()
    expected = {
        "forward": lambda: (exact_x @ exact_weight.T + bias.double())[:live],
        "grad_features": lambda: (exact_grad @ exact_weight)[:live],
        "grad_weight": lambda: exact_grad.T @ exact_x,
        "accumulate_weight": lambda: exact_grad.T @ exact_x + 1,
    }[product]()
    outs = {
        "forward": torch.zeros(rows, 1, hidden, dtype=dtype, device=device),
        "grad_weight": torch.empty_like(weight),
        "accumulate_weight": torch.ones(hidden, width, device=device),
    }
    result = launch(
        product,
        tile,
        Operands(x=x, grad=grad, weight=weight, out=outs.get(product, x)),
        torch.arange(rows - 1, -1, -1, dtype=torch.int32, device=device),
        bias=bias,
        live_rows=torch.tensor([live], dtype=torch.int32, device=device),
    )
    if product == "forward":
        result = result.squeeze(1).flip(0)
    if product in ("forward", "grad_features"):
        result = result[:live]
    assert result.equal(expected.to(result.dtype))


def test_the_copy_engine_is_asked_only_for_what_it_can_read(device):
    tile = dataclasses.replace(BASE, tma=True, persistent=True)
    memory = torch.zeros(4 * 64 + 1, dtype=torch.bfloat16, device=device)
    assert tiles.takes_tma(memory[:256].view(4, 64))
    assert not tiles.takes_tma(memory[1:257].view(4, 64))
    assert not tiles.takes_tma(memory[:144].view(4, 36))
    assert tile.by_pointers.tma is tile.by_pointers.persistent is False
    assert tile.by_pointers is tile.by_pointers


def test_the_only_row_of_a_wider_matrix_is_a_matrix_of_its_own(device):
    row = torch.zeros(2, 100, dtype=torch.bfloat16, device=device)[:1, :96]
    assert row.is_contiguous()  # whatever its stride, which is no multiple of 16 bytes
    tile = dataclasses.replace(BASE, tma=True)
    assert tiles.takes_tma(row)
    assert list(gemm.operand(row, 16, 32, tile).strides) == [96, 1]


def test_a_tiles_kind_reaches_the_launch(device, monkeypatch):
    used = []
    monkeypatch.setattr(
        gemm, "num_programs", lambda tile, *_: used.append(tile) or real_num_programs(tile, *_)
    )
    for module in (project, project_backward):
        monkeypatch.setattr(module, "num_programs", gemm.num_programs)
    case = make_insert_case(
        torch.tensor([[7, 0, 0, 0]]),
        [(7, [(1, 3)])],
        hidden=64,
        width=64,
        seed=0,
        dtype=torch.float16,
        device=device,
    )
    plan = plan_insert(case.input_ids, case.plan_groups, impl="triton")
    with only_tile({"tma": True, "persistent": True}):
        output = project_and_insert(
            case.embeddings, case.features, case.weight, None, plan, impl="triton"
        )
        output.backward(case.grad_output)
    assert [(tile.tma, tile.persistent) for tile in used] == [(True, True)] * 3


def test_tiles_past_the_live_rows_are_not_computed(device):
    rows, live, block = 5 * BASE.block_m, BASE.block_m + 1, BASE.block_m
    live_rows = torch.tensor([live], dtype=torch.int32, device=device)
    x = torch.ones(rows, 64, dtype=torch.bfloat16, device=device)
    weight = torch.eye(64, dtype=torch.bfloat16, device=device)
    everywhere = torch.arange(rows, dtype=torch.int32, device=device)
    kinds = [{}, {"tma": True, "persistent": True}]
    for kind in kinds:
        with only_tile(kind):
            out = torch.zeros(rows, 1, 64, dtype=torch.bfloat16, device=device)
            project.project_scatter(x, weight, None, everywhere, live_rows, out)
            grads = project_backward.grad_features(x, weight, live_rows)
        assert out[:live].eq(1).all()
        assert out[2 * block :].eq(0).all()
        assert grads[:live].eq(1).all()
        # New memory is poisoned with NaN here: nobody wrote those.
        assert grads[2 * block :].isnan().all()


def test_the_weights_gradient_passes_over_the_rows_past_the_live_ones(device):
    rows, live = 3 * BASE.block_k, BASE.block_k
    live_rows = torch.tensor([live], dtype=torch.int32, device=device)
    x = torch.ones(rows, 64, dtype=torch.bfloat16, device=device)
    for kind in [{}, {"tma": True, "persistent": True}]:
        with only_tile(kind):
            assert project_backward.grad_weight(x, x, live_rows).eq(live).all()


def test_persistent_programs_do_not_split_k():
    with pytest.raises(ValueError, match="split"):
        dataclasses.replace(BASE, persistent=True, split_k=2)
