"""A pack is its samples shifted by one and put end to end, whatever their number and lengths."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from step37_data.pack_transform import get_position_id_from_cu_seqlens, pack_samples
from step37_data.template import MultimodalSFTSample


def make_sample(tokens: list[int], mask: list[float], images: list[tuple[str, int]]) -> Any:
    return MultimodalSFTSample(
        tokens=torch.tensor(tokens, dtype=torch.long),
        loss_mask=torch.tensor(mask, dtype=torch.float32),
        image_paths=images,
    )


@st.composite
def samples(draw: st.DrawFn) -> list[Any]:
    made = []
    for number in range(draw(st.integers(1, 5))):
        tokens = draw(st.lists(st.integers(1, 99), min_size=1, max_size=12))
        mask = draw(
            st.lists(st.sampled_from([0.0, 1.0]), min_size=len(tokens), max_size=len(tokens))
        )
        images = [(f"{number}-{k}.jpg", k % 2) for k in range(draw(st.integers(0, 3)))]
        made.append(make_sample(tokens, mask, images))
    return made


def packed_slowly(pieces: list[Any], divisor: int) -> dict[str, list[Any]]:
    out: dict[str, list[Any]] = {
        "tokens": [], "labels": [], "loss_masks": [], "cu_seqlens": [0], "position_id": [],
        "image_paths": [],
    }  # fmt: skip
    rows = [(p["tokens"].tolist(), p["loss_mask"].tolist(), p["image_paths"]) for p in pieces]
    total = sum(len(tokens) - 1 for tokens, _, _ in rows)
    missing = (divisor - total % divisor) % divisor
    if missing:
        rows.append(([0] * (missing + 1), [0.0] * (missing + 1), []))
    for tokens, mask, images in rows:
        for place in range(len(tokens) - 1):
            out["tokens"].append(tokens[place])
            out["labels"].append(tokens[place + 1])
            out["loss_masks"].append(mask[place + 1])
            out["position_id"].append(place)
        out["cu_seqlens"].append(len(out["tokens"]))
        out["image_paths"] += images
    out["max_seq_len"] = [max(len(tokens) - 1 for tokens, _, _ in rows)]
    return out


@given(pieces=samples(), divisor=st.sampled_from([1, 2, 7, 64]))
def test_a_pack_equals_the_samples_shifted_by_one_and_padded(
    pieces: list[Any], divisor: int
) -> None:
    packed = pack_samples(pieces, seqlen_divisible_by=divisor)
    expected = packed_slowly(pieces, divisor)
    assert set(packed) == set(expected)
    for key in ("tokens", "labels", "loss_masks", "cu_seqlens", "position_id"):
        assert packed[key].tolist() == expected[key], key
    assert packed["image_paths"] == expected["image_paths"]
    assert [int(packed["max_seq_len"])] == expected["max_seq_len"]
    assert len(packed["tokens"]) % divisor == 0


@given(pieces=samples())
def test_no_token_is_lost_or_doubled_and_each_lands_in_its_own_sub_sequence(
    pieces: list[Any],
) -> None:
    packed = pack_samples(pieces, seqlen_divisible_by=8)
    bounds = packed["cu_seqlens"].tolist()
    for number, piece in enumerate(pieces):
        span = slice(bounds[number], bounds[number + 1])
        assert torch.equal(packed["tokens"][span], piece["tokens"][:-1])
        assert torch.equal(packed["labels"][span], piece["tokens"][1:])
        assert torch.equal(packed["loss_masks"][span], piece["loss_mask"][1:])
    padding = slice(bounds[len(pieces)], None)
    assert not packed["tokens"][padding].any()
    assert not packed["loss_masks"][padding].any()


def test_the_divisor_is_64_unless_given() -> None:
    packed = pack_samples([make_sample([1, 2, 3], [1.0] * 3, [])])
    assert packed["tokens"].shape == (64,)
    assert packed["cu_seqlens"].tolist() == [0, 2, 64]


def test_dtypes_are_int64_with_int32_cu_seqlens() -> None:
    narrow = {
        "tokens": torch.tensor([1, 2, 3], dtype=torch.int32),
        "loss_mask": torch.tensor([True, True, False]),
    }
    packed = pack_samples([narrow])
    assert packed["tokens"].dtype == packed["labels"].dtype == torch.int64
    assert packed["position_id"].dtype == packed["max_seq_len"].dtype == torch.int64
    assert packed["cu_seqlens"].dtype == torch.int32
    assert packed["loss_masks"].dtype == torch.float32


@pytest.mark.slow
def test_bounds_stay_exact_where_float32_would_round_them() -> None:
    # Bytes for tokens and mask: the sample is only long, not large.
    long = torch.ones(2**24 + 2, dtype=torch.uint8)
    piece = {"tokens": long, "loss_mask": long, "image_paths": []}
    packed = pack_samples([piece, make_sample([1, 2], [0.0, 0.0], [])], seqlen_divisible_by=1)
    assert packed["cu_seqlens"].tolist() == [0, 2**24 + 1, 2**24 + 2]


def test_packing_leaves_its_input_as_it_was() -> None:
    pieces = [make_sample([1, 2, 3], [0.0, 1.0, 1.0], [("a.jpg", 0)])]
    before = copy.deepcopy(pieces)
    first = pack_samples(pieces)
    second = pack_samples(pieces)
    assert len(pieces) == 1
    assert torch.equal(pieces[0]["tokens"], before[0]["tokens"])
    assert first["cu_seqlens"].tolist() == second["cu_seqlens"].tolist() == [0, 2, 64]


def test_a_padding_token_that_marks_an_image_is_refused() -> None:
    piece = make_sample([1, 2, 3], [0.0] * 3, [])
    with pytest.raises(ValueError, match="pad_token_id: 0 marks an image or crop"):
        pack_samples([piece], start_token_ids=(0, 5))
    other = pack_samples([piece], start_token_ids=(0, 5), pad_token_id=9)
    assert other["tokens"][2:].unique().tolist() == [9]
    assert not other["loss_masks"].any()
    # Without padding there is nothing to mistake.
    pack_samples([piece], start_token_ids=(0, 5), seqlen_divisible_by=2)


def test_a_sample_cut_inside_an_image_is_refused_where_the_rows_of_images_are_known() -> None:
    # Token 7 marks an image of three rows, token 8 a crop of two.
    rows = {7: 3, 8: 2}
    whole = [[1, 7, 4, 4, 4, 5, 8, 4, 4, 5], [7, 4, 4, 4, 5], [8, 4, 4, 9], [1, 2], [1], []]
    for tokens in whole:
        files = [("a.jpg", 0)] * sum(token in rows for token in tokens)
        pack_samples([make_sample(tokens, [0.0] * len(tokens), files)] * 2, start_token_ids=rows)
    good = make_sample([1, 2, 3], [0.0] * 3, [])
    for tokens, message in (
        ([1, 7, 4, 4, 4], "token 7 at position 1 marks an image of 3 rows, and 2 are left"),
        ([1, 7, 4], "token 7 at position 1 marks an image of 3 rows, and 0 are left"),
        # The last token is only a label, but its image is in image_paths.
        ([1, 2, 7], "token 7 at position 2 marks an image of 3 rows, and 0 are left"),
        ([7, 4, 4, 4, 8, 4, 4], "token 8 at position 4 marks an image of 2 rows, and 1 are left"),
    ):
        cut = make_sample(tokens, [0.0] * len(tokens), [("a.jpg", 0)])
        with pytest.raises(ValueError, match=rf"pieces\[1\]: {message}"):
            pack_samples([good, cut], start_token_ids=rows)
        # Without the number of rows there is nothing to compare.
        pack_samples([good, cut], start_token_ids=rows.keys())


@pytest.mark.parametrize(("tokens", "files"), [([1, 2, 3], 1), ([7, 4, 5], 0), ([7, 4, 5], 2)])
def test_a_sample_whose_images_and_files_differ_in_number_is_refused(tokens, files) -> None:
    good = make_sample([1, 7, 4, 5], [0.0] * 4, [("a.jpg", 0)])
    other = make_sample(tokens, [0.0] * len(tokens), [("b.jpg", 0)] * files)
    message = rf"pieces\[1\]: {files} image_paths for {tokens.count(7)} of the start tokens \[7\]"
    with pytest.raises(ValueError, match=message):
        pack_samples([good, other], start_token_ids={7: 1})
    pack_samples([good, other], start_token_ids=[7])


@pytest.mark.parametrize("tokens", [[1.9, 2.9], [float("nan"), 2.0]])
def test_tokens_that_are_no_integers_are_refused_not_cut_short(tokens: list[float]) -> None:
    piece = {"tokens": torch.tensor(tokens), "loss_mask": torch.ones(2)}
    with pytest.raises(ValueError, match=r"pieces\[1\]: expected integer tokens, got torch"):
        pack_samples([make_sample([1, 2], [0.0] * 2, []), piece])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int8])
def test_a_loss_mask_may_have_any_dtype_and_a_gradient(dtype: torch.dtype) -> None:
    mask = torch.tensor([1, 0, 1], dtype=dtype, requires_grad=dtype.is_floating_point)
    packed = pack_samples([{"tokens": [1, 2, 3], "loss_mask": mask}], seqlen_divisible_by=1)
    assert packed["loss_masks"].dtype == torch.float32
    assert packed["loss_masks"].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("paths", [None, "a.jpg"])
def test_image_paths_that_are_no_list_are_refused(paths: Any) -> None:
    piece = {"tokens": [1, 2], "loss_mask": [1, 1], "image_paths": paths}
    with pytest.raises(ValueError, match=r"pieces\[0\]: expected image_paths to be a list, got "):
        pack_samples([piece])


def test_wrong_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="pieces: expected at least one sample, got none"):
        pack_samples([])
    with pytest.raises(ValueError, match=r"pieces\[0\].*got shapes \[3\] and \[2\]"):
        pack_samples([make_sample([1, 2, 3], [0.0, 1.0], [])])
    with pytest.raises(ValueError, match="seqlen_divisible_by: expected at least 1, got 0"):
        pack_samples([make_sample([1, 2], [0.0, 1.0], [])], seqlen_divisible_by=0)


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_position_ids_count_from_zero_in_every_sub_sequence(sizes: list[int]) -> None:
    bounds = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    expected = [place for size in sizes for place in range(size)]
    positions = get_position_id_from_cu_seqlens(bounds)
    assert positions.dtype == torch.int64
    assert positions.tolist() == expected


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([2, 5], r"rise from 0, got \[2 5\]"),
        ([-2, 3], r"rise from 0, got \[-2 +3\]"),
        ([0, 5, 3], r"rise from 0, got \[0 5 3\]"),
        ([], r"rise from 0, got \[\]"),
        ([[0, 3, 5]], r"rise from 0, got \[\[0 3 5\]\]"),
    ],
)
def test_bounds_that_do_not_rise_from_0_are_refused(bounds: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"cu_seqlens: expected \[n \+ 1\] bounds that {message}"):
        get_position_id_from_cu_seqlens(torch.tensor(bounds, dtype=torch.int32))


def test_the_length_of_a_sample_is_its_tokens_less_one_and_never_negative() -> None:
    assert len(make_sample([1, 2, 3], [0.0] * 3, [])) == 2
    assert len(make_sample([1], [0.0], [])) == 0
    assert len(make_sample([], [], [])) == 0
    assert len(pack_samples([make_sample([], [], []), make_sample([1, 2], [0.0] * 2, [])],
                            seqlen_divisible_by=1)["tokens"]) == 1  # fmt: skip


def test_tokens_of_two_dimensions_are_refused() -> None:
    piece = {"tokens": torch.ones(2, 3, dtype=torch.int64), "loss_mask": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=r"pieces\[0\]: expected tokens and loss_mask of one"):
        pack_samples([piece])
