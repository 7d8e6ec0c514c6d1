"""Media are cut where PyTorch's schedules cut `input_ids`, by the counts of the samples."""

from __future__ import annotations

import logging
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining.microbatch import split_args_kwargs_into_chunks

from step37_data import pp_media
from step37_data.pp_media import (
    VLM_PP_MEDIA_KEY,
    chunk_step3_media,
    chunk_vlm_media,
    prepare_vlm_media_for_pp,
    wrap_vlm_collate_for_pp,
)

counts_per_sample = st.lists(st.integers(0, 3), min_size=1, max_size=12)


def samples_of_microbatches(batch_size: int, n_microbatches: int) -> list[list[int]]:
    """Cut sample numbers as a schedule does; it refuses fewer samples than microbatches."""
    samples = torch.arange(batch_size)
    if batch_size < n_microbatches:
        return [chunk.tolist() for chunk in torch.tensor_split(samples, n_microbatches)]
    args, _ = split_args_kwargs_into_chunks((samples,), None, n_microbatches)
    return [chunk.tolist() for (chunk,) in args]


def owners(counts: list[int]) -> torch.Tensor:
    """Return the sample that each counted thing belongs to."""
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def assert_owned(chunks: list[torch.Tensor], n_microbatches: int, counts: list[int]) -> None:
    """Each chunk must hold exactly the rows of its microbatch's samples, in their order."""
    expected = [
        [sample for sample in samples for _ in range(counts[sample])]
        for samples in samples_of_microbatches(len(counts), n_microbatches)
    ]
    assert [chunk.flatten(1)[:, 0].tolist() for chunk in chunks] == expected


def marked(owner: torch.Tensor, *shape: int) -> torch.Tensor:
    """Return `[len(owner), *shape]` with every row filled with its owner."""
    return owner.reshape(-1, *(1 for _ in shape)).expand(len(owner), *shape).float()


@given(counts=counts_per_sample, n_microbatches=st.integers(1, 14), data=st.data())
def test_images_grids_and_patches_go_with_their_samples(
    counts: list[int], n_microbatches: int, data: st.DataObject
) -> None:
    n_images = sum(counts)
    owner = owners(counts)
    sides = st.lists(st.integers(1, 3), min_size=2, max_size=3)
    ndim = data.draw(st.integers(2, 3), label="grid columns")
    grid = torch.tensor(
        [(data.draw(sides) * 2)[:ndim] for _ in range(n_images)], dtype=torch.long
    ).reshape(n_images, ndim)
    patches_of_image = grid.prod(dim=1)
    layout = data.draw(st.sampled_from(["images", "padded", "patches", "list"]), label="layout")
    pixels: torch.Tensor | list[torch.Tensor]
    if layout == "images":
        pixels = marked(owner, 3, 4, 4)
    elif layout == "padded":
        pixels = marked(owner, 9, 5)
    elif layout == "patches":
        pixels = marked(torch.repeat_interleave(owner, patches_of_image), 5)
    else:
        pixels = [
            torch.full((int(n), 5), int(o)) for o, n in zip(owner, patches_of_image, strict=True)
        ]
    passed = data.draw(st.sampled_from([counts, tuple(counts), torch.tensor(counts)]))

    chunks, grids = chunk_vlm_media(
        pixels, grid, len(counts), n_microbatches, n_images_per_sample=passed
    )

    assert grids is not None
    assert torch.equal(torch.cat(grids), grid)
    images = [
        sum(counts[sample] for sample in samples)
        for samples in samples_of_microbatches(len(counts), n_microbatches)
    ]
    assert [len(chunk) for chunk in grids] == images
    if isinstance(pixels, list):
        assert [id(t) for chunk in chunks for t in chunk] == [id(t) for t in pixels]
        assert [len(chunk) for chunk in chunks] == images
        return
    assert torch.equal(torch.cat(chunks), pixels)
    per_sample = counts
    if layout == "patches":
        per_sample = [int(patches_of_image[owner == i].sum()) for i in range(len(counts))]
    assert_owned(chunks, n_microbatches, per_sample)


