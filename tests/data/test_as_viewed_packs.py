"""Packs say whether pictures are read as viewers show them, and crops are planned accordingly."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps

from step37_data.caches.lengths import probe_lengths
from step37_data.flickr8k_loader import Flickr8kSample, Step37Flickr8kDataset
from step37_data.forward_step import ForwardStep
from step37_data.images.crops import plan_crops
from step37_data.pack_transform import pack_samples
from step37_data.preprocess import preprocess_packed_batch
from step37_data.provider import Step37Flickr8kSFTDataProvider
from step37_data.template import Step37MultimodalTemplate
from step37_data.text.messages import CAPTION_PROMPT

EXAMPLES = Path(__file__).parents[2] / "examples"
TOKENIZER = str(EXAMPLES / "tokenizer")
PHOTO = EXAMPLES / "flickr8k_mini" / "train" / "rocket.jpg"
ORIENTATION = 0x0112
# Two crops side by side as it lies, and as many below each other as a viewer turns it.
SIZE = (900, 500)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one picture that EXIF turns, ``phone.jpg``."""
    root = tmp_path_factory.mktemp("phone")
    (root / "train").mkdir()
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.open(PHOTO).resize(SIZE).save(root / "train" / "phone.jpg", exif=exif)
    (root / "train" / "metadata.csv").write_text("file_name,caption_0\nphone.jpg,A rocket\n")
    return root


