"""Backward before the matrix products: every row once, and nothing that nobody asked for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from step37_kernels.ops import gradient, order
from step37_kernels.ops.gradient import gradient_rows
from tests import ptx

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = ("contiguous", "batch first", "sliced", "columns apart", "one row for all", "one number")
ALL = {"embeddings": True, "rows": True, "bias": True}


def in_layout(values: Tensor, layout: str) -> Tensor:
    """``[S, B, H]`` of these values, or of those that the layout repeats."""
    if layout == "batch first":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        return torch.cat([values, torch.full_like(values, torch.nan)], 2)[..., : values.shape[2]]
    if layout == "columns apart":
        return values.transpose(0, 2).contiguous().transpose(0, 2)
    if layout == "one row for all":
        return values[:1, :1].expand(values.shape)
    if layout == "one number":
        return values[:1, :1, :1].expand(values.shape)
    return values


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, torch.dtype, str]:
    """``grad_output`` of small whole numbers, ``row_at``, ``destinations``, dtype, layout."""
    seq_len, batch_size = draw(st.integers(1, 30)), draw(st.integers(1, 3))
    hidden = draw(st.sampled_from([1, 8, 20, 64, 136, 520]))
    num_positions = seq_len * batch_size
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    grad = torch.randint(-8, 9, (seq_len, batch_size, hidden), generator=numbers)
    kept = draw(st.integers(0, num_positions))
    dropped = draw(st.integers(kept == 0, 40))
    places = torch.randperm(num_positions, generator=numbers)[:kept]
    destinations = torch.cat([places, torch.full((dropped,), -1)])
    destinations = destinations[torch.randperm(kept + dropped, generator=numbers)].to(torch.int32)
    row_at = torch.full((num_positions,), -1, dtype=torch.int32)
    lands = destinations >= 0
    row_at[destinations[lands].long()] = torch.nonzero(lands)[:, 0].to(torch.int32)
    values = grad.to(draw(st.sampled_from(DTYPES)))
    row_at = row_at.view(seq_len, batch_size)
    dtype, layout = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS))
    return values, row_at, destinations, dtype, layout


def expected(
    grad: Tensor, row_at: Tensor, destinations: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    embeddings = torch.where((row_at < 0)[..., None], grad, torch.zeros_like(grad))
    rows = grad.reshape(-1, grad.shape[2])[destinations.clamp_min(0).long()]
    rows = torch.where((destinations >= 0)[:, None], rows, torch.zeros_like(rows)).to(dtype)
    return embeddings, rows, rows.double().sum(0).to(dtype)


@settings(deadline=None)
@given(problem=problems(), wanted=st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_every_gradient_is_the_references_and_what_nobody_wants_is_empty(device, problem, wanted):
    values, row_at, destinations, dtype, layout = problem
    grad = in_layout(values.to(device), layout)
    before = grad.clone()
    row_at, destinations = row_at.to(device), destinations.to(device)
    options = dict(zip(ALL, wanted, strict=True))
    found = gradient_rows(grad, row_at, destinations, dtype, **options)
    for want, actual, exact in zip(
        wanted, found[:3], expected(grad, row_at, destinations, dtype), strict=True
    ):
        assert actual.dtype == exact.dtype
        assert actual.is_contiguous()
        if want:
            assert torch.equal(actual, exact)
        else:
            assert actual.shape == (0,)
    assert torch.equal(grad, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bias_sum_is_of_the_rounded_rows_in_fp32_and_the_same_twice(device, dtype):
    rows, hidden = 1000, 40
    generator = torch.Generator().manual_seed(5)
    grad = torch.randn(rows, 1, hidden, generator=generator).to(device)
    destinations = torch.randperm(rows, generator=generator).to(torch.int32).to(device)
    row_at = torch.empty_like(destinations)
    row_at[destinations.long()] = torch.arange(rows, dtype=torch.int32, device=device)
    first = gradient_rows(grad, row_at, destinations, dtype, embeddings=False, rows=True, bias=True)
    other = gradient_rows(
        grad, row_at, destinations, dtype, embeddings=False, rows=False, bias=True
    )
    rounded = grad.flatten(0, 1)[destinations.long()].to(dtype)
    assert torch.equal(first[1], rounded)
    exact = rounded.double().sum(0)
    # Each of the additions, then the sum itself, is rounded once.
    bound = rows * 2.0**-24 * rounded.double().abs().sum(0)
    bound += torch.finfo(dtype).eps / 2 * (exact.abs() + bound)
    assert ((first[2].double() - exact).abs() <= bound).all()
    assert torch.equal(first[2], other[2])


@pytest.mark.parametrize(
    ("wanted", "position_programs", "row_programs"),
    [
        ({"embeddings": True}, 3 * 2, 0),
        ({"rows": True}, 0, 2 * 5),
        ({"bias": True}, 0, 2 * 5),
        (ALL, 3 * 2, 2 * 5),
        ({}, 0, 0),
    ],
    ids=["embeddings", "rows", "bias", "all", "nothing"],
)
def test_one_launch_has_programs_for_what_is_wanted_alone(
    device, monkeypatch, wanted, position_programs, row_programs
):
    grids = []
    real_launch = gradient.launch

    def count(kernel: object, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
        grids.append(grid)
        real_launch(kernel, grid, *arguments, **options)

    monkeypatch.setattr(gradient, "launch", count)
    row_at = torch.full((23, 1), -1, dtype=torch.int32, device=device)
    destinations = torch.full((40,), -1, dtype=torch.int32, device=device)
    grad = torch.ones(23, 1, 600, device=device)
    options = dict.fromkeys(ALL, False) | wanted
    gradient_rows(grad, row_at, destinations, torch.float32, **options)
    programs = position_programs + row_programs
    assert grids == ([(programs,)] if programs else [])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize(
    ("shape", "rows"),
    # From programs that only count to ones that count between several that gather each.
    [((8, 1), 0), ((11, 3), 1), ((45, 2), 200), ((16, 1), 200), ((1, 600), 40)],
    ids=str,
)
def test_the_launch_that_gathers_puts_the_text_in_order_by_id(
    device, monkeypatch, shape, rows, counted, dtype
):
    if not counted:
        monkeypatch.setattr(order, "MOST_COUNTED", 0)
    seq_len, batch_size = shape
    num_positions, vocabulary = seq_len * batch_size, 9
    numbers = torch.Generator().manual_seed(num_positions)
    kept = min(rows, num_positions // 2)
    destinations = torch.full((rows,), -1, dtype=torch.int32)
    destinations[:kept] = torch.randperm(num_positions, generator=numbers)[:kept]
    row_at = torch.full((num_positions,), -1, dtype=torch.int32)
    row_at[destinations[:kept].long()] = torch.arange(kept, dtype=torch.int32)
    row_at = row_at.view(shape).to(device)
    # As the ids of [B, S] lie in memory, which have to be copied where B is not 1.
    ids = torch.randint(-2, vocabulary + 2, shape[::-1], generator=numbers).to(device, dtype).t()
    grad = torch.randint(-8, 9, (*shape, 520), generator=numbers).to(device, torch.float32)
    destinations = destinations.to(device)
    found = gradient_rows(
        grad, row_at, destinations, torch.bfloat16,
        embeddings=False, rows=True, bias=True, input_ids=ids, vocabulary=vocabulary,
    )  # fmt: skip
    text = torch.where(row_at < 0, ids, -1).flatten()
    wanted, positions = (text.clamp(-1, vocabulary) if counted else text).sort(stable=True)
    assert torch.equal(found.ids, wanted)
    assert torch.equal(found.order, positions)
    _, *gradients = expected(grad, row_at, destinations, torch.bfloat16)
    assert torch.equal(found.rows, gradients[0])
    assert torch.equal(found.bias, gradients[1])


def test_no_rows_at_all_sum_to_zero(device):
    row_at = torch.full((4, 2), -1, dtype=torch.int32, device=device)
    none = torch.empty(0, dtype=torch.int32, device=device)
    grad = torch.ones(4, 2, 8, device=device)
    embeddings, rows, bias, *_ = gradient_rows(grad, row_at, none, torch.bfloat16, **ALL)
    assert torch.equal(embeddings, grad)
    assert rows.shape == (0, 8)
    assert torch.equal(bias, torch.zeros(8, dtype=torch.bfloat16, device=device))


HIDDEN = 1024


def memory_orders() -> Iterator[tuple[str, Tensor]]:
    """``[S, B, H]`` in every memory order that backward passes bring."""
    memory = torch.zeros(6 * 40, 2 * HIDDEN, dtype=torch.bfloat16)[:, :HIDDEN]
    yield "contiguous", memory.contiguous().view(40, 6, HIDDEN)
    yield "batch first", memory.contiguous().view(6, 40, HIDDEN).transpose(0, 1)
    yield "sliced", memory.unflatten(0, (40, 6))


@pytest.mark.skipif(not ptx.ARCHITECTURE, reason="counts what compiled kernels do: make ptx")
@pytest.mark.parametrize("grad", [pytest.param(g, id=name) for name, g in memory_orders()])
def test_the_gradient_is_read_once_in_whole_vectors(grad):
    from tests.ptx.driver import recorded

    destinations = torch.arange(0, 240, 3, dtype=torch.int32)
    row_at = torch.full((240,), -1, dtype=torch.int32)
    row_at[::3] = torch.arange(80, dtype=torch.int32)
    with recorded() as launches:
        gradient_rows(grad, row_at, destinations, torch.bfloat16, **ALL)
    (launch,) = launches
    vectors = grad.nbytes // (32 * 16)
    assert launch.loads.keys() == {4, 16}  # places, values
    assert launch.loads[16].requests == vectors
    assert launch.stores.keys() == {4, 16}  # the sums of three blocks of rows, and values
    assert launch.stores[4].requests == 3 * HIDDEN // 32
    assert launch.stores[16].requests == vectors + vectors // 3