@given(counts=counts_per_sample, n_microbatches=st.integers(1, 14), data=st.data())
def test_crops_and_their_marks_go_with_their_samples(
    counts: list[int], n_microbatches: int, data: st.DataObject
) -> None:
    owner = owners(counts)
    full = marked(torch.arange(len(counts)), 3, 4, 4)
    crops = marked(owner, 3, 2, 2)
    mask = owner % 2 == 0
    passed = data.draw(st.sampled_from([counts, torch.tensor(counts, dtype=torch.int32)]))
    flat = data.draw(st.booleans())
    cut = {"batch_size": len(counts), "n_microbatches": n_microbatches, "num_patches": passed}
    if flat:
        chunks = chunk_step3_media(crops, **cut, patch_newline_mask=mask)
    else:
        chunks = chunk_step3_media(full, **cut, patch_pixel_values=crops, patch_newline_mask=mask)
        assert_owned(chunks["patch_pixel_values"], n_microbatches, counts)
        assert torch.equal(torch.cat(chunks["patch_pixel_values"]), crops)

    assert torch.equal(torch.cat(chunks["pixel_values"]), crops if flat else full)
    assert_owned(chunks["pixel_values"], n_microbatches, counts if flat else [1] * len(counts))
    assert torch.cat(chunks["num_patches"]).tolist() == counts
    assert {chunk.dtype for chunk in chunks["num_patches"]} == {torch.int64}
    assert [len(chunk) for chunk in chunks["num_patches"]] == [
        len(samples) for samples in samples_of_microbatches(len(counts), n_microbatches)
    ]
    assert torch.equal(torch.cat(chunks["patch_newline_mask"]), mask)
    for numbers, marks in zip(chunks["num_patches"], chunks["patch_newline_mask"], strict=True):
        assert len(marks) == numbers.sum()


@given(counts=counts_per_sample, n_microbatches=st.integers(1, 14), data=st.data())
def test_crops_counted_for_each_of_several_images_stay_with_their_image(
    counts: list[int], n_microbatches: int, data: st.DataObject
) -> None:
    n_images = sum(counts)
    if n_images == len(counts):
        counts = [*counts, 3]
        n_images += 3
    crops_of_image = data.draw(st.lists(st.integers(0, 2), min_size=n_images, max_size=n_images))
    owner = owners(counts)
    crop_owner = torch.repeat_interleave(owner, torch.tensor(crops_of_image, dtype=torch.long))
    chunks = chunk_step3_media(
        marked(owner, 3, 4, 4),
        batch_size=len(counts),
        n_microbatches=n_microbatches,
        num_patches=crops_of_image,
        patch_pixel_values=marked(crop_owner, 3, 2, 2),
        n_images_per_sample=counts,
    )
    assert_owned(chunks["pixel_values"], n_microbatches, counts)
    assert torch.cat(chunks["num_patches"]).tolist() == crops_of_image
    assert [len(n) for n in chunks["num_patches"]] == [len(p) for p in chunks["pixel_values"]]
    assert_owned(
        chunks["patch_pixel_values"],
        n_microbatches,
        [int((crop_owner == sample).sum()) for sample in range(len(counts))],
    )


def test_pictures_of_several_sizes_come_as_a_list_and_are_cut_by_their_counts() -> None:
    pictures = [torch.full((3, side, side), float(side)) for side in (4, 6, 2)]
    batch = {
        "input_ids": torch.zeros(3, 5, dtype=torch.int64),
        "pixel_values": pictures,
        "n_images_per_sample": torch.tensor([1, 0, 2]),
    }
    media = prepare_vlm_media_for_pp(batch, 3, 2)[VLM_PP_MEDIA_KEY]
    assert media["pixel_values"] == [pictures[:1], pictures[1:]]


def test_the_name_of_newer_releases_is_the_same_function() -> None:
    assert pp_media.chunk_patch_mapped_media is pp_media.chunk_step3_media


def test_six_samples_over_four_microbatches_are_two_two_one_one() -> None:
    pixels, grids = chunk_vlm_media(torch.zeros(6, 3, 4, 4), torch.ones(6, 2).long(), 6, 4)
    assert grids is not None
    assert [len(chunk) for chunk in pixels] == [len(chunk) for chunk in grids] == [2, 2, 1, 1]