@pytest.fixture(scope="module")
def turned(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder, with the pixels turned and no EXIF."""
    root = tmp_path_factory.mktemp("turned") / "data"
    shutil.copytree(folder, root)
    with Image.open(folder / "train" / "phone.jpg") as image:
        upright = ImageOps.exif_transpose(image)
    upright.save(root / "train" / "upright.png")
    (root / "train" / "metadata.csv").write_text("file_name,caption_0\nupright.png,A rocket\n")
    return root


def template_of(**fields: Any) -> Step37MultimodalTemplate:
    pytest.importorskip("transformers")
    return Step37MultimodalTemplate(tokenizer_path=TOKENIZER, **fields)


def dataset_of(folder: Path, **fields: Any) -> Step37Flickr8kDataset:
    samples = [Flickr8kSample(str(folder / "train" / "phone.jpg"), "A rocket")]
    return Step37Flickr8kDataset(samples, template_of(**fields), CAPTION_PROMPT)


def provider_of(folder: Path, **fields: Any) -> Step37Flickr8kSFTDataProvider:
    pytest.importorskip("transformers")
    return Step37Flickr8kSFTDataProvider(
        tokenizer_path=TOKENIZER,
        cache_dir=str(folder),
        sample_count=None,
        cache_lengths=False,
        image_size=28,
        patch_image_size=14,
        **fields,
    )


def pack_of(provider: Step37Flickr8kSFTDataProvider) -> dict[str, Any]:
    pack: dict[str, Any] = provider.build_datasets(None)[0][0]
    return pack


def prepare_of(provider: Step37Flickr8kSFTDataProvider) -> Any:
    return functools.partial(
        preprocess_packed_batch,
        img_start_token_id=provider.img_start_token_id,
        patch_start_token_id=provider.patch_start_token_id,
        image_size=provider.image_size,
        patch_image_size=provider.patch_image_size,
        encoder_patch_size=provider.encoder_patch_size,
        device="cpu",
    )


def assert_same_input(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert torch.equal(got["input_ids"], expected["input_ids"])
    for ours, theirs in zip(got["images"], expected["images"], strict=True):
        assert torch.equal(ours.images, theirs.images)


@pytest.mark.parametrize("as_viewed", [False, True])
def test_the_template_plans_the_crops_of_the_size_that_is_shown(folder, as_viewed):
    sample = dataset_of(folder, multicrop=True, as_viewed=as_viewed)[0]
    plan = plan_crops(*(SIZE[::-1] if as_viewed else SIZE))
    windows = [entry[2] for entry in sample["image_paths"]]
    assert windows == [*plan.windows, plan.full_window]
    assert sample.get("as_viewed", False) is as_viewed


@pytest.mark.parametrize("multicrop", [False, True])
def test_the_packs_of_a_turned_picture_are_those_of_its_turned_pixels(folder, turned, multicrop):
    provider = provider_of(folder, as_viewed=True, multicrop=multicrop)
    plain = provider_of(turned, multicrop=multicrop)
    pack, expected = pack_of(provider), pack_of(plain)
    assert pack["as_viewed"] is True
    assert "as_viewed" not in expected
    got = prepare_of(provider)(pack, on_broken="raise")
    assert_same_input(got, prepare_of(plain)(expected, on_broken="raise"))


def test_lengths_that_were_cached_with_another_value_are_not_used(folder, tmp_path):
    def lengths(**fields: Any) -> list[int]:
        dataset = dataset_of(folder, multicrop=True, **fields)
        return probe_lengths(dataset, cache_dir=tmp_path, progress=False).tolist()

    lying, upright = lengths(), lengths(as_viewed=True)
    assert lying != upright
    assert lengths() == lying
    assert lengths(as_viewed=True) == upright
    fingerprints = {
        dataset_of(folder, multicrop=True, as_viewed=value).fingerprint() for value in (False, True)
    }
    assert len(fingerprints) == 2
    # Without crops no length depends on it, and what was measured stays valid.
    assert template_of(as_viewed=True).fingerprint() == template_of().fingerprint()


def test_the_work_of_the_vision_tower_is_counted_of_the_crops_that_are_shown(folder):
    lying = dataset_of(folder, multicrop=True).vision_tokens()
    upright = dataset_of(folder, multicrop=True, as_viewed=True).vision_tokens()
    for size, rows in ((SIZE, lying), (SIZE[::-1], upright)):
        assert rows.tolist() == [169 + 81 * len(plan_crops(*size).windows)]


@pytest.mark.parametrize("planned", [False, True])
def test_reading_otherwise_than_crops_were_planned_is_refused(folder, planned):
    provider = provider_of(folder, as_viewed=planned, multicrop=True)
    pack, prepare = pack_of(provider), prepare_of(provider)
    message = f"as_viewed: {not planned}, but the crops of this pack were planned with {planned}"
    with pytest.raises(ValueError, match=message):
        prepare(pack, as_viewed=not planned)
    assert_same_input(prepare(pack, as_viewed=planned), prepare(pack))


@pytest.mark.parametrize("planned", [False, True])
def test_without_crops_a_pack_may_be_read_otherwise_than_it_says(folder, planned):
    provider = provider_of(folder, as_viewed=planned)
    other = provider_of(folder, as_viewed=not planned)
    pack, expected = pack_of(provider), pack_of(other)
    got = prepare_of(provider)(pack, as_viewed=not planned)
    assert_same_input(got, prepare_of(other)(expected))


def test_the_forward_step_reads_a_pack_as_it_was_planned(folder, turned):
    rerun = pytest.importorskip(
        "megatron.core.rerun_state_machine", reason="megatron-core is not installed"
    )
    one = SimpleNamespace(size=lambda: 1)
    model: Any = torch.nn.Module()
    model.pg_collection = SimpleNamespace(tp=one, cp=one)
    model.pre_process = model.post_process = True

    def inputs(provider: Step37Flickr8kSFTDataProvider, **options: Any) -> dict[str, Any]:
        packs = rerun.RerunDataIterator(iter([pack_of(provider)]))
        step = ForwardStep(device="cpu", prefetch_depth=0, on_broken="raise", **options)
        return step._next(provider, packs, model)

    provider = provider_of(folder, as_viewed=True, multicrop=True)
    assert_same_input(inputs(provider), inputs(provider_of(turned, multicrop=True)))
    with pytest.raises(ValueError, match="as_viewed: False, but the crops of this pack"):
        inputs(provider, as_viewed=False)


def test_samples_that_are_read_differently_are_not_packed_together():
    sample = {"tokens": [1, 2, 3], "loss_mask": [0.0] * 3}
    with pytest.raises(ValueError, match=r"as_viewed: .* pieces\[1\] with and pieces\[0\] without"):
        pack_samples([sample, {**sample, "as_viewed": True}])
    assert "as_viewed" not in pack_samples([{**sample, "as_viewed": False}, sample])
    assert pack_samples([{**sample, "as_viewed": True}] * 2)["as_viewed"] is True
