"""Whatever the tile table says, the insert is right: every kind of tile on the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from step37_kernels import plan_insert, reference
from step37_kernels.insert import contiguous_rows
from step37_kernels.ops import pack, project, tiles
from step37_kernels.ops.common import INTERPRETED
from step37_kernels.ops.tiles import Tile
from step37_kernels.testing import deviation, expected, make_insert_case
from tests.kernels.strategies import feature_groups, token_ids

H100 = 132
"""Multiprocessors."""
# Two products and one; a GPU so small that tiles come in waves, and one so large that it splits K.
SIZES = ((48, 32, 32), (16, 32, 32)) if INTERPRETED else ((192, 64, 32), (64, 128, 32))
KINDS = {
    "two products in waves": (Tile(*SIZES[0], 4, 2), 3),
    "two products split": (Tile(*SIZES[0], 4, 2), H100),
    "one product in waves": (Tile(*SIZES[1], 4, 2), 4),
    "one product split": (Tile(*SIZES[1], 4, 2), H100),
    "library": (tiles.LIBRARY, H100),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
compiled = pytest.mark.skipif(INTERPRETED, reason="tiles of this size are for compiled kernels")


@contextlib.contextmanager
def only(tile: Tile, processors: int) -> Iterator[None]:
    """The only entry of the table, and a GPU of so many multiprocessors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "entry", lambda *_: tile)
        patch.setattr(project, "processors", lambda _: processors)
        yield


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(*(each.contiguous().view(torch.uint8) for each in (one, other)))


def in_memory_order(text: Tensor, order: str) -> Tensor:
    """``[S, B, H]`` with the same values, laid out as embeddings may come."""
    if order == "batch first":
        return text.transpose(0, 1).contiguous().transpose(0, 1)
    if order == "sliced":
        return torch.cat([text, text], dim=2)[..., : text.shape[2]]
    if order == "hidden first":
        return text.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    return text


@every_kind
@settings(max_examples=max(12, settings.default.max_examples // 2))
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
            "layout": st.sampled_from(["contiguous", "channels-first"]),
            "dtype": st.sampled_from([torch.bfloat16, torch.float16]),
            "embedding_dtype": st.sampled_from([None, torch.float32, torch.bfloat16]),
        }
    ),
    order=st.sampled_from(["contiguous", "batch first", "sliced", "hidden first"]),
    part=st.sampled_from([None, 0, 1]),
)
def test_every_kind_of_tile_writes_each_row_of_the_reference_once(
    device, kind, arguments, order, part
):
    case = make_insert_case(**arguments, device=device)
    some = [each.detach() for each in case.features if each.shape[:2].numel()]
    if not some:
        return
    sources = contiguous_rows(some)
    plan = plan_insert(case.input_ids, case.plan_groups, impl="torch")
    positions = torch.arange(case.embeddings.shape[0], device=device)
    if part is not None:  # a rank that holds every other row of the sequence
        positions = positions[part::2]
        plan = plan.shard(positions)
        sources = [torch.cat(sources)[plan.local_rows.clamp_min(0)]]
    text = in_memory_order(case.embeddings.detach()[positions], order)
    inputs = [text, *sources, plan.destinations, plan.row_at]
    if not (text.numel() and len(plan.destinations)):
        return
    before = [each.clone() for each in inputs]

    def insert() -> Tensor:
        with only(*kind):
            return project.project_insert(
                text,
                sources,
                case.weight.detach(),
                None if case.bias is None else case.bias.detach(),
                plan.destinations,
                plan.row_at,
                plan.live_rows,
            )

    output = insert()
    assert output.is_contiguous()
    assert output.dtype == case.embeddings.dtype
    # New memory is poisoned with NaN here: a row that nobody wrote is infinitely far off.
    wanted, where = expected(case), positions.cpu()
    _, share = deviation(output, wanted.output[where], wanted.output_bound[where])
    assert share <= 1
    assert torch.equal(output[plan.row_at < 0], text[plan.row_at < 0])
    assert all(map(same_bits, inputs, before))
    assert same_bits(insert(), output)


