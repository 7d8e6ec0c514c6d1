"""From image files to fused embeddings with pictures seen in crops."""

from __future__ import annotations

import csv
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from step37_data.common.image_entry import ImageEntry
from step37_data.images import stacks
from step37_data.images.crop_pixels import normalize_then_resize, padded_image
from step37_data.images.crops import plan_crops
from step37_data.images.decode import BrokenImageError, BrokenImages
from step37_data.images.device import host_memory, upload
from step37_data.images.options import ImageOptions
from step37_data.pack_transform import pack_samples
from step37_data.preprocess import load_images, preprocess_packed_batch
from step37_data.template import Step37MultimodalTemplate
from step37_kernels import ImageInsertEmbedding, reference
from step37_kernels.pixels import reference as reference_pixels
from step37_kernels.pixels.ragged import RaggedImages
from tests.data.images.multicrop_oracle import BILINEAR, see
from tests.data.images.test_multicrop import token_layout

EXAMPLES = Path(__file__).parents[3] / "examples"
PHOTOS = EXAMPLES / "flickr8k_mini" / "train"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMAGE_SIDE, CROP_SIDE = 52, 36
CHANNELS, HIDDEN = 12, 16

Make = Any


@pytest.fixture(scope="module")
def template() -> Step37MultimodalTemplate:
    pytest.importorskip("transformers")
    return Step37MultimodalTemplate(
        tokenizer_path=str(EXAMPLES / "tokenizer"), max_sequence_length=32768, multicrop=True
    )


