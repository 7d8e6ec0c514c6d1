"""The provider has the seed's fields and defaults, and its packs work where Megatron takes them."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import step37_data.provider
from step37_data import flickr8k_loader
from step37_data.flickr8k_loader import Step37Flickr8kDataset, prepare_flickr8k_samples
from step37_data.pack_transform import pack_samples
from step37_data.packed_dataloader import MixedPackedDataloader
from step37_data.provider import (
    Step37Flickr8kSFTDataProvider,
    _FixedPackDataset,
    collate_single_pack,
)
from step37_data.template import Step37MultimodalTemplate
from tests.data.ranks import in_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
TOKENIZER = str(EXAMPLES / "tokenizer")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(EXAMPLES / "flickr8k_mini" / "train", tmp_path / "data" / "train")
    return tmp_path / "data"


def provider_of(folder: Path, **fields: Any) -> Step37Flickr8kSFTDataProvider:
    defaults = {"tokenizer_path": TOKENIZER, "cache_dir": str(folder), "max_packing_seqlen": 450}
    return Step37Flickr8kSFTDataProvider(**(defaults | fields))


def assert_same_pack(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == right[key].dtype
            assert torch.equal(value, right[key]), key
        else:
            assert value == right[key], key
            assert all(type(image) is tuple for image in right[key])


def test_the_fields_and_defaults_are_those_of_the_replaced_provider() -> None:
    provider = Step37Flickr8kSFTDataProvider(tokenizer_path="t")
    expected = {
        "tokenizer_path": "t",
        "repo_id": "intro/flickr8k",
        "split": "train",
        "sample_count": 8,
        "caption_key": "caption_0",
        "cache_dir": ".cache/step37_flickr8k",
        "prompt": "Describe this image in one sentence.",
        "image_token_count": 169,
        "patch_token_count": 81,
        "image_token": "<im_patch>",
        "image_start_token": "<im_start>",
        "image_end_token": "<im_end>",
        "patch_start_token": "<patch_start>",
        "patch_end_token": "<patch_end>",
        "max_packing_seqlen": 2048,
        "seqlen_divisible_by": 64,
        "oversize_policy": "drop",
        "dataset_sampling": "random",
        "fixed_pack_idx": None,
        "img_start_token_id": -1,
        "patch_start_token_id": -1,
        "image_size": 728,
        "patch_image_size": 504,
        "encoder_patch_size": 14,
        "seq_length": 2048,
        "dataloader_type": "single",
        "skip_getting_attention_mask_from_dataset": True,
        "global_data_keys": ["cu_seqlens", "position_id"],
    }
    assert {name: getattr(provider, name) for name in expected} == expected
    with pytest.raises(TypeError, match="tokenizer_path"):
        Step37Flickr8kSFTDataProvider()
    with pytest.raises(TypeError, match="positional"):
        Step37Flickr8kSFTDataProvider("t")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("seqlen_divisible_by", 0, "expected at least 1, got 0"),
        ("seqlen_divisible_by", 64.0, "expected an integer, got 64.0"),
        ("max_packing_seqlen", 0, "expected at least 1, got 0"),
        ("packing", "best", "expected one of next_fit, best_fit, balanced, got 'best'"),
        ("packing_window", 0, "expected at least 1, got 0"),
        ("dataset_sampling", "sorted", "expected one of sequential, random, got 'sorted'"),
        ("oversize_policy", "cut", "expected one of drop, extend, got 'cut'"),
    ],
)
def test_a_wrong_field_is_refused_where_it_is_given_and_before_anything_is_downloaded(
    tmp_path: Path, name: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        provider_of(tmp_path, **{name: value})
    provider = provider_of(tmp_path)
    setattr(provider, name, value)
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        provider.build_datasets(None)
    assert not list(tmp_path.iterdir())


def test_the_packs_are_those_of_the_parts_put_together(folder: Path) -> None:
    train, valid, test = provider_of(folder).build_datasets(None)
    assert (valid, test) == (None, None)
    template = Step37MultimodalTemplate(tokenizer_path=TOKENIZER, max_sequence_length=450)
    samples = prepare_flickr8k_samples(cache_dir=folder)
    dataset = Step37Flickr8kDataset(samples, template, "Describe this image in one sentence.")
    by_hand = MixedPackedDataloader([dataset], [1.0], 450, "drop", pack_samples, "random")
    assert len(train) == len(by_hand) == 4
    for number in range(len(train)):
        assert_same_pack(by_hand[number], train[number])


def test_the_start_token_ids_come_from_the_tokenizer_unless_set(folder: Path) -> None:
    provider = provider_of(folder)
    provider.build_datasets(None)
    tokenizer = Step37MultimodalTemplate(tokenizer_path=TOKENIZER).tokenizer
    assert provider.img_start_token_id == tokenizer.convert_tokens_to_ids("<im_start>")
    assert provider.patch_start_token_id == tokenizer.convert_tokens_to_ids("<patch_start>")
    chosen = provider_of(folder, img_start_token_id=128000, patch_start_token_id=0)
    chosen.build_datasets(None)
    assert (chosen.img_start_token_id, chosen.patch_start_token_id) == (128000, 0)


def test_a_fixed_pack_is_given_for_every_index_behind_a_length_of_ten_million(
    folder: Path,
) -> None:
    packs, _, _ = provider_of(folder).build_datasets(None)
    fixed, _, _ = provider_of(folder, fixed_pack_idx=6).build_datasets(None)
    assert isinstance(fixed, _FixedPackDataset)
    assert len(fixed) == 10_000_000
    for index in (0, 5, 9_999_999):
        assert_same_pack(packs[6 % len(packs)], fixed[index])
    fixed._SENTINEL_LEN = 3
    assert len(list(fixed)) == 3
    assert fixed.collate_fn is collate_single_pack


def test_collate_unwraps_a_batch_of_one_and_refuses_more(folder: Path) -> None:
    packs, _, _ = provider_of(folder).build_datasets(None)
    assert packs.collate_fn([packs[0]]).keys() == packs[0].keys()
    for batch in ([], [packs[0], packs[1]]):
        with pytest.raises(ValueError, match=f"needs micro_batch_size=1, got {len(batch)}"):
            packs.collate_fn(batch)


def test_the_options_reach_the_packs(folder: Path) -> None:
    options = {"packing": "best_fit", "dataset_sampling": "sequential", "seqlen_divisible_by": 48,
               "sample_count": 5, "caption_key": "caption_2", "prompt": "What is it?"}  # fmt: skip
    packs, _, _ = provider_of(folder, **options).build_datasets(None)
    paths = {path for i in range(len(packs)) for path, _ in packs[i]["image_paths"]}
    assert len(paths) == 5
    assert all(len(packs[i]["tokens"]) % 48 == 0 for i in range(len(packs)))
    decode = packs.datasets[0].template.tokenizer.decode
    assert "What is it?" in decode(packs[0]["tokens"].tolist())


def test_a_sample_that_was_cut_inside_its_image_is_refused(folder: Path) -> None:
    packs, _, _ = provider_of(folder).build_datasets(None)
    sample = packs.datasets[0][0]
    cut = {key: value[:100] for key, value in sample.items()}
    with pytest.raises(ValueError, match=r"pieces\[1\]: token 3 at position 5 .* 169 rows, and 93"):
        packs.transform([sample, cut])


def test_a_second_start_does_not_tokenise(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _, _ = provider_of(folder).build_datasets(None)
    assert list((folder / ".cache" / "step37_lengths").iterdir())

    def refuse(*_: Any) -> Any:
        raise AssertionError("a sample was tokenised")

    monkeypatch.setattr(Step37MultimodalTemplate, "__call__", refuse)
    second, _, _ = provider_of(folder).build_datasets(None)
    assert second.schedule_fingerprint() == first.schedule_fingerprint()
    with pytest.raises(AssertionError, match="a sample was tokenised"):
        provider_of(folder, prompt="Another one?").build_datasets(None)


def test_the_cache_of_lengths_can_be_elsewhere_or_off(folder: Path, tmp_path: Path) -> None:
    provider_of(folder, lengths_cache_dir=str(tmp_path / "lengths")).build_datasets(None)
    provider_of(folder, cache_lengths=False).build_datasets(None)
    assert list((tmp_path / "lengths").iterdir())
    assert not (folder / ".cache").exists()


def test_a_wrong_tokenizer_is_reported_before_anything_is_downloaded(tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError)):
        provider_of(tmp_path / "new", tokenizer_path=str(tmp_path)).build_datasets(None)
    assert not (tmp_path / "new").exists()


def build_in_rank(_rank: int, folder: Path) -> tuple[str, int]:
    tokenised = 0
    call = Step37MultimodalTemplate.__call__

    def count(self: Any, data: Any) -> Any:
        nonlocal tokenised
        tokenised += 1
        return call(self, data)

    Step37MultimodalTemplate.__call__ = count  # type: ignore[method-assign]
    packs, _, _ = provider_of(folder).build_datasets(None)
    return packs.schedule_fingerprint(), tokenised


def test_one_rank_measures_the_lengths_for_all(folder: Path) -> None:
    outcomes = in_ranks(3, build_in_rank, folder)
    assert [tokenised for _, tokenised in outcomes] == [8, 0, 0]
    assert len({fingerprint for fingerprint, _ in outcomes}) == 1


class PretrainingSampler:
    """Deals micro-batches to data-parallel ranks in order, as Megatron's sampler of that name.

    A stand-in: that sampler is part of Megatron-Bridge, which does not install without a GPU.
    """

    def __init__(self, total: int, consumed: int, rank: int, size: int) -> None:
        self.total, self.consumed, self.rank, self.size = total, consumed, rank, size

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(self.consumed, self.total - self.size + 1, self.size):
            yield [first + self.rank]


@pytest.mark.parametrize(("workers", "context"), [(0, None), (2, "fork"), (1, "spawn")])
def test_a_dataloader_under_megatrons_sampler_gives_every_rank_its_packs(
    folder: Path, workers: int, context: str | None
) -> None:
    packs, _, _ = provider_of(folder).build_datasets(None)
    for rank in range(2 if context != "spawn" else 1):
        loader: Any = torch.utils.data.DataLoader(
            packs,
            batch_sampler=PretrainingSampler(len(packs), 0, rank, 2),
            num_workers=workers,
            multiprocessing_context=context,
            collate_fn=packs.collate_fn,
        )
        got = list(loader)
        assert len(got) == 2
        for step, pack in enumerate(got):
            assert_same_pack(packs[2 * step + rank], pack)


def test_iterating_continues_where_megatrons_consumed_samples_would(folder: Path) -> None:
    packs, _, _ = provider_of(folder).build_datasets(None)
    for consumed in range(3):
        for rank in range(2):
            packs.position = consumed
            stream = packs.iterate(dp_rank=rank, dp_size=2)
            for (index,) in PretrainingSampler(len(packs), consumed, rank, 2):
                assert_same_pack(packs[index], next(stream))


def load_provider_with(monkeypatch: pytest.MonkeyPatch, modules: dict[str, Any]) -> Any:
    """The provider module, imported anew where ``modules`` can be imported.

    Megatron-Bridge does not install without a GPU: its base class is rebuilt here by shape.
    """
    for name in ("megatron", "megatron.bridge", "megatron.bridge.data"):
        package = types.ModuleType(name)
        package.__path__ = []  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, package)
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    file = step37_data.provider.__file__
    spec = importlib.util.spec_from_file_location("provider_beside_megatron", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "provider_beside_megatron", module)
    spec.loader.exec_module(module)
    return module


@dataclasses.dataclass(kw_only=True)
class DataloaderConfig:
    dataloader_type: str | None = None
    num_workers: int = 7


@dataclasses.dataclass
class DatasetProvider(DataloaderConfig, ABC):
    @abstractmethod
    def build_datasets(self, context: Any) -> Any: ...


@pytest.mark.parametrize("place", ["megatron.bridge.data.base", "megatron.bridge.training.config"])
def test_beside_megatron_bridge_the_provider_is_one_of_its_providers(
    monkeypatch: pytest.MonkeyPatch, folder: Path, place: str
) -> None:
    parent = types.ModuleType("megatron.bridge.training")
    parent.__path__ = []  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron.bridge.training", parent)
    module = load_provider_with(monkeypatch, {place: {"DatasetProvider": DatasetProvider}})
    provider = module.Step37Flickr8kSFTDataProvider(
        tokenizer_path=TOKENIZER, cache_dir=str(folder), max_packing_seqlen=450
    )
    assert isinstance(provider, DatasetProvider)
    assert provider.num_workers == 7
    assert provider.dataloader_type == "single"
    assert len(provider.build_datasets(None)[0]) == 4


def test_a_broken_megatron_bridge_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "megatron.bridge.data.base":
                raise ModuleNotFoundError("No module named 'nvtx'", name="nvtx")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="nvtx"):
        load_provider_with(monkeypatch, {})


def test_every_field_reaches_the_part_it_is_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def recorded(name: str) -> Any:
        real = getattr(step37_data.provider, name)

        def call(*arguments: Any, **options: Any) -> Any:
            given.update(options)
            return real(*arguments, **options)

        return call

    for name in ("Step37MultimodalTemplate", "prepare_flickr8k_samples", "pack_captions"):
        monkeypatch.setattr(step37_data.provider, name, recorded(name))
    fields = {
        "caption_key": "caption_3",
        "revision": None,
        "packing_window": 17,
        "probe_workers": 1,
        "multicrop": True,
        "max_packing_seqlen": 2999,
    }
    provider_of(folder, **fields).build_datasets(None)
    fields["max_sequence_length"] = fields["max_length"] = fields.pop("max_packing_seqlen")
    assert {name: given[name] for name in fields} == fields


def test_a_start_reads_the_metadata_once_and_hashes_every_caption_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for owner, name in (
        (flickr8k_loader, "read_flickr8k_metadata"),
        (Step37Flickr8kDataset, "sample_keys"),
    ):
        real = getattr(owner, name)

        def counted(*arguments: Any, real: Any = real, name: str = name) -> Any:
            calls.append(name)
            return real(*arguments)

        monkeypatch.setattr(owner, name, counted)
    packs, _, _ = provider_of(folder).build_datasets(None)
    packs.load_state_dict(packs.state_dict())
    assert sorted(calls) == ["read_flickr8k_metadata", "sample_keys"]


def test_a_fixed_pack_counts_modulo_the_number_of_packs() -> None:
    assert _FixedPackDataset(["a", "b"], 5)[0] == "b"