def test_fewer_samples_than_microbatches_give_chunks_without_rows() -> None:
    chunks = chunk_step3_media(torch.zeros(2, 3, 4, 4), batch_size=2, n_microbatches=4)
    assert [len(chunk) for chunk in chunks["pixel_values"]] == [1, 1, 0, 0]
    assert [chunk.tolist() for chunk in chunks["num_patches"]] == [[0], [0], [], []]


def test_chunks_are_views_of_the_media() -> None:
    pixels = torch.zeros(4, 3, 2, 2)
    chunks, _ = chunk_vlm_media(pixels, None, 4, 3)
    assert {chunk.untyped_storage().data_ptr() for chunk in chunks} == {pixels.data_ptr()}


def test_as_many_images_as_samples_are_still_cut_by_the_counts() -> None:
    pixels = marked(torch.tensor([0, 0, 0, 3]), 3, 4, 4)
    chunks, _ = chunk_vlm_media(
        pixels, torch.ones(4, 2).long(), 4, 2, n_images_per_sample=[3, 0, 0, 1]
    )
    assert [len(chunk) for chunk in chunks] == [3, 1]


def test_as_many_patches_as_samples_are_still_cut_by_the_counts() -> None:
    # Two images of two patches each: four rows, four samples.
    pixels = marked(torch.tensor([1, 1, 2, 2]), 3, 14, 14)
    chunks, _ = chunk_vlm_media(
        pixels, torch.tensor([[1, 2], [2, 1]]), 4, 4, n_images_per_sample=[0, 1, 1, 0]
    )
    assert [len(chunk) for chunk in chunks] == [0, 2, 2, 0]


def test_as_many_flat_crops_as_samples_are_still_cut_by_the_counts() -> None:
    chunks = chunk_step3_media(
        torch.zeros(4, 3, 2, 2), batch_size=4, n_microbatches=2, num_patches=[3, 0, 1, 0]
    )
    assert [len(chunk) for chunk in chunks["pixel_values"]] == [3, 1]


def test_flat_counts_that_fit_samples_and_images_alike_are_those_of_the_samples() -> None:
    chunks = chunk_step3_media(
        torch.zeros(4, 3, 2, 2),
        batch_size=4,
        n_microbatches=2,
        num_patches=[1, 2, 0, 1],
        n_images_per_sample=[2, 1, 1, 0],
    )
    assert [len(chunk) for chunk in chunks["pixel_values"]] == [3, 1]
    assert [chunk.tolist() for chunk in chunks["num_patches"]] == [[1, 2], [0, 1]]


def test_as_many_images_as_crops_beside_the_crops_are_refused_and_not_cut_like_them() -> None:
    # Cut like the crops, sample 0 would get the images of samples 0 and 1.
    images, crops = torch.zeros(3, 3, 4, 4), torch.zeros(3, 3, 2, 2)
    with pytest.raises(ValueError, match="3 pixel rows are neither 2 images nor 3 crops"):
        chunk_step3_media(
            images, batch_size=2, n_microbatches=2, num_patches=[2, 1], patch_pixel_values=crops
        )


def test_one_image_a_sample_needs_no_counts() -> None:
    grid = torch.tensor([[1, 2], [2, 2], [1, 1]])
    pixels = marked(torch.repeat_interleave(torch.arange(3), grid.prod(1)), 5)
    chunks, _ = chunk_vlm_media(pixels, grid, 3, 2)
    assert [len(chunk) for chunk in chunks] == [6, 1]