@pytest.fixture(scope="module")
def plain() -> Step37MultimodalTemplate:
    pytest.importorskip("transformers")
    return Step37MultimodalTemplate(
        tokenizer_path=str(EXAMPLES / "tokenizer"), max_sequence_length=32768
    )


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes the path of a JPEG of a size, once: a photograph cut and stretched to it."""
    folder = tmp_path_factory.mktemp("pictures")

    def make(width: int, height: int, name: str = "rocket") -> str:
        path = folder / f"{name}_{width}x{height}.jpg"
        if not path.exists():
            Image.open(PHOTOS / f"{name}.jpg").resize((width, height)).save(path, quality=92)
        return str(path)

    return make


def conversation(*texts: str) -> list[dict[str, str]]:
    turns = []
    for number, text in enumerate(texts):
        turns += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": f"Answer {number}."},
        ]
    return turns


def names(template: Step37MultimodalTemplate, sample: Any) -> list[str]:
    kept = {
        "<im_start>", "<im_patch>", "<im_end>", "<patch_start>", "<patch_newline>", "<patch_end>",
    }  # fmt: skip
    tokens = template.tokenizer.convert_ids_to_tokens(sample["tokens"].tolist())
    return [token for token in tokens if token in kept]


SIZES = [(500, 333), (500, 375), (1000, 40), (60, 500), (1920, 1080), (3, 1), (40, 9)]


@pytest.mark.parametrize("size", SIZES)
def test_one_placeholder_becomes_crops_newlines_and_the_full_image(template, plain, picture, size):
    path = picture(*size)
    data = {"conversations": conversation("<image>\nWhat is it?"), "images": [path]}
    sample, as_before = template(data), plain(data)
    plan = plan_crops(*size)
    assert names(template, sample) == token_layout(plan) == see(Image.open(path)).tokens
    assert len(sample) == len(as_before) + plan.num_tokens - 171
    expected = [(path, 1, window) for window in plan.windows]
    assert sample["image_paths"] == [*expected, (path, 0, (0, 0, *plan.full_size))]
    # Same answer, same loss: crops stand in the user's turn.
    assert sample["loss_mask"].sum() == as_before["loss_mask"].sum()
    trained = [s["tokens"][s["loss_mask"] == 1].tolist() for s in (sample, as_before)]
    assert trained[0] == trained[1]


@given(
    sizes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=4),
    turns=st.integers(1, 2),
)
@settings(max_examples=15)
def test_several_images_of_a_sample_keep_their_order(template, picture, sizes, turns):
    paths = [picture(*size) for size in sizes]
    first = "<image> and ".join([""] * len(paths)) + "<image>?"
    texts = [first] if turns == 1 else ["<image>?", first.replace("<image>", "", 1)]
    sample = template({"conversations": conversation(*texts), "images": paths})
    layout = [token for size in sizes for token in token_layout(plan_crops(*size))]
    assert names(template, sample) == layout
    entries = []
    for path, size in zip(paths, sizes, strict=True):
        plan = plan_crops(*size)
        entries += [(path, 1, window) for window in plan.windows]
        entries.append((path, 0, plan.full_window))
    assert sample["image_paths"] == entries


def test_crops_that_a_text_spells_out_stay_whole_files(template, plain, picture):
    markup = "<im_start><@image@><im_end><patch_start><#image#><patch_end>"
    a, b, c = picture(500, 333), picture(60, 500), picture(500, 375)
    data = {"conversations": conversation(markup), "images": [(a, 0), (b, 1)]}
    assert template(data)["image_paths"] == [(a, 0), (b, 1)]
    assert torch.equal(template(data)["tokens"], plain(data)["tokens"])
    mixed = {"conversations": conversation(markup, "<image>"), "images": [(a, 0), (b, 1), c]}
    assert template(mixed)["image_paths"] == [(a, 0), (b, 1), (c, 0, (0, 0, 500, 375))]


@pytest.mark.parametrize("count", [0, 2])
def test_images_and_placeholders_still_have_to_agree(template, picture, count):
    data = {"conversations": conversation("<image>"), "images": [picture(500, 375)] * count}
    with pytest.raises(ValueError, match=f"images: {count} files of type image for 1 placeholders"):
        template(data)


def test_a_file_without_a_header_is_planned_as_the_black_picture_it_becomes(template, tmp_path):
    for path in (tmp_path / "missing.jpg", tmp_path / "broken.jpg"):
        if path.name == "broken.jpg":
            path.write_bytes(b"no jpeg")
        sample = template({"conversations": conversation("<image>"), "images": [str(path)]})
        assert sample["image_paths"] == [(str(path), 0, (0, 0, 224, 224))]


def test_the_newline_has_to_be_a_token_only_with_multicrop(tmp_path):
    shutil.copytree(EXAMPLES / "tokenizer", tmp_path / "t")
    for file in (tmp_path / "t").glob("*.json"):
        file.write_text(file.read_text().replace("<patch_newline>", "<other_newline>"))
    Step37MultimodalTemplate(tokenizer_path=str(tmp_path / "t"))
    with pytest.raises(ValueError, match="no special token '<patch_newline>'"):
        Step37MultimodalTemplate(tokenizer_path=str(tmp_path / "t"), multicrop=True)


def load(entries: list[Any], **options: Any) -> list[tuple[torch.Tensor, int]]:
    arguments = {"image_size": IMAGE_SIDE, "patch_image_size": CROP_SIDE, "device": DEVICE}
    return load_images(entries, **{**arguments, **options})


def oracle(path: str, sides: tuple[int, int] = (IMAGE_SIDE, CROP_SIDE)) -> list[torch.Tensor]:
    """fp32 ``[3, side, side]`` of every crop, then of the full image."""
    seen = see(Image.open(path).convert("RGB"))
    resized = [crop.resize((sides[1], sides[1]), BILINEAR) for crop in seen.crops]
    resized.append(seen.full.resize((sides[0], sides[0]), BILINEAR))
    arrays = [torch.from_numpy(np.array(image)) for image in resized]
    return [reference_pixels.clip_normalize(a[None], dtype=torch.float32)[0] for a in arrays]


def entries_of(path: str) -> list[Any]:
    with Image.open(path) as image:
        plan = plan_crops(*image.size)
    return [*((path, 1, window) for window in plan.windows), (path, 0, plan.full_window)]


@pytest.mark.parametrize("size", [*SIZES, (3100, 1500)])
def test_loaded_crops_and_images_are_pillows_to_the_last_bit(picture, size):
    path = picture(*size)
    loaded = load(entries_of(path))
    for (got, _), expected in zip(loaded, oracle(path), strict=True):
        assert torch.equal(got.cpu(), expected)


def test_loaded_crops_are_exact_at_the_sizes_of_the_model_and_beside_whole_files(picture):
    first, second = picture(500, 333), picture(60, 500)
    entries = [*entries_of(first), (second, 1), *entries_of(second), (first, 0), (first, 1, None)]
    loaded = load(entries, image_size=728, patch_image_size=504, threads=2)
    whole = [
        load([(path, kind)], image_size=728, patch_image_size=504)[0][0]
        for path, kind in ((second, 1), (first, 0), (first, 1))
    ]
    expected = [*oracle(first, (728, 504)), whole[0], *oracle(second, (728, 504)), *whole[1:]]
    for (got, kind), wanted, entry in zip(loaded, expected, entries, strict=True):
        assert kind == entry[1]
        assert torch.equal(got, wanted.to(DEVICE))


def test_entries_that_became_lists_on_the_way_are_understood(picture):
    path = picture(500, 333)
    as_lists = [[path, kind, list(window)] for path, kind, window in entries_of(path)]
    for (got, _), expected in zip(load(as_lists), oracle(path), strict=True):
        assert torch.equal(got.cpu(), expected)
    with pytest.raises(ValueError, match=r"expected \(path, type\) or \(path, type, window\)"):
        load([(path, 0, None, None)])


def test_a_picture_is_decoded_once_however_many_crops_it_has(picture, monkeypatch):
    opened: list[str] = []
    real_open = Image.open

    def counting(path: Any, *rest: Any, **options: Any) -> Any:
        opened.append(str(path))
        return real_open(path, *rest, **options)

    monkeypatch.setattr(Image, "open", counting)
    paths = [picture(1920, 1080), picture(500, 333)]
    opened.clear()
    broken = BrokenImages()
    load([entry for path in paths for entry in [*entries_of(path)] * 2], broken=broken)
    headers = len(paths)
    assert len(opened) == headers + len(paths)
    assert broken.seen == len(paths)


@pytest.mark.parametrize("size", [(1920, 1080), (500, 333)])
def test_in_the_order_of_serving_the_last_resize_is_made_in_floating_point(picture, size):
    path = picture(*size)
    seen = see(Image.open(path).convert("RGB"))
    sides = [CROP_SIDE] * len(seen.crops) + [IMAGE_SIDE]
    loaded = load(entries_of(path), pixel_order="serving")
    for (got, _), image, side in zip(loaded, [*seen.crops, seen.full], sides, strict=True):
        pixels = torch.from_numpy(np.array(image)).to(DEVICE)
        expected = normalize_then_resize(pixels, side)
        assert torch.equal(got, expected)
    assert not torch.equal(loaded[-1][0], load(entries_of(path))[-1][0])
    whole = load([(path, 0)], pixel_order="serving")[0][0]
    assert torch.equal(whole, loaded[-1][0])


def test_an_unknown_pixel_order_is_named(picture):
    with pytest.raises(ValueError, match="pixel_order: expected one of pillow, serving, got 'x'"):
        load([(picture(500, 375), 0)], pixel_order="x")


@pytest.fixture
def changed(picture, tmp_path) -> Any:
    """Entries of three files: one that changed its size, one damaged, one as it was."""
    paths = [str(tmp_path / name) for name in ("changed.jpg", "cut.jpg", "whole.jpg")]
    for path in paths:
        shutil.copy(picture(500, 333), path)
    entries = [entries_of(path) for path in paths]
    shutil.copy(picture(500, 375), paths[0])
    whole = Path(paths[1]).read_bytes()
    Path(paths[1]).write_bytes(whole[: len(whole) // 2])
    return paths, entries


def test_a_picture_of_another_size_than_planned_is_black_and_reported(changed, caplog):
    paths, entries = changed
    broken = BrokenImages()
    loaded = load([entry for of_path in entries for entry in of_path], broken=broken)
    black = (0 - torch.tensor(reference_pixels.CLIP_MEAN)) / torch.tensor(reference_pixels.CLIP_STD)
    for image, _ in loaded[:6]:
        assert torch.equal(image.cpu(), black.view(3, 1, 1).expand(image.shape))
    for (got, _), expected in zip(loaded[6:], oracle(paths[2]), strict=True):
        assert torch.equal(got.cpu(), expected)
    assert list(broken.reasons) == paths[:2]
    assert "500×375 pixels, of which (0, 0, 333, 333) is no window" in broken.reasons[paths[0]]
    assert "truncated" in broken.reasons[paths[1]]
    assert "changed.jpg could not be shown: it has 500×375" in caplog.text
    assert "black is used in its place" in caplog.text


def test_a_picture_of_another_size_than_planned_can_be_an_error(changed):
    _, entries = changed
    with pytest.raises(BrokenImageError, match=r"changed.jpg could not be shown: it has 500×375"):
        load(entries[0], on_broken="raise")
    with pytest.raises(BrokenImageError, match=r"cut.jpg could not be read"):
        load(entries[1], on_broken="raise")


@pytest.mark.parametrize("order", ["pillow", "serving"])
def test_the_way_through_one_buffer_gives_what_the_way_through_pillow_gives(
    picture, changed, order
):
    _, of_three = changed
    entries = [entry for of_path in of_three for entry in of_path]
    for size in [*SIZES, (3100, 1500)]:
        entries += entries_of(picture(*size))
    whole = picture(500, 333)
    entries += [(whole, 0), (whole, 1)]
    wanted = [ImageEntry(*entry) for entry in entries]
    options = ImageOptions(
        image_size=IMAGE_SIDE, patch_image_size=CROP_SIDE, device="cpu", pixel_order=order
    )
    by_host, broken = stacks.load_stacks(wanted, options)
    by_device, reasons = stacks._on_device(wanted, options, DEVICE)
    assert reasons == broken
    for kind in (0, 1):
        if order == "pillow" or DEVICE.type == "cpu":
            assert torch.equal(by_device[kind].cpu(), by_host[kind])
        else:
            torch.testing.assert_close(
                by_device[kind].cpu(), by_host[kind], rtol=2**-7, atol=2**-16
            )
    whole = [why is None for why, entry in zip(broken, wanted, strict=True) if entry.kind == 0]
    assert whole == [False, False] + [True] * 10


def test_pinned_memory_that_cannot_be_had_is_an_error_and_not_a_black_picture(picture, monkeypatch):
    def full(*_: object, **_options: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory")

    options = ImageOptions(image_size=IMAGE_SIDE, patch_image_size=CROP_SIDE, threads=2)
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(MemoryError, match=r"host memory of shape \(333, 500, 3\): CUDA error: out"):
        stacks._on_device([ImageEntry(picture(500, 333), 0)], options, DEVICE)


def test_on_the_way_to_a_device_a_picture_is_written_once_into_memory_of_its_own(
    picture, monkeypatch
):
    """Pinned where there is CUDA: what is uploaded is that memory itself."""
    given: list[torch.Tensor] = []
    uploaded: list[torch.Tensor] = []

    def allocated(*args: Any, **options: Any) -> torch.Tensor:
        given.append(host_memory(*args, **options).fill_(77))
        return given[-1]

    def and_noted(pictures: list[torch.Tensor], device: torch.device) -> RaggedImages:
        uploaded.extend(pictures)
        return upload(pictures, device)

    monkeypatch.setattr(stacks, "host_memory", allocated)
    monkeypatch.setattr(stacks, "upload", and_noted)
    sizes = [(500, 333), (500, 375), (40, 9), (1920, 1080)]
    wanted = [ImageEntry(*entry) for size in sizes for entry in entries_of(picture(*size))]
    options = ImageOptions(image_size=IMAGE_SIDE, patch_image_size=CROP_SIDE, threads=1)
    stacks._on_device(wanted, options, DEVICE)
    assert [memory.data_ptr() for memory in given] == [sent.data_ptr() for sent in uploaded]
    for size, sent in zip(sizes, uploaded, strict=True):
        plan = plan_crops(*size)
        with Image.open(picture(*size)) as image:
            expected = padded_image(image.convert("RGB"), plan)
        assert np.array_equal(sent.numpy(), np.asarray(expected))


def run(template: Any, packed: dict[str, Any], **options: Any) -> dict[str, Any]:
    return preprocess_packed_batch(
        packed,
        img_start_token_id=template.img_start_token_id,
        patch_start_token_id=template.patch_start_token_id,
        **{
            "image_size": IMAGE_SIDE,
            "patch_image_size": CROP_SIDE,
            "encoder_patch_size": 4,
            "device": DEVICE,
            **options,
        },
    )


@pytest.mark.parametrize("first_stage", [True, False])
def test_a_sample_whose_picture_changed_takes_no_part_in_the_loss(
    template, changed, first_stage, monkeypatch
):
    monkeypatch.setattr("step37_data.preprocess._is_first_pipeline_stage", lambda: first_stage)
    paths, entries = changed
    samples = [template({"conversations": conversation("<image>"), "images": [p]}) for p in paths]
    tokens = template({"conversations": conversation("<image>"), "images": [paths[2]]})["tokens"]
    for sample, of_path in zip(samples, entries, strict=True):
        # As it was when the sample was made.
        sample["tokens"], sample["image_paths"] = tokens, of_path
        sample["loss_mask"] = samples[2]["loss_mask"]
    packed = pack_samples(samples)
    out = run(template, packed, on_broken="skip-loss")
    bounds = packed["cu_seqlens"].tolist()
    sums = [float(out["loss_masks"][0, a:b].sum()) for a, b in itertools.pairwise(bounds)]
    assert sums[:2] == [0, 0]
    assert sums[2] == float(packed["loss_masks"][bounds[2] : bounds[3]].sum()) > 0


def test_preprocess_refuses_packs_that_were_made_otherwise(template, plain, picture):
    path = picture(500, 333)
    data = {"conversations": conversation("<image>"), "images": [path]}
    cropped, whole = pack_samples([template(data)]), pack_samples([plain(data)])
    with pytest.raises(ValueError, match=r"multicrop: False, but .* carries \(0, 0, 333"):
        run(template, cropped, multicrop=False)
    with pytest.raises(ValueError, match=r"multicrop: True, but .* carries no window"):
        run(template, whole, multicrop=True)
    assert len(run(template, cropped, multicrop=True)["images"]) == 2
    assert len(run(template, whole, multicrop=False)["images"]) == 1


class WordEmbedding(torch.nn.Module):
    """``[B, S]`` ids to ``[S, B, H]``, called as Megatron's embedding is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(1024, HIDDEN)

    def forward(self, *, input_ids: torch.Tensor, position_ids: Any) -> torch.Tensor:  # noqa: ARG002
        return self.table(input_ids).transpose(0, 1).contiguous()


