"""Packed batches to model input."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image

from step37_data.forward_step import ForwardStep
from step37_data.images.decode import BrokenImageError, BrokenImages, read_rgb
from step37_data.images.options import ImageKeywords, ImageOptions
from step37_data.images.stacks import kernels_match_pillow
from step37_data.preprocess import (
    IMAGE_ITEM_TYPE,
    PATCH_ITEM_TYPE,
    build_image_for_insert,
    compute_rope_args,
    load_images,
    preprocess_packed_batch,
)
from step37_kernels.pixels import pillow as resample
from step37_kernels.pixels.normalize import CLIP_MEAN, CLIP_STD
from step37_kernels.pixels.resize import resize_clip_normalize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IM_START, PATCH_START = 128000, 128003
PHOTOS = Path(__file__).resolve().parents[3] / "examples" / "flickr8k_mini" / "train"


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colour with noise on it: compresses as a photograph does."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (7 + 5 * c) + seed) + np.cos(y / (11 - 3 * c)) for c in range(3)]
    pixels = 128 + 50 * np.stack(waves, axis=-1) + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture
def photos(tmp_path):
    """Four JPEGs of different sizes."""
    paths = []
    for i, (width, height) in enumerate([(50, 33), (33, 50), (64, 64), (20, 90)]):
        path = tmp_path / f"photo{i}.jpg"
        picture(width, height, seed=i).save(path, quality=90)
        paths.append(str(path))
    return paths


def stock(path: str, size: int) -> torch.Tensor:
    """Pillow and NumPy, step by step: fp32 ``[3, size, size]``."""
    image = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    array = np.asarray(image, dtype=np.float32) / np.float32(255)
    array = (array - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    assert array.dtype == np.float32
    return torch.from_numpy(array.transpose(2, 0, 1).copy())


def packed_batch(paths, **changes):
    """Two samples, an image each, then a crop in the second; and padding."""
    tokens = torch.tensor(
        [1, IM_START, 2, 2, 3, 4, IM_START, 2, PATCH_START, 5, 0, 0], dtype=torch.int64
    )
    batch = {
        "tokens": tokens,
        "labels": tokens + 1,
        "loss_masks": torch.ones(12),
        "cu_seqlens": torch.tensor([0, 5, 10, 12], dtype=torch.int32),
        "position_id": torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]),
        "max_seq_len": 5,
        "image_paths": [
            (paths[0], IMAGE_ITEM_TYPE),
            (paths[1], PATCH_ITEM_TYPE),
            (paths[2], IMAGE_ITEM_TYPE),
        ],
    }
    return {**batch, **changes}


def run(batch, **options):
    arguments = {
        "img_start_token_id": IM_START,
        "patch_start_token_id": PATCH_START,
        "image_size": 56,
        "patch_image_size": 28,
        "encoder_patch_size": 14,
        "device": DEVICE,
    }
    return preprocess_packed_batch(batch, **{**arguments, **options})


def test_load_images_gives_what_pillow_and_numpy_give(photos):
    items = [(photos[0], IMAGE_ITEM_TYPE), (photos[1], PATCH_ITEM_TYPE), (photos[2], 0)]
    loaded = load_images(items, image_size=56, patch_image_size=28)
    assert [kind for _, kind in loaded] == [0, 1, 0]
    for (path, _), (got, _), size in zip(items, loaded, [56, 28, 56], strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, stock(path, size))


@pytest.mark.parametrize("size", [728, 504])
def test_load_images_is_exact_for_photographs_at_the_sizes_of_the_model(size):
    photos = sorted(str(path) for path in PHOTOS.glob("*.jpg"))
    assert len(photos) == 8
    items = [(path, IMAGE_ITEM_TYPE) for path in photos]
    loaded = load_images(items, image_size=size, patch_image_size=1, device=DEVICE, threads=2)
    for path, (got, _) in zip(photos, loaded, strict=True):
        assert torch.equal(got.cpu(), stock(path, size))


def test_load_images_of_nothing_is_nothing():
    assert load_images([], image_size=56, patch_image_size=28) == []


def test_an_unknown_image_type_is_named(photos):
    with pytest.raises(ValueError, match=r"item type 0 \(image\) or 1 \(crop\), got 7"):
        load_images([(photos[0], 7)], image_size=56, patch_image_size=28)
    with pytest.raises(ValueError, match=r"item type .* got 7"):
        build_image_for_insert([(torch.zeros(3, 2, 2), 7)], patch_start_id=1, image_start_id=2)


def test_groups_come_crops_first_and_are_cut_to_their_limits():
    image_a, image_b = torch.zeros(3, 4, 6), torch.ones(3, 4, 6)
    crops = [torch.full((3, 2, 2), float(i)) for i in range(3)]
    groups = build_image_for_insert(
        [(image_a, 0), (crops[0], 1), (image_b, 0), (crops[1], 1), (crops[2], 1)],
        patch_start_id=10,
        image_start_id=7,
        limit_images=1,
        limit_patches=2,
        rope_args_fn=lambda kept: compute_rope_args(kept, 2, device="cpu"),
        device="cpu",
    )
    assert [group.insert_start_token for group in groups] == [10, 7]
    assert torch.equal(groups[0].images, torch.stack(crops[:2]).bfloat16())
    assert torch.equal(groups[1].images, image_a[None].bfloat16())
    assert groups[0].rope_cu_seqlens.tolist() == [0, 1, 2]
    assert groups[1].rope_cu_seqlens.tolist() == [0, 6]
    assert (groups[0].rope_max_seq_len, groups[1].rope_max_seq_len) == (1, 6)


@pytest.mark.parametrize("given", [torch.float32, torch.float16])
def test_a_group_has_the_dtype_that_is_asked_for_and_that_of_its_images_where_none_is(given):
    items = [(torch.zeros(3, 2, 2, dtype=given), 0)]
    for options, expected in (
        ({}, torch.bfloat16),
        ({"dtype": torch.float64}, torch.float64),
        ({"dtype": None}, given),
    ):
        (group,) = build_image_for_insert(
            items, patch_start_id=1, image_start_id=2, device="cpu", **options
        )
        assert group.images.dtype == expected


def test_a_limit_of_zero_leaves_no_group():
    items = [(torch.zeros(3, 2, 2), 0)]
    assert build_image_for_insert(items, patch_start_id=1, image_start_id=2, limit_images=0) == []


def test_rope_args_count_whole_vision_patches():
    cu_seqlens, longest = compute_rope_args(
        [torch.zeros(3, 728, 728), torch.zeros(3, 504, 504), torch.zeros(3, 27, 41)],
        14,
        device="cpu",
    )
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == [0, 2704, 2704 + 1296, 2704 + 1296 + 2]
    assert longest == 2704


def test_rope_args_of_no_images_are_an_error():
    with pytest.raises(ValueError, match="images: expected at least one"):
        compute_rope_args([], 14)


def test_a_vision_patch_without_pixels_is_an_error():
    for size in (0, -14):
        with pytest.raises(ValueError, match=f"patch_size: expected at least 1, got {size}"):
            compute_rope_args([torch.zeros(3, 28, 28)], size)


def test_a_packed_batch_becomes_the_model_input(photos):
    batch = packed_batch(photos)
    before = {key: value.clone() for key, value in batch.items() if torch.is_tensor(value)}
    out = run(batch)
    assert set(out) == {
        "input_ids",
        "labels",
        "loss_masks",
        "images",
        "cu_seqlens",
        "max_seq_len",
        "position_id",
    }
    for key, source in (
        ("input_ids", "tokens"),
        ("labels", "labels"),
        ("loss_masks", "loss_masks"),
    ):
        assert out[key].device.type == DEVICE.type
        assert torch.equal(out[key].cpu(), batch[source][None])
    assert torch.equal(out["cu_seqlens"].cpu(), batch["cu_seqlens"])
    assert out["cu_seqlens"].dtype == torch.int32
    assert torch.equal(out["position_id"].cpu(), batch["position_id"])
    assert int(out["max_seq_len"]) == 5

    crops, images = out["images"]
    assert (crops.insert_start_token, images.insert_start_token) == (PATCH_START, IM_START)
    assert torch.equal(crops.images.cpu(), stock(photos[1], 28)[None].bfloat16())
    expected = torch.stack([stock(photos[0], 56), stock(photos[2], 56)]).bfloat16()
    assert torch.equal(images.images.cpu(), expected)
    assert images.rope_cu_seqlens.tolist() == [0, 16, 32]
    assert images.rope_max_seq_len == 16
    for key, value in before.items():
        assert torch.equal(batch[key], value)


def test_a_batch_that_was_not_unwrapped_is_refused_with_the_shape_it_should_have(photos):
    batch = packed_batch(photos)
    with pytest.raises(ValueError, match=r"expected cu_seqlens of shape \[n \+ 1\], got \[1, 4\]"):
        run(torch.utils.data.default_collate([{**batch, "image_paths": []}]))
    for key in ("position_id", "tokens", "labels", "loss_masks"):
        with pytest.raises(ValueError, match=rf"{key} of shape \[T\], got \[1, 12\].*collate_fn"):
            run({**batch, key: batch[key][None]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_start_token_id": -1}, r"img_start_token_id .*build_datasets\(\) .*, got -1"),
        ({"patch_start_token_id": -1}, r"patch_start_token_id .*build_datasets\(\) .*, got -1"),
        ({"image_size": 0}, "image_size: expected at least 1, got 0"),
        ({"image_size": 28.0}, r"image_size: expected an integer, got 28\.0"),
        ({"patch_image_size": -3}, "patch_image_size: expected at least 1, got -3"),
        ({"encoder_patch_size": 0}, "encoder_patch_size: expected at least 1, got 0"),
        ({"encoder_patch_size": 13.5}, r"encoder_patch_size: expected an integer, got 13\.5"),
    ],
)
def test_start_tokens_and_sizes_that_cannot_be_are_refused(photos, options, message):
    with pytest.raises(ValueError, match=message):
        run(packed_batch(photos), **options)


@pytest.mark.parametrize("option", ["img_start_token_id", "patch_start_token_id"])
def test_a_start_token_may_be_the_first_of_the_vocabulary(photos, option):
    starts = [
        group.insert_start_token for group in run(packed_batch(photos), **{option: 0})["images"]
    ]
    assert 0 in starts


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (None, "expected a list of .*, got None"),
        ("a.jpg", "expected a list of .*, got 'a.jpg'"),
        (["a.jpg"], r"expected \(path, type\) or .*, got 'a.jpg'"),
        ([("a.jpg",)], r"expected \(path, type\) or .*, got \('a.jpg',\)"),
        ([("a.jpg", 0, None, 3)], r"expected \(path, type\) or .*, got \('a.jpg', 0, None, 3\)"),
        ([(None, 0)], r"expected \(path, type\) or .*, got \(None, 0\)"),
        ([("a.jpg", 0, (1, 2))], r"expected a window .*, got \(1, 2\) of a.jpg"),
        ([("a.jpg", 0, 7)], "expected a window .*, got 7 of a.jpg"),
    ],
)
def test_image_paths_of_another_form_are_refused(photos, paths, message):
    with pytest.raises(ValueError, match=f"image_paths: {message}"):
        load_images(paths, image_size=56, patch_image_size=28)
    with pytest.raises(ValueError, match=f"image_paths: {message}"):
        run(packed_batch(photos, image_paths=paths))


def test_an_image_path_may_be_a_path_object(photos):
    ((got, _),) = load_images([(Path(photos[0]), 0)], image_size=56, patch_image_size=28)
    assert torch.equal(got, stock(photos[0], 56))


def test_a_later_pipeline_stage_gets_the_layout_only(photos):
    batch = packed_batch(photos)
    for key in ("tokens", "labels", "loss_masks", "image_paths"):
        del batch[key]
    out = run(batch)
    assert set(out) == {"cu_seqlens", "max_seq_len", "position_id"}


def test_a_text_only_pack_has_no_groups(photos):
    tokens = torch.arange(1, 13)
    out = run(packed_batch(photos, tokens=tokens, labels=tokens, image_paths=[]))
    assert out["images"] == []


def test_images_and_start_tokens_pair_up_to_the_smaller_count(photos, caplog):
    paths = [(photos[i], IMAGE_ITEM_TYPE) for i in range(4)]
    crops, images = run(packed_batch(photos, image_paths=[*paths, (photos[0], 1)]))["images"]
    assert len(crops.images) == 1
    assert len(images.images) == 2
    assert "4 images of type 0 and 2 start tokens 128000" in caplog.text
    caplog.clear()
    (images,) = run(packed_batch(photos, image_paths=paths[:1]))["images"]
    assert len(images.images) == 1
    assert "1 images of type 0 and 2 start tokens 128000" in caplog.text
    assert "0 images of type 1 and 1 start tokens 128003" in caplog.text


@pytest.mark.parametrize(
    ("kind", "token", "name"),
    [(IMAGE_ITEM_TYPE, 128000, "<im_start>"), (1, 128003, "<patch_start>")],
)
def test_a_pack_with_none_of_the_start_tokens_is_an_error_in_the_log_that_asks_for_the_id(
    photos, caplog, kind, token, name
):
    tokens = torch.arange(1, 13)
    batch = packed_batch(photos, tokens=tokens, labels=tokens, image_paths=[(photos[0], kind)] * 2)
    assert run(batch)["images"] == []
    (record,) = (r for r in caplog.records if r.name == "step37_data.preprocess")
    assert record.levelname == "ERROR"
    assert record.getMessage() == (
        f"the pack holds 2 images of type {kind} and 0 start tokens {token} for them; the first 0 "
        f"of each are used. There is none of them: is {token} the tokenizer's {name}?"
    )


def test_fewer_start_tokens_than_images_are_a_warning_only(photos, caplog):
    run(packed_batch(photos, image_paths=[(photos[0], IMAGE_ITEM_TYPE)]))
    levels = {r.levelname for r in caplog.records if r.name == "step37_data.preprocess"}
    assert levels == {"WARNING"}


def test_images_without_a_place_are_not_even_read(photos, tmp_path):
    surplus = [(photos[0], 0), (photos[1], 0), (str(tmp_path / "missing.jpg"), 0), (photos[2], 1)]
    broken = BrokenImages()
    run(packed_batch(photos, image_paths=surplus), broken=broken, on_broken="raise")
    assert (broken.seen, broken.occurrences) == (3, 0)


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ((), [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ((0,), [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1]),
        ((1,), [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1]),
        ((2,), [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1]),
        ((0, 1, 2), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]),
    ],
)
@pytest.mark.parametrize("mode", ["skip-loss", "zero"])
def test_skip_loss_takes_the_samples_of_broken_images_out_of_the_loss(
    photos, tmp_path, *, missing, expected, mode
):
    paths = [str(tmp_path / "missing.jpg") if i in missing else photos[i] for i in range(3)]
    batch = packed_batch(paths)
    broken = BrokenImages()
    out = run(batch, on_broken=mode, broken=broken)
    assert out["loss_masks"][0].tolist() == (expected if mode == "skip-loss" else [1] * 12)
    assert batch["loss_masks"].tolist() == [1] * 12
    assert (broken.seen, broken.occurrences) == (3, len(missing))
    crops, images = out["images"]
    assert (len(crops.images), len(images.images)) == (1, 2)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        # A sample that begins with its image; and more start tokens than images.
        ([5, 5, IM_START, 5], [1, 1, 0, 0]),
        ([IM_START, 5, IM_START, 5], [0, 0, 1, 1]),
    ],
)
def test_skip_loss_finds_the_sample_that_owns_an_image(tmp_path, tokens, expected):
    batch = {
        "tokens": torch.tensor(tokens),
        "labels": torch.tensor(tokens),
        "loss_masks": torch.ones(4),
        "cu_seqlens": torch.tensor([0, 2, 4], dtype=torch.int32),
        "position_id": torch.tensor([0, 1, 0, 1]),
        "image_paths": [(str(tmp_path / "missing.jpg"), IMAGE_ITEM_TYPE)],
    }
    assert run(batch, on_broken="skip-loss")["loss_masks"][0].tolist() == expected


def test_raise_names_the_file(photos, tmp_path):
    gone = str(tmp_path / "gone.jpg")
    with pytest.raises(
        BrokenImageError, match=r"image .*gone\.jpg could not be read: FileNotFound"
    ):
        run(packed_batch([photos[0], gone, photos[1]]), on_broken="raise")


def test_the_loss_mask_keeps_its_dtype(photos, tmp_path):
    batch = packed_batch([str(tmp_path / "gone.jpg"), photos[1], photos[2]])
    batch["loss_masks"] = batch["loss_masks"].to(torch.int64)
    out = run(batch, on_broken="skip-loss")
    assert out["loss_masks"].dtype == torch.int64
    assert out["loss_masks"][0].tolist() == [0] * 5 + [1] * 7


def test_decoded_pixels_through_the_kernels_are_what_the_host_path_gives(photos):
    """The CUDA path in the interpreter: whole pictures, resized by the kernels."""
    pictures = [torch.tensor(np.asarray(read_rgb(path))) for path in photos]
    got = resize_clip_normalize([p.to(DEVICE) for p in pictures], 28, impl="triton")
    expected = torch.stack([stock(path, 28) for path in photos]).bfloat16()
    assert torch.equal(got.cpu(), expected)


def test_the_kernels_match_the_installed_pillow(caplog):
    assert kernels_match_pillow.__wrapped__()
    assert not caplog.records


def test_a_pillow_of_another_order_is_noticed(monkeypatch, caplog):
    other = (12, 1) if resample.installed_pillow() >= (12, 2) else (13, 0)
    monkeypatch.setattr(resample, "installed_pillow", lambda: other)
    assert not kernels_match_pillow.__wrapped__()
    assert "Pillow resizes, slower" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device: on the CPU it is the rule")
def test_where_pillow_has_to_resize_the_values_are_the_same(photos, monkeypatch):
    monkeypatch.setattr("step37_data.images.stacks.kernels_match_pillow", lambda: False)
    loaded = load_images([(p, 0) for p in photos], image_size=56, patch_image_size=1, device=DEVICE)
    for path, (got, _) in zip(photos, loaded, strict=True):
        assert torch.equal(got.cpu(), stock(path, 56))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device: host synchronisation")
def test_the_host_never_waits_and_staging_memory_is_reused(photos):
    batch = packed_batch(photos)
    for _ in range(3):
        run(batch)
        torch.cuda.synchronize()
    allocated = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            run(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for _ in range(5):
        torch.cuda.synchronize()
        run(batch)
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] <= 2 * allocated


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8])
def test_a_dtype_that_pixels_cannot_have_is_refused_by_name(photos, dtype):
    with pytest.raises(TypeError, match=f"dtype: expected one of .*, got {dtype}"):
        load_images([(photos[0], 0)], image_size=28, patch_image_size=28, dtype=dtype)


def test_the_options_are_declared_with_the_same_types_as_keywords_and_as_attributes():
    declared = get_type_hints(ImageOptions)
    sizes = {"image_size": int, "patch_image_size": int}
    assert {**sizes, **get_type_hints(ImageKeywords)} == declared
    assert list(declared) == [field.name for field in dataclasses.fields(ImageOptions)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"max_pixels": 0}, "max_pixels: expected at least 1, got 0"),
        ({"on_broken": "ignore"}, "on_broken: expected one of zero, raise, skip-loss"),
        ({"pixel_order": "rgb"}, "pixel_order: expected one of pillow, serving"),
    ],
)
def test_an_option_that_cannot_be_is_refused_where_it_is_given(photos, options, message):
    with pytest.raises(ValueError, match=message):
        load_images([], image_size=56, patch_image_size=28, **options)
    with pytest.raises(ValueError, match=message):
        run(packed_batch(photos), **options)
    with pytest.raises(ValueError, match=message):
        ForwardStep(**options)


def test_an_option_that_does_not_exist_is_a_type_error(photos):
    with pytest.raises(TypeError, match="thread"):
        load_images([], image_size=56, patch_image_size=28, thread=2)
    with pytest.raises(TypeError, match="thread"):
        run(packed_batch(photos), thread=2)
    with pytest.raises(TypeError, match="thread"):
        ForwardStep(thread=2)


def test_the_forward_step_leaves_the_sizes_to_the_data_set():
    with pytest.raises(TypeError, match="patch_image_size: the data set decides it"):
        ForwardStep(patch_image_size=504)
    with pytest.raises(TypeError, match="img_start_token_id"):
        ForwardStep(img_start_token_id=7)