@pytest.mark.parametrize(
    ("pixels", "grid", "batch_size", "counts", "reason"),
    [
        ((5, 3, 4, 4), (5, 2), 4, None, r"5 images, .* \(None: one each\) sums to 4"),
        ((5, 3, 4, 4), (5, 2), 4, [2, 1, 1], "has 3 entries, not one a sample"),
        ((4, 3, 4, 4), (4, 2), 4, [2, 1, 0, 0], "4 images, n_images_per_sample .* sums to 3"),
        ((9, 5), (4, 2), 4, None, "9 rows are neither the 4 images nor their patches"),
        ((4, 5), (4, 2), 4, None, "4 rows are neither the 4 images nor their patches"),
        ((3, 3, 4, 4), (4, 2), 4, None, "3 rows are neither"),
    ],
)
def test_media_that_fit_no_layout_are_refused_with_all_shapes(
    *, pixels: tuple, grid: tuple, batch_size: int, counts: list[int] | None, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        chunk_vlm_media(
            torch.zeros(pixels),
            torch.full(grid, 2),
            batch_size,
            2,
            n_images_per_sample=counts,
        )
    for part in (f"pixel_values={pixels}", f"image_grid={grid}", f"batch_size={batch_size}"):
        assert part in str(caught.value)
    assert f"n_images_per_sample={counts}" in str(caught.value)


def test_what_is_refused_shows_the_values_of_counts_and_the_shapes_of_the_rest() -> None:
    with pytest.raises(ValueError, match=r"got .*") as caught:
        chunk_vlm_media(
            torch.zeros(5, 3, 4, 4),
            torch.full((5, 2), 2),
            4,
            2,
            n_images_per_sample=torch.tensor([2, 1, 1, 0]),
        )
    told = str(caught.value)
    assert "n_images_per_sample=(4,) [2, 1, 1, 0]" in told
    assert "image_grid=(5, 2)," in told
    assert "pixel_values=(5, 3, 4, 4)," in told


@pytest.mark.parametrize(
    ("pixels", "patches", "counts", "images", "reason"),
    [
        (4, None, [1, 1, 1, 2], None, "4 pixel rows are neither 4 images nor 5 crops"),
        (4, 3, None, None, "patch_pixel_values has 3 rows, num_patches sums to 0"),
        (4, 3, [1, 1, 1, 1], None, "patch_pixel_values has 3 rows, num_patches sums to 4"),
        (4, 3, [1, 1, 1], None, "num_patches has 3 entries"),
        (3, 3, [1, 1, 1, 0], None, "3 pixel rows are neither 4 images nor 3 crops"),
        (4, 3, [1, 1, 1, 0], [2, 2], "n_images_per_sample has 2 entries"),
        (4, 3, [1, 1, 1, 0], [2, 2, 0, 0], "may count the crops of samples or of images"),
    ],
)
def test_crops_that_fit_no_layout_are_refused_with_all_shapes(
    *,
    pixels: int,
    patches: int | None,
    counts: list[int] | None,
    images: list[int] | None,
    reason: str,
) -> None:
    crops = None if patches is None else torch.zeros(patches, 3, 2, 2)
    with pytest.raises(ValueError, match=reason) as caught:
        chunk_step3_media(
            torch.zeros(pixels, 3, 4, 4),
            batch_size=4,
            n_microbatches=2,
            num_patches=counts,
            patch_pixel_values=crops,
            n_images_per_sample=images,
        )
    shown = None if crops is None else tuple(crops.shape)
    assert f"pixel_values=({pixels}, 3, 4, 4)" in str(caught.value)
    assert f"patch_pixel_values={shown}" in str(caught.value)


@pytest.mark.parametrize(
    "counts", [[1.0, 1], torch.ones(2), torch.tensor([True, True]), [[1], [1]]]
)
def test_counts_that_are_no_integers_are_refused(counts: object) -> None:
    with pytest.raises(ValueError, match=r"num_patches: expected (an integer|integers), got"):
        chunk_step3_media(
            torch.zeros(2, 3, 4, 4), batch_size=2, n_microbatches=2, num_patches=counts
        )


def test_negative_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="n_images_per_sample: expected at least 0, got -1"):
        chunk_vlm_media(torch.zeros(2, 3, 4, 4), None, 2, 2, n_images_per_sample=[3, -1])