def whole_numbers(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """So small that every sum is exact, in whatever order it is taken."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).to(dtype).to(device)


def exact_insert(  # noqa: PLR0913 - every number that the tests below vary
    device: str,
    counts: list[int],
    *,
    hidden: int,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    together: bool = False,
    shard: bool = False,
    after_plan: bool = False,
) -> None:
    """Insert pictures of so many rows one after another, each a source of its own or all together
    one; the next one, or the end, cuts some off. Every number is as exact arithmetic gives it."""
    token, starts = 7, [3]
    for count in counts:
        starts.append(starts[-1] + max(2, count - 5))
    seq_len = starts.pop()
    ids = torch.zeros(1, seq_len, dtype=torch.int64)
    ids[0, starts] = token
    ids = ids.to(device)
    plan = plan_insert(ids, [(token, counts)], impl="triton" if after_plan else "torch")
    sources = [
        whole_numbers(count, width, dtype=dtype, device=device, seed=i)
        for i, count in enumerate(counts)
    ]
    if together:
        sources = [torch.cat(sources)]
    positions = torch.arange(seq_len, device=device)
    if shard:
        positions = positions[: seq_len // 2]
        plan = plan.shard(positions)
        sources = [torch.cat(sources)[plan.local_rows.clamp_min(0)]]
    weight = whole_numbers(hidden, width, dtype=dtype, device=device, seed=100)
    offset = whole_numbers(hidden, dtype=dtype, device=device, seed=101) if bias else None
    text = whole_numbers(len(positions), 1, hidden, dtype=torch.float32, device=device)
    output = project.project_insert(
        text, sources, weight, offset, plan.destinations, plan.row_at, plan.live_rows,
        after_plan=after_plan,
    )  # fmt: skip
    exact = reference.project_and_insert(
        text.double(),
        torch.cat(sources).double(),
        weight.double(),
        None if offset is None else offset.double(),
        plan,
    )
    assert (plan.destinations < 0).any()
    assert torch.equal(output, exact.to(dtype).where((plan.row_at >= 0)[..., None], exact).float())


@compiled
@pytest.mark.parametrize("pictures", range(1, 17))
def test_every_entry_of_the_table_multiplies_exactly(device, pictures, monkeypatch):
    """In the waves that it has on an H100 at H = 4096, with one column of tiles instead of all."""
    tile = tiles.entry(169 * pictures, torch.bfloat16, tiles._capability(torch.device(device)))
    hidden = tile.block_n - 24
    monkeypatch.setattr(project, "processors", lambda _: H100 * tile.block_n // 4096)
    counts = [169] * pictures
    exact_insert(device, counts, hidden=hidden, width=200, bias=pictures % 2 == 0, together=True)


@compiled
@pytest.mark.parametrize("tile", dict.fromkeys(t for _, t in tiles._HOPPER), ids=str)
@pytest.mark.parametrize(
    ("counts", "shard", "after_plan"),
    [
        ([81, 5, 169, 30], False, True),
        ([200, 3, 40], True, True),
        ([169, 81], False, False),
        ([100], False, True),
    ],
    ids=["four sources behind the plan", "a shard behind the plan", "two sources", "one"],
)
def test_every_tile_takes_several_sources_shards_and_a_plan_in_the_making(
    device, tile, counts, shard, after_plan, monkeypatch
):
    if tiles._capability(torch.device(device)) < 90:
        pytest.skip("tiles of Hopper")
    monkeypatch.setattr(tiles, "entry", lambda *_: tile)
    for processors, bias in ((2, False), (H100, True)):
        monkeypatch.setattr(project, "processors", lambda _, found=processors: found)
        exact_insert(
            device, counts, hidden=tile.block_n + 40, width=136, dtype=torch.float16, bias=bias,
            shard=shard, after_plan=after_plan,
        )  # fmt: skip


def test_the_copy_engine_is_asked_only_for_what_it_can_read(device):
    memory = torch.zeros(4 * 64 + 1, dtype=torch.bfloat16, device=device)
    aligned, shifted = memory[:256].view(4, 64), memory[1:257].view(4, 64)
    narrow = memory[:144].view(4, 36)
    with only(*KINDS["one product split"]):
        assert not tiles.insert_tile([aligned, aligned], aligned).library
        for odd in (shifted, narrow):
            assert tiles.insert_tile([aligned, odd], aligned).library
            assert tiles.insert_tile([aligned], odd).library


def test_the_only_row_of_a_wider_matrix_is_a_matrix_of_its_own(device):
    row = torch.ones(2, 100, dtype=torch.bfloat16, device=device)[:1, :96]
    assert row.is_contiguous()  # whatever its stride, which is no multiple of 16 bytes
    places = torch.tensor([1], dtype=torch.int32, device=device)
    row_at = torch.tensor([[-1], [0]], dtype=torch.int32, device=device)
    text, weight = row.new_zeros(2, 1, 64), row.new_ones(64, 96)
    with only(*KINDS["one product split"]):
        output = project.project_insert(text, [row], weight, None, places, row_at)
    assert output.flatten(1).eq(torch.tensor([[0.0], [96.0]], device=device)).all()


def test_tiles_past_the_live_rows_are_not_computed(device):
    for tile, processors in KINDS.values():
        if tile.library:
            continue
        rows, live = 5 * tile.block_m, tile.block_m + 1
        x = torch.ones(rows, 64, dtype=torch.bfloat16, device=device)
        everywhere = torch.arange(rows, dtype=torch.int32, device=device)
        live_rows = torch.tensor([live], dtype=torch.int32, device=device)
        text = x.new_zeros(rows, 1, 64)
        with only(tile, processors):
            out = project.project_insert(
                text, [x], torch.eye(64, out=x.new_empty(64, 64)), None,
                everywhere, everywhere.view(rows, 1), live_rows,
            )  # fmt: skip
        assert out[:live].eq(1).all()
        if processors < H100:
            # New memory is poisoned with NaN here: nobody wrote those.
            assert out[2 * tile.block_m :].isnan().all()


def features(kind: str, n: int, rows: int, width: int) -> Tensor:
    """``[N, L, C]`` of different numbers."""
    shape = {
        "contiguous": (n, rows, width),
        "channels-first": (n, width, rows),
        "sliced": (n, rows, 2 * width),
        "rows first": (rows, n, width),
        "backwards": (width, rows, n),
    }[kind]
    values = torch.randn(shape, generator=torch.Generator().manual_seed(n * rows)).bfloat16()
    if kind == "channels-first":
        return values.transpose(1, 2)
    if kind == "sliced":
        return values[..., :width]
    return {"rows first": values.transpose(0, 1), "backwards": values.permute(2, 1, 0)}.get(
        kind, values
    )


@given(
    kinds=st.lists(
        st.tuples(
            st.sampled_from(["contiguous", "channels-first", "sliced", "rows first", "backwards"]),
            st.integers(1, 3),
            st.sampled_from([1, 5, 70]),
        ),
        min_size=1,
        max_size=9,
    ),
    width=st.sampled_from([8, 36, 72]),
)
def test_rows_are_made_contiguous_in_few_launches_and_only_where_they_are_not(device, kinds, width):
    some = [features(*kind, width).to(device) for kind in kinds]
    launched = []
    with pytest.MonkeyPatch.context() as patch:
        real = pack.launch
        patch.setattr(pack, "launch", lambda *a, **k: launched.append(a[0]) or real(*a, **k))
        sources = contiguous_rows(some)
    assert len(sources) <= project.MAX_SOURCES
    assert all(source.is_contiguous() for source in sources)
    assert torch.equal(torch.cat(sources), torch.cat([each.flatten(0, 1) for each in some]))
    if len(some) > project.MAX_SOURCES:
        assert len(launched) == -(-len(some) // project.MAX_SOURCES)
    else:
        assert len(launched) == any(not each.is_contiguous() for each in some)
        for each, source in zip(some, sources, strict=True):
            assert not each.is_contiguous() or source.data_ptr() == each.data_ptr()


@given(
    tile=st.sampled_from([tile for _, tile in tiles._HOPPER]),
    counts=st.lists(st.integers(1, 9000), min_size=1, max_size=4),
    hidden=st.integers(1, 9000),
    width=st.integers(1, 9000),
    processors=st.integers(1, 200),
)
def test_a_wave_is_split_as_far_as_it_fits(tile, counts, hidden, width, processors):
    plan = tiles.schedule(tile, counts, hidden, width, processors)
    columns = -(-hidden // tile.block_n)
    assert plan.whole + plan.tail == sum(-(-n // tile.block_m) for n in counts) * columns
    assert 1 <= plan.parts <= min(tiles.MAX_PARTS, -(-width // tile.block_k))
    assert plan.tail * plan.parts <= processors
    assert (plan.tail == 0) == (plan.parts == 1)
    if plan.parts > 1:
        assert plan.whole % processors == 0


def test_the_table_has_the_waves_that_its_comments_say():
    def waves(pictures: int) -> tuple[int, int, int]:
        tile = tiles.entry(169 * pictures, torch.bfloat16, 90)
        plan = tiles.schedule(tile, [169 * pictures], 4096, 6144, H100)
        return plan.whole, plan.tail, plan.parts

    assert [waves(pictures) for pictures in (*range(1, 17), 39)] == [
        *[(0, 32, 4), (0, 32, 4), (0, 64, 2), (0, 64, 2), (112, 0, 1), (128, 0, 1)],
        *[(132, 28, 4), (128, 0, 1), (128, 0, 1), (132, 12, 8), (132, 28, 4), (256, 0, 1)],
        *[(132, 60, 2), (264, 40, 3), (264, 56, 2), (240, 0, 1), (528, 32, 4)],
    ]


def test_nobody_tuned_tiles_for_other_chips_and_fp32():
    for rows in (1, 169, 10**6):
        assert not tiles.entry(rows, torch.float16, 90).library
        assert tiles.entry(rows, torch.float32, 90).library
        for capability in (80, 89, 94, 100, 120):
            assert tiles.entry(rows, torch.bfloat16, capability).library
    assert str(tiles.LIBRARY) == "library"
