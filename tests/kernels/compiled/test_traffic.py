"""What the compiled kernels ask of the caches: whole vectors, and few lines a request.

Slow accesses give the same numbers: only counting them shows that an address lost its alignment or
that a compiler gave the threads of a warp another axis.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from step37_kernels.ops import copy_rows as copy_ops
from step37_kernels.ops import gradient as gradient_ops
from step37_kernels.ops import order as order_ops
from step37_kernels.ops import project
from step37_kernels.ops import table as table_ops
from step37_kernels.pixels.normalize import clip_normalize
from step37_kernels.pixels.ragged import RaggedImages
from step37_kernels.pixels.resize import resize_clip_normalize
from tests import ptx

if ptx.ARCHITECTURE:
    from tests.ptx.driver import recorded
    from tests.ptx.memory import Traffic

pytestmark = pytest.mark.skipif(
    not ptx.ARCHITECTURE, reason="counts what compiled kernels do: make ptx"
)
HIDDEN, WIDTH, ROWS = 1024, 512, 169


def one(launches: list[Traffic], kernel: str) -> Traffic:
    (found,) = (launch for launch in launches if launch.kernel == kernel)
    return found


def gradients() -> Iterator[tuple[str, torch.Tensor]]:
    """``[S, B, H]`` in every memory order that backward passes bring."""
    memory = torch.zeros(6 * 40, 2 * HIDDEN, dtype=torch.bfloat16)[:, :HIDDEN]
    yield "contiguous", memory.contiguous().view(40, 6, HIDDEN)
    yield "batch first", memory.contiguous().view(6, 40, HIDDEN).transpose(0, 1)
    yield "sliced", memory.unflatten(0, (40, 6))


@pytest.mark.parametrize("gradient", [pytest.param(g, id=name) for name, g in gradients()])
def test_gradients_are_copied_in_whole_vectors(gradient):
    numbers = torch.arange(240, dtype=torch.int32)
    vectors = gradient.nbytes // (32 * 16)
    for embeddings in (True, False):
        with recorded() as launches:
            gradient_ops.gradient_rows(
                gradient, numbers - 240, numbers, torch.bfloat16,
                embeddings=embeddings, rows=not embeddings, bias=False,
            )  # fmt: skip
        launch = one(launches, "gradient_rows_kernel")
        assert launch.loads.keys() == {4, 16}  # places, values
        assert launch.loads[16].requests == vectors
        assert launch.stores.keys() == {16}
        assert launch.stores[16].requests == vectors


@pytest.mark.parametrize("tensors", [1, 4])
def test_features_are_packed_in_whole_vectors_or_along_their_rows(tensors):
    sliced = torch.zeros(3, ROWS, 2 * WIDTH, dtype=torch.bfloat16)[..., :WIDTH]
    channels_first = torch.zeros(3, WIDTH, ROWS, dtype=torch.bfloat16).transpose(1, 2)
    for features in (sliced, channels_first):
        with recorded() as launches:
            copy_ops.copy_rows([features] * tensors)
        launch = one(launches, "copy_rows_kernel")
        assert launch.stores.keys() == {16}
        if features is sliced:
            assert launch.loads.keys() == {16}
        else:  # 32 neighbours are 64 bytes, wherever they begin
            assert launch.loads.keys() == {2}
            assert launch.loads[2].lines <= 1.6 * launch.loads[2].requests


@pytest.mark.parametrize("text", [pytest.param(t, id=name) for name, t in gradients()])
def test_text_rows_are_copied_in_whole_vectors_and_no_others_are_read(text):
    row_at = torch.full((40, 6), -1, dtype=torch.int32)
    row_at[5:30, 2] = torch.arange(25, dtype=torch.int32)
    # fp32, which the library multiplies: the launch only places rows.
    x, weight = torch.zeros(25, 8), torch.zeros(HIDDEN, 8)
    with recorded() as launches:
        project.project_insert(text, [x], weight, None, row_at[5:30, 2].contiguous(), row_at)
    launch = one(launches, "place_rows_kernel")
    assert launch.loads.keys() == {4, 16}  # places, rows of text and of features
    assert launch.loads[16].requests == (text.nbytes - 25 * HIDDEN * 2 + 25 * HIDDEN * 4) // (
        32 * 16
    )
    assert launch.stores.keys() == {16}
    assert launch.stores[16].requests == text.nbytes // (32 * 16)


def test_pictures_are_normalised_with_each_line_asked_for_once_a_channel():
    pictures = torch.zeros(1, 64, 728, 3, dtype=torch.uint8)
    with recorded() as launches:
        out = clip_normalize(pictures, impl="triton")
    launch = one(launches, "normalize_kernel")
    assert launch.loads.keys() == {4}
    # 384 bytes a request are three lines, or four where memory does not begin with a line.
    assert launch.loads[4].lines <= 4.1 * pictures.nbytes / 128
    assert launch.stores.keys() == {16}
    assert launch.stores[16].requests <= 1.05 * out.nbytes / 512


def test_the_warps_of_a_resize_read_neighbours_and_write_vectors():
    height, width = 375, 500
    images = RaggedImages(
        data=torch.zeros(height * width * 3, dtype=torch.uint8),
        offsets=[0],
        shapes=[(height, width)],
    )
    with recorded() as launches:
        out = resize_clip_normalize(images, 728, impl="triton")
    first, second = launches
    assert first.kernel == second.kernel == "resize_pass_kernel"
    # 32 results of one row lie over 66 bytes.
    assert first.loads[1].lines <= 1.6 * first.loads[1].requests
    assert first.stores.keys() == {1}
    assert first.stores[1].lines <= 1.1 * first.stores[1].requests
    assert 1 not in second.loads
    assert second.stores.keys() == {16}
    assert second.stores[16].requests <= 1.1 * out.nbytes / 512


def test_a_row_of_the_table_is_read_once_and_a_row_of_main_grad_read_and_written_once():
    ids = torch.arange(48, dtype=torch.int32).repeat_interleave(5)  # 48 words, five times each
    table = torch.zeros(64, HIDDEN, dtype=torch.bfloat16)
    row_at = torch.full((40, 6), -1, dtype=torch.int32)
    row_at[5:30, 2] = torch.arange(25, dtype=torch.int32)
    x, weight = torch.zeros(25, 8), torch.zeros(HIDDEN, 8)
    with recorded() as launches:
        project.project_insert(
            table,
            [x],
            weight,
            None,
            row_at[5:30, 2].contiguous(),
            row_at,
            input_ids=ids.view(40, 6),
        )
    launch = one(launches, "place_rows_kernel")
    text, vectors = 240 - 25, 32 * 16
    assert launch.loads[16].requests == (text * HIDDEN * 2 + 25 * HIDDEN * 4) // vectors
    gradient = torch.zeros(40, 6, HIDDEN, dtype=torch.bfloat16)
    main_grad = torch.zeros(64, HIDDEN)
    with recorded() as launches:
        table_ops.put_table_gradient(gradient, ids, torch.arange(240), main_grad, add=True)
    added, joined = (
        one(launches, kernel) for kernel in ("sum_segments_kernel", "join_segments_kernel")
    )
    # Blocks are 16 positions: of the 14 boundaries between them, 2 are between words as well.
    spanning = 12
    rows = 240 * HIDDEN * 2 + (48 - spanning) * HIDDEN * 4
    assert added.loads[16].requests == rows // vectors
    assert added.stores.keys() == {16}
    assert added.stores[16].requests == (48 - spanning + 2 * spanning) * HIDDEN * 4 // vectors
    assert sum(size * kind.requests for size, kind in joined.stores.items()) * 32 == (
        spanning * HIDDEN * 4
    )


@pytest.mark.parametrize("num_positions", [240, 600])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_every_program_that_counts_reads_all_ids_once_and_writes_those_of_its_block(
    dtype, num_positions
):
    ids = torch.arange(num_positions, dtype=dtype).view(-1, 1) % 7
    row_at = torch.full((num_positions, 1), -1, dtype=torch.int32)
    row_at[3:9, 0] = torch.arange(6, dtype=torch.int32)
    gradient = torch.zeros(num_positions, 1, HIDDEN, dtype=torch.bfloat16)
    with recorded() as launches:
        counted = gradient_ops.gradient_rows(
            gradient, row_at, row_at[:0, 0], torch.bfloat16,
            embeddings=False, rows=False, bias=False, input_ids=ids, vocabulary=7,
        )  # fmt: skip
        order_ops.order_by_id(ids, 7)
    ids[3:9] = -1
    wanted, positions = ids.flatten().sort(stable=True)
    assert torch.equal(counted.ids, wanted)
    assert torch.equal(counted.order, positions)
    programs = num_positions // order_ops.COUNT_BLOCK
    # All ids, 32 a request; of its own eight, each of four warps asks for one after the other to
    # compare them, and for all at once to store them.
    reads = programs * (-(-num_positions // 32) + 4 * (order_ops.COUNT_BLOCK + 1))
    for launch, with_row_at in zip(launches, (True, False), strict=True):
        requests = {size: kind.requests for size, kind in launch.loads.items()}
        if dtype == torch.int64:
            assert requests == ({8: reads, 4: reads} if with_row_at else {8: reads})
        else:
            assert requests == {4: reads + with_row_at * reads}
        written = {size: kind.requests for size, kind in launch.stores.items()}
        both = {8: 2 * programs} if dtype == torch.int64 else {8: programs, 4: programs}
        assert written == both  # ids, and int64 positions
