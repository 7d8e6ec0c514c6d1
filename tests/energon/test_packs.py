"""Shards through Energon give the folder's packs, tokens and pixels, and each sample once."""

from __future__ import annotations

import contextlib
import io
import itertools
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from step37_data.common.image_entry import EncodedImage
from step37_data.preprocess import preprocess_packed_batch
from step37_data.provider import Step37Flickr8kSFTDataProvider
from tests.energon.conftest import SAMPLES, TOKENIZER

energon = pytest.importorskip("megatron.energon", reason="the extra energon is not installed")

from step37_energon import Step37TaskEncoder

TENSORS = ("tokens", "labels", "loss_masks", "cu_seqlens", "max_seq_len", "position_id")
Build = Callable[..., Any]


def packs_of(dataset: Any, count: int | None = None) -> list[dict[str, Any]]:
    # Closed: a garbage collection, of some other test, would wait for the workers of its loader.
    with contextlib.closing(iter(energon.get_loader(dataset))) as loader:
        return list(itertools.islice(loader, count))


def keys_of(packs: list[dict[str, Any]]) -> Counter[str]:
    return Counter(key for pack in packs for key in pack["__key__"])


def pixels_of(pack: dict[str, Any], encoder: Step37TaskEncoder) -> dict[str, Any]:
    return preprocess_packed_batch(
        pack,
        img_start_token_id=encoder.template.img_start_token_id,
        patch_start_token_id=encoder.template.patch_start_token_id,
        image_size=56,
        patch_image_size=42,
        encoder_patch_size=14,
        device="cpu",
    )


@pytest.mark.parametrize(
    ("packing", "buffer", "multicrop"),
    [("next_fit", SAMPLES, False), ("best_fit", 16, False), ("best_fit", 20, True)],
)
def test_packs_tokens_and_pixels_are_those_of_the_folders_provider_bit_for_bit(
    *, folder: Path, shards: Path, in_order: Build, packing: Any, buffer: int, multicrop: bool
) -> None:
    length = 1700 if multicrop else 700
    provider = Step37Flickr8kSFTDataProvider(
        tokenizer_path=TOKENIZER,
        cache_dir=str(folder),
        sample_count=None,
        dataset_sampling="sequential",
        max_packing_seqlen=length,
        packing=packing,
        packing_window=buffer,
        multicrop=multicrop,
    )
    of_folder, _, _ = provider.build_datasets(None)
    encoder = Step37TaskEncoder(
        TOKENIZER, max_packing_seqlen=length, packing=packing, multicrop=multicrop
    )
    of_shards = packs_of(in_order(shards, encoder, packing_buffer_size=buffer))
    assert len(of_shards) == len(of_folder) > 5
    most_groups = 0
    for left, right in zip(of_folder, of_shards, strict=True):
        for name in TENSORS:
            assert left[name].dtype == right[name].dtype
            assert torch.equal(left[name], right[name]), name
        left, right = pixels_of(left, encoder), pixels_of(right, encoder)
        assert left.keys() == right.keys()
        assert len(left["images"]) == len(right["images"])
        most_groups = max(most_groups, len(right["images"]))
        for one, other in zip(left["images"], right["images"], strict=True):
            assert one.insert_start_token == other.insert_start_token
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.rope_cu_seqlens, other.rope_cu_seqlens)
    assert most_groups == 1 + multicrop


def encoded(encoder: Step37TaskEncoder, key: str, words: int, pictures: list[bytes]) -> Any:
    images: list[Any] = [EncodedImage(f"{key}.{i}.png", each) for i, each in enumerate(pictures)]
    content = "<image>" * len(images) + " what? " + "word " * words
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "This."}]
    keys = {"__key__": key, "__restore_key__": (), "__subflavors__": {}}
    return encoder.encode_sample({**keys, "conversations": messages, "images": images})