def tower(images: torch.Tensor) -> torch.Tensor:
    """A stand-in for the user's vision tower: ``[N, 3, s, s]`` to ``[N, (s / 4)², C]``."""
    generator = torch.Generator().manual_seed(0)
    to_channels = torch.randn(3, CHANNELS, generator=generator).to(images.device)
    cells = torch.nn.functional.avg_pool2d(images.float(), 4).flatten(2)
    return cells.transpose(1, 2) @ to_channels


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize(
    "samples",
    [
        [[(500, 333)], [(500, 375)], [(1920, 1080), (60, 500)]],
        [[(500, 375)], [(500, 375)]],
        [[(1000, 40), (500, 375), (40, 9)], []],
    ],
    ids=["mixed", "no crops", "several images a sample"],
)
def test_a_pack_that_mixes_crops_and_images_is_fused_as_the_reference_does(
    template, picture, samples, impl
):
    tokenised = []
    for sizes in samples:
        paths = [picture(*size) for size in sizes]
        text = "<image>" * len(paths) + "What is it?"
        tokenised.append(template({"conversations": conversation(text), "images": paths}))
    packed = pack_samples(
        tokenised, start_token_ids=(template.img_start_token_id, template.patch_start_token_id)
    )
    out = run(template, packed)
    # Rows in the tokens of a sample are the rows of features that its pictures give.
    bounds = packed["cu_seqlens"].tolist()
    for number, sizes in enumerate(samples):
        plans = [plan_crops(*size) for size in sizes]
        ids = out["input_ids"][0, bounds[number] : bounds[number + 1]]
        crops = sum(len(plan.windows) for plan in plans)
        assert int((ids == template.patch_start_token_id).sum()) == crops
        assert int((ids == template.img_start_token_id).sum()) == len(plans)
        patch_id = template.tokenizer.convert_tokens_to_ids("<im_patch>")
        assert int((ids == patch_id).sum()) == 81 * crops + 169 * len(plans)
    counts = {group.insert_start_token: len(group.images) for group in out["images"]}
    all_plans = [plan_crops(*size) for sizes in samples for size in sizes]
    expected_counts = {
        template.patch_start_token_id: sum(len(plan.windows) for plan in all_plans),
        template.img_start_token_id: len(all_plans),
    }
    assert counts == {token: count for token, count in expected_counts.items() if count}

    torch.manual_seed(0)
    module = ImageInsertEmbedding(WordEmbedding(), CHANNELS, HIDDEN, impl=impl, strict=True)
    module.to(DEVICE)
    module._language_embedding.to(DEVICE)
    for group in out["images"]:
        group.image_features = tower(group.images)
    fused = module(out["input_ids"], out["images"], out["position_id"])
    words = module._language_embedding(input_ids=out["input_ids"], position_ids=None)
    plan = reference.plan_insert(
        out["input_ids"].cpu(),
        [
            (group.insert_start_token, [group.image_features.shape[1]] * len(group.images))
            for group in out["images"]
        ],
    )
    expected = reference.project_and_insert(
        words.double().cpu(),
        [group.image_features.double().cpu() for group in out["images"]],
        module.align_projector.weight.double().cpu(),
        None,
        plan,
    )
    torch.testing.assert_close(fused.double().cpu(), expected, rtol=1e-5, atol=1e-5)
    # Every row is the row of the right window of the right picture.
    at = {template.patch_start_token_id: 0, template.img_start_token_id: 0}
    groups = {group.insert_start_token: group for group in out["images"]}
    views = [v for sizes in samples for size in sizes for v in oracle(picture(*size))]
    starts = [
        (place, int(token))
        for place, token in enumerate(out["input_ids"][0].tolist())
        if token in at
    ]
    for (place, token), view in zip(starts, views, strict=True):
        number = at[token]
        at[token] += 1
        image = groups[token].images[number]
        assert torch.equal(image.cpu(), view.to(image.dtype))
        rows = tower(image[None])[0].double().cpu() @ module.align_projector.weight.double().cpu().T
        got = fused[place + 1 : place + 1 + len(rows), 0].double().cpu()
        torch.testing.assert_close(got, rows, rtol=1e-5, atol=1e-5)


