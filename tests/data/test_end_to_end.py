"""From a folder of JPEGs to fused embeddings, the same with any number of workers and any resume.

64 real photographs in the layout of the data set: the eight of ``examples``, cropped and turned.
The vision tower is a stand-in (pooling to 13×13 cells and a fixed projection): the real one is
part of the user's model, and all that matters here is that its rows come from the right image.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from step37_data import preprocess, template
from step37_data.preprocess import load_images, preprocess_packed_batch
from step37_data.provider import Step37Flickr8kSFTDataProvider
from step37_kernels import ImageInsertEmbedding

EXAMPLES = Path(__file__).parents[2] / "examples"
SAMPLES, PACKS_AT_LEAST = 64, 16
SIDE, CHANNELS, HIDDEN = 52, 12, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("flickr") / "train"
    target.mkdir()
    with (EXAMPLES / "flickr8k_mini/train/metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    with (target / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "caption_0"])
        for number in range(SAMPLES):
            row = rows[number % 8]
            picture = Image.open(EXAMPLES / "flickr8k_mini/train" / row["file_name"])
            width, height = picture.size
            left, top = (number // 8) * width // 40, (number // 8) * height // 50
            crop = picture.crop((left, top, left + width // 2, top + height // 2))
            crop.rotate(90 * (number % 4), expand=True).save(target / f"{number:02}.jpg")
            words = row[f"caption_{number % 5}"].split()
            writer.writerow([f"{number:02}.jpg", " ".join(words[: 3 + number % 9])])
    return target.parent


@pytest.fixture(scope="module")
def provider(folder: Path) -> Step37Flickr8kSFTDataProvider:
    return Step37Flickr8kSFTDataProvider(
        tokenizer_path=str(EXAMPLES / "tokenizer"),
        cache_dir=str(folder),
        sample_count=None,
        max_packing_seqlen=900,
        image_size=SIDE,
    )


@pytest.fixture(scope="module")
def packs(provider: Step37Flickr8kSFTDataProvider) -> Any:
    train, _, _ = provider.build_datasets(None)
    assert len(train) >= PACKS_AT_LEAST
    return train


class WordEmbedding(torch.nn.Module):
    """``[B, S]`` ids to ``[S, B, H]``, called as Megatron's embedding is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(1024, HIDDEN)

    def forward(self, *, input_ids: torch.Tensor, position_ids: Any) -> torch.Tensor:  # noqa: ARG002
        return self.table(input_ids).transpose(0, 1).contiguous()


class Model:
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.to_channels = torch.randn(3, CHANNELS, generator=generator)
        torch.manual_seed(0)
        self.embedding = ImageInsertEmbedding(WordEmbedding(), CHANNELS, HIDDEN, strict=True)

    def tower(self, images: torch.Tensor) -> torch.Tensor:
        """``[N, 3, 52, 52]`` to ``[N, 169, C]``."""
        cells = torch.nn.functional.avg_pool2d(images.float(), SIDE // 13).flatten(2)
        return cells.transpose(1, 2) @ self.to_channels

    def fuse(self, packed: dict[str, Any], provider: Any) -> torch.Tensor:
        """``[S, B, H]`` with the projected rows of the pack's images in place."""
        inputs = preprocess_packed_batch(
            packed,
            img_start_token_id=provider.img_start_token_id,
            patch_start_token_id=provider.patch_start_token_id,
            image_size=provider.image_size,
            patch_image_size=provider.patch_image_size,
            encoder_patch_size=provider.encoder_patch_size,
            only_pp_first_stage=False,
            device="cpu",
        )
        for group in inputs["images"]:
            group.image_features = self.tower(group.images)
        return self.embedding(inputs["input_ids"], inputs["images"], inputs["position_id"]).detach()


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


@pytest.fixture(scope="module")
def fused(packs: Any, provider: Any, model: Model) -> list[torch.Tensor]:
    return [model.fuse(packs[i], provider) for i in range(len(packs))]


def in_order(packs: Any, workers: int) -> Iterator[dict[str, Any]]:
    loader: Any = torch.utils.data.DataLoader(
        packs, batch_size=1, num_workers=workers, collate_fn=packs.collate_fn
    )
    return iter(loader)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_fused_embeddings_are_the_same_with_any_number_of_workers(
    *, packs: Any, provider: Any, model: Model, fused: list[torch.Tensor], workers: int
) -> None:
    count = 0
    for packed, expected in zip(in_order(packs, workers), fused, strict=True):
        assert torch.equal(model.fuse(packed, provider), expected)
        count += 1
    assert count == len(packs)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_resume_at_every_position_continues_the_same_batches(packs: Any, workers: int) -> None:
    everything = [packs[i] for i in range(len(packs))]
    for position in range(len(packs)):
        packs.load_state_dict({"position": position, "schedule": packs.schedule_fingerprint()})
        # The whole rest without workers; with them, which have to be started, the next steps.
        steps = len(packs) - position if workers == 0 else 2
        rest = itertools.islice(packs.iterate(num_workers=workers), steps)
        for offset, packed in enumerate(rest):
            expected = everything[(position + offset) % len(packs)]
            assert torch.equal(packed["tokens"], expected["tokens"])
            assert torch.equal(packed["loss_masks"], expected["loss_masks"])
            assert packed["image_paths"] == expected["image_paths"]
        assert packs.position == position + steps


def test_every_sample_of_the_epoch_is_in_exactly_one_pack(packs: Any, folder: Path) -> None:
    paths = [path for i in range(len(packs)) for path, _ in packs[i]["image_paths"]]
    assert sorted(paths) == sorted(str(path) for path in (folder / "train").glob("*.jpg"))


def test_every_image_lands_in_the_sub_sequence_of_the_sample_that_owns_it(
    packs: Any, provider: Any, model: Model, fused: list[torch.Tensor]
) -> None:
    dataset = packs.datasets[0]
    weight = model.embedding.align_projector.weight
    for number in range(len(packs)):
        packed = packs[number]
        bounds = packed["cu_seqlens"].tolist()
        for place, (_, index) in enumerate(packs.pieces(number)):
            sample = dataset.samples[index]
            ids = packed["tokens"][bounds[place] : bounds[place + 1]]
            (start,) = torch.nonzero(ids == provider.img_start_token_id).flatten().tolist()
            first = bounds[place] + start + 1
            loaded = load_images(
                [(sample.image_path, 0)], image_size=SIDE, patch_image_size=504,
                dtype=torch.bfloat16,
            )  # fmt: skip
            rows = model.tower(loaded[0][0][None])[0] @ weight.T
            torch.testing.assert_close(fused[number][first : first + 169, 0], rows)
            # And the words around it are this sample's own.
            tail = ids[start + 171 :]
            decoded = dataset.template.tokenizer.decode(tail.tolist())
            assert sample.caption in decoded


def test_the_item_types_of_template_and_preprocess_are_the_same_numbers() -> None:
    assert template.IMAGE_ITEM_TYPE == preprocess.IMAGE_ITEM_TYPE
    assert template.PATCH_ITEM_TYPE == preprocess.PATCH_ITEM_TYPE