@pytest.mark.parametrize("multicrop", [False, True])
def test_balanced_packs_of_a_buffer_are_alike_in_the_rows_that_the_vision_tower_makes(
    multicrop: bool,
) -> None:
    photograph = io.BytesIO()
    Image.new("RGB", (800, 600)).save(photograph, "PNG")
    encoder = Step37TaskEncoder(TOKENIZER, packing="balanced", multicrop=multicrop)
    row = encoder.template.tokenizer.convert_tokens_to_ids("<im_patch>")
    samples = [encoded(encoder, f"{i}", 0, [photograph.getvalue()]) for i in range(16)]
    # Texts as long as a picture: the sizes tell nothing about the rows.
    short, long = (len(encoded(encoder, "text", words, [])) for words in (1, 101))
    words = 100 * (len(samples[0]) - short) // (long - short)
    samples += [encoded(encoder, f"text{i}", words, []) for i in range(16)]
    encoder.max_packing_seqlen = 4 * len(samples[0]) + 40
    packs = encoder.select_samples_to_pack(samples)
    assert sum(map(len, packs)) == len(samples)
    of_sample = [int((sample["tokens"] == row).sum()) for sample in samples]
    assert [encoder._vision_tokens(sample) for sample in samples] == of_sample
    rows = [sum(int((one["tokens"] == row).sum()) for one in pack) for pack in packs]
    assert rows == [2 * of_sample[0]] * 8


@pytest.mark.parametrize("batch_size", [1, None])
def test_two_workers_and_two_ranks_give_every_sample_once(
    shards: Path, in_order: Build, batch_size: int | None
) -> None:
    packs = []
    for rank in range(2):
        encoder = Step37TaskEncoder(TOKENIZER, max_packing_seqlen=700)
        ranks = {"rank": rank, "world_size": 2, "num_workers": 2}
        packs += packs_of(in_order(shards, encoder, batch_size=batch_size, **ranks))
    assert keys_of(packs) == Counter(f"{number:09d}" for number in range(SAMPLES))
    assert all(len(pack["tokens"]) % 64 == 0 for pack in packs)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_state_saved_in_the_middle_of_a_buffer_loses_and_doubles_nothing(
    shards: Path, in_order: Build, num_workers: int
) -> None:
    def loader() -> Any:
        encoder = Step37TaskEncoder(TOKENIZER, max_packing_seqlen=500, packing="best_fit")
        dataset = in_order(shards, encoder, num_workers=num_workers, packing_buffer_size=9)
        # Energon keeps its checkpoints by time; here every pack is one.
        options = {"checkpoint_every_sec": 0, "checkpoint_every_min_n_samples": 1}
        return energon.get_savable_loader(dataset, **options)

    whole = list(loader())
    assert len(whole) > 15
    # Not 1: of a worker that has not begun Energon 7.4 may save that it gave a pack; the provider
    # mends that.
    for stop in (2, 4, 6, 13):
        first = loader()
        with contextlib.closing(iter(first)) as taken:
            before = list(itertools.islice(taken, stop))
            state = pickle.loads(pickle.dumps(first.save_state_rank()))
        second = loader()
        second.restore_state_rank(state)
        after = list(second)
        assert [pack["__key__"] for pack in before + after] == [pack["__key__"] for pack in whole]
        for left, right in zip(whole[stop:], after, strict=True):
            assert all(torch.equal(left[name], right[name]) for name in TENSORS)
            assert left["image_paths"] == right["image_paths"]


def test_two_data_sets_are_blended_by_weight(
    shards: Path, in_order: Build, tmp_path: Path, folder: Path
) -> None:
    from step37_inspect.cli import main

    assert main(["shard", str(folder), str(tmp_path / "few"), "--sample-count", "6"]) == 0
    (tmp_path / "blend.yaml").write_text(
        "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n    blend:\n"
        f"    - {{path: '{shards}', weight: 3, subflavors: {{of: many}}}}\n"
        f"    - {{path: '{tmp_path / 'few'}', weight: 1, subflavors: {{of: few}}}}\n"
    )
    encoder = Step37TaskEncoder(TOKENIZER, max_packing_seqlen=700)
    options = {"repeat": True, "packing_buffer_size": 8}
    packs = packs_of(in_order(tmp_path / "blend.yaml", encoder, **options), 250)
    drawn = Counter(flavor["of"] for pack in packs for flavor in pack["__subflavors__"])
    assert drawn.total() > 500
    # Energon draws by chance: four standard deviations.
    share = drawn["many"] / drawn.total()
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / drawn.total()) ** 0.5


def test_the_encoder_and_its_packs_can_be_pickled(shards: Path, in_order: Build) -> None:
    encoder = pickle.loads(pickle.dumps(Step37TaskEncoder(TOKENIZER, max_packing_seqlen=700)))
    (pack,) = packs_of(in_order(shards, encoder), 1)
    other = pickle.loads(pickle.dumps(pack))
    assert other["image_paths"] == pack["image_paths"]
    assert repr(other["image_paths"][0][0]) == "EncodedImage(name='000000000.jpg')"