@pytest.mark.parametrize("n_microbatches", [0, -1])
def test_no_microbatches_are_refused(n_microbatches: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1, got {n_microbatches}"):
        prepare_vlm_media_for_pp({"pixel_values": torch.zeros(2, 3, 4, 4)}, 2, n_microbatches)
    with pytest.raises(ValueError, match=f"at least 1, got {n_microbatches}"):
        wrap_vlm_collate_for_pp(dict, n_microbatches)


def test_a_prepared_batch_keeps_its_tokens_and_holds_the_media_under_one_key() -> None:
    input_ids = torch.zeros(3, 7)
    batch = {
        "input_ids": input_ids,
        "pixel_values": torch.zeros(6, 5),
        "image_grid_thw": torch.tensor([[1, 1, 2], [1, 2, 2]]),
        "n_images_per_sample": [0, 1, 1],
        "pixel_values_videos": torch.zeros(8, 5),
        "video_grid_thw": torch.tensor([[2, 2, 2]]),
        "n_videos_per_sample": torch.tensor([0, 0, 1]),
        "num_patches": None,
    }
    prepared = prepare_vlm_media_for_pp(batch, 3, 2)
    assert prepared is batch
    assert batch.keys() == {"input_ids", VLM_PP_MEDIA_KEY}
    assert batch["input_ids"] is input_ids
    media = dict(batch[VLM_PP_MEDIA_KEY])
    assert media.pop("pp_media_index").tolist() == [0, 0, 1]
    lengths = {key: [len(c) for c in chunks] for key, chunks in media.items()}
    assert lengths == {
        "pixel_values": [2, 4],
        "image_grid_hws": [1, 1],
        "pixel_values_videos": [0, 8],
        "video_grid_thw": [0, 1],
    }


def test_a_batch_of_text_alone_loses_its_empty_counts_and_gains_nothing() -> None:
    batch = {"input_ids": torch.zeros(2, 7), "n_images_per_sample": [0, 0], "pixel_values": None}
    assert prepare_vlm_media_for_pp(batch, 2, 2).keys() == {"input_ids"}


def test_images_without_grid_or_crops_follow_their_counts() -> None:
    batch = {"pixel_values": torch.zeros(3, 3, 4, 4), "n_images_per_sample": [0, 3, 0]}
    media = prepare_vlm_media_for_pp(batch, 3, 3)[VLM_PP_MEDIA_KEY]
    assert [len(chunk) for chunk in media["pixel_values"]] == [0, 3, 0]
    assert [chunk.tolist() for chunk in media["num_patches"]] == [[], [0, 0, 0], []]


@pytest.mark.parametrize(
    ("media", "match"),
    [
        ({"image_grid_hws": torch.ones(1, 2)}, "image_grid_hws .* comes without pixel_values"),
        ({"num_patches": [0, 1]}, r"num_patches \[0, 1\] comes without pixel_values"),
        ({"n_videos_per_sample": [0, 1]}, "comes without pixel_values_videos"),
        ({"pixel_values_videos": torch.ones(2, 3)}, "come without video_grid_thw"),
        (
            {
                "pixel_values": torch.zeros(2, 3, 4, 4),
                "image_sizes": torch.ones(2, 2),
                "num_patches": [0, 0],
            },
            r"with \['num_patches', 'image_sizes'\]: no layout has both",
        ),
        ({"pixel_values": torch.zeros(4, 3, 4, 4)}, "4 pixel rows are neither 2 images"),
    ],
)
def test_a_batch_that_cannot_be_prepared_stays_as_it_was(media: dict, match: str) -> None:
    batch = {"input_ids": torch.zeros(2, 7), **media}
    with pytest.raises(ValueError, match=match):
        prepare_vlm_media_for_pp(batch, 2, 2)
    assert batch.keys() == {"input_ids", *media}


def test_a_batch_size_other_than_the_tokens_is_refused() -> None:
    batch = {"input_ids": torch.zeros(2, 7), "pixel_values": torch.zeros(3, 3, 4, 4)}
    with pytest.raises(ValueError, match="batch_size is 3, but input_ids has 2 rows"):
        prepare_vlm_media_for_pp(batch, 3, 2)


def test_preparing_twice_is_refused() -> None:
    batch = {"pixel_values": torch.zeros(2, 3, 4, 4)}
    prepare_vlm_media_for_pp(batch, 2, 2)
    with pytest.raises(ValueError, match="it was prepared before"):
        prepare_vlm_media_for_pp({**batch, "pixel_values": torch.zeros(2, 3, 4, 4)}, 2, 2)


def test_of_several_grids_the_first_is_used_and_the_others_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    thw = torch.tensor([[1, 1, 2]])
    batch = {
        "pixel_values": torch.zeros(2, 5),
        "image_grid_thw": thw,
        "image_sizes": torch.tensor([[14, 28]]),
    }
    with caplog.at_level(logging.WARNING):
        media = prepare_vlm_media_for_pp(batch, 1, 1)[VLM_PP_MEDIA_KEY]
    assert torch.equal(media["image_grid_hws"][0], thw)
    assert "using image_grid_thw of ['image_grid_thw', 'image_sizes']" in caplog.text


def collate(examples: list[dict]) -> dict:
    return {key: torch.stack([e[key] for e in examples]) for key in examples[0]}


def test_a_wrapped_collate_counts_samples_by_their_tokens_and_pickles() -> None:
    wrapped = pickle.loads(pickle.dumps(wrap_vlm_collate_for_pp(collate, n_microbatches=2)))
    example = {"input_ids": torch.zeros(7), "pixel_values": torch.zeros(3, 4, 4)}
    batch = wrapped([example] * 3)
    assert [len(chunk) for chunk in batch[VLM_PP_MEDIA_KEY]["pixel_values"]] == [2, 1]
    assert wrapped([{"input_ids": torch.zeros(7)}]).keys() == {"input_ids"}
    with pytest.raises(ValueError, match=r"media \(pixel_values\) but no input_ids"):
        wrapped([{"pixel_values": torch.zeros(3, 4, 4)}])


@pytest.mark.parametrize("num_patches", [[0], None])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_pixels_of_another_number_than_the_images_that_were_counted_are_refused(rows, num_patches):
    with pytest.raises(ValueError, match=f"{rows} pixel rows are neither 2 images nor 0 crops"):
        chunk_step3_media(
            torch.zeros(rows, 3),
            batch_size=1,
            n_microbatches=1,
            num_patches=num_patches,
            n_images_per_sample=[2],
        )


@pytest.mark.parametrize("counts", [None, [0]])
def test_a_batch_of_text_alone_may_come_with_pixels_of_no_rows(counts):
    chunks = chunk_step3_media(
        torch.zeros(0, 3),
        batch_size=1,
        n_microbatches=1,
        num_patches=[0],
        n_images_per_sample=counts,
    )
    assert [len(chunk) for chunk in chunks["pixel_values"]] == [0]


def test_rows_beside_the_images_and_videos_go_with_them() -> None:
    batch = {
        "input_ids": torch.zeros(3, 7),
        "pixel_values": torch.zeros(6, 5),
        "image_grid_thw": torch.tensor([[1, 1, 2], [1, 2, 2]]),
        "grid_thws": torch.tensor([[1, 1, 2], [1, 2, 2]]),
        "image_flags": torch.tensor([1, 0]),
        "n_images_per_sample": [0, 1, 1],
        "pixel_values_videos": torch.zeros(12, 5),
        "video_grid_thw": torch.tensor([[2, 2, 2], [1, 2, 2]]),
        "second_per_grid_ts": [0.5, 0.25],
        "n_videos_per_sample": [1, 0, 1],
    }
    prepared = prepare_vlm_media_for_pp(batch, 3, 2)
    assert prepared.keys() == {"input_ids", VLM_PP_MEDIA_KEY}
    media = prepared[VLM_PP_MEDIA_KEY]
    assert [rows.tolist() for rows in media["grid_thws"]] == [[[1, 1, 2]], [[1, 2, 2]]]
    assert [rows.tolist() for rows in media["image_flags"]] == [[1], [0]]
    assert media["second_per_grid_ts"] == [[0.5], [0.25]]


def test_image_flags_without_a_grid_have_a_row_for_each_row_of_pixels() -> None:
    batch = {"pixel_values": torch.zeros(3, 3, 4, 4), "image_flags": torch.tensor([1, 0, 1])}
    media = prepare_vlm_media_for_pp(batch, 3, 2)[VLM_PP_MEDIA_KEY]
    assert [rows.tolist() for rows in media["image_flags"]] == [[1, 0], [1]]


@pytest.mark.parametrize(
    ("media", "match"),
    [
        ({"image_flags": torch.ones(1)}, "image_flags .* comes without pixel_values"),
        ({"second_per_grid_ts": [1.0]}, "second_per_grid_ts .* comes without pixel_values_videos"),
        (
            {"pixel_values": torch.zeros(2, 3, 4, 4), "grid_thws": torch.ones(3, 3)},
            r"grid_thws \(3, 3\) has 3 rows, but pixel_values has 2",
        ),
    ],
)
def test_rows_that_fit_no_images_are_refused(media: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        prepare_vlm_media_for_pp({"input_ids": torch.zeros(2, 7), **media}, 2, 2)