@pytest.fixture
def folder(picture, tmp_path) -> Path:
    """A data set of four pictures, two of which have crops."""
    train = tmp_path / "data" / "train"
    train.mkdir(parents=True)
    sizes = [(500, 333), (500, 375), (300, 300), (640, 400)]
    with (train / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "caption_0"])
        for number, size in enumerate(sizes):
            shutil.copy(picture(*size), train / f"{number}.jpg")
            writer.writerow([f"{number}.jpg", "A rocket."])
    return train.parent


def provider(folder: Path, **options: Any) -> Any:
    pytest.importorskip("transformers")
    pytest.importorskip("tqdm")
    from step37_data.provider import Step37Flickr8kSFTDataProvider

    return Step37Flickr8kSFTDataProvider(
        tokenizer_path=str(EXAMPLES / "tokenizer"),
        cache_dir=str(folder),
        sample_count=None,
        dataset_sampling="sequential",
        **options,
    )


def test_one_switch_of_the_provider_turns_crops_on(folder, template):
    before, _, _ = provider(folder).build_datasets(None)
    cropped, _, _ = provider(folder, multicrop=True).build_datasets(None)
    sizes = [(500, 333), (500, 375), (300, 300), (640, 400)]
    more = [plan_crops(*size).num_tokens - 171 for size in sizes]
    assert more == [166, 0, 0, 166]
    grown = cropped.piece_sizes - before.piece_sizes
    assert grown.tolist() == more
    packed = cropped[0]
    assert len(packed["image_paths"]) == 4 + 4
    images = run(template, packed)["images"]
    assert [len(group.images) for group in images] == [4, 4]
    assert len(run(template, before[0])["images"]) == 1


def test_lengths_are_found_without_decoding_a_pixel(folder):
    for path in (folder / "train").glob("*.jpg"):
        whole = path.read_bytes()
        path.write_bytes(whole[: whole.index(b"\xff\xda") + 14])
    cropped, _, _ = provider(folder, multicrop=True).build_datasets(None)
    assert cropped.piece_sizes[0] - cropped.piece_sizes[1] == 166


def test_cached_lengths_know_the_size_of_the_picture(folder, picture, tmp_path):
    pytest.importorskip("tqdm")
    from step37_data.caches.lengths import LengthCache, probe_lengths

    def dataset(multicrop: bool) -> Any:
        built, _, _ = provider(folder, multicrop=multicrop, cache_lengths=False).build_datasets(
            None
        )
        return built.datasets[0]

    cache = tmp_path / "lengths"
    plain, cropped = dataset(False), dataset(True)
    assert plain.fingerprint() != cropped.fingerprint()
    first = probe_lengths(cropped, cache_dir=cache, progress=False)
    assert (LengthCache(cache, cropped).look_up() == first).all()
    shutil.copy(picture(1920, 1080), folder / "train" / "1.jpg")
    assert LengthCache(cache, cropped).look_up().tolist() == [first[0], -1, first[2], first[3]]
    again = probe_lengths(cropped, cache_dir=cache, progress=False)
    assert again.tolist() == [first[0], first[1] + 836 - 171, first[2], first[3]]
    keys = plain.sample_keys()
    assert (keys == keys[0]).all(), "without crops the picture's size decides nothing"


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device: host synchronisation")
@pytest.mark.parametrize("order", ["pillow", "serving"])
def test_the_host_never_waits_for_the_device(template, picture, order):
    paths = [picture(*size) for size in SIZES]
    data = {"conversations": conversation("<image>" * len(paths)), "images": paths}
    packed = pack_samples([template(data)])
    for _ in range(3):
        run(template, packed, pixel_order=order)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(template, packed, pixel_order=order)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device: on the CPU it is the rule")
def test_where_pillow_has_to_resize_the_crops_are_the_same(picture, monkeypatch):
    entries = [*entries_of(picture(1920, 1080)), *entries_of(picture(3100, 1500))]
    wanted = load(entries)
    monkeypatch.setattr(stacks, "kernels_match_pillow", lambda: False)
    for (got, _), (expected, _) in zip(load(entries), wanted, strict=True):
        assert torch.equal(got, expected)


def test_stacks_of_nothing_are_empty():
    for order in ("pillow", "serving"):
        options = ImageOptions(
            image_size=8, patch_image_size=4, device=DEVICE, dtype=torch.float32, pixel_order=order
        )
        images, broken = stacks.load_stacks([], options)
        assert {kind: stack.shape for kind, stack in images.items()} == {
            0: (0, 3, 8, 8),
            1: (0, 3, 4, 4),
        }
        assert broken == []
