"""The data set provider of Megatron-Bridge for packed Flickr8k, usable without Megatron too."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from step37_data.flickr8k_loader import Step37Flickr8kDataset, prepare_flickr8k_samples
from step37_data.lengths import LengthCache, probe_lengths
from step37_data.pack_transform import pack_samples
from step37_data.packed_dataloader import MixedPackedDataloader
from step37_data.rank_order import fill_cache_once
from step37_data.template import (
    IMAGE_END_TOKEN,
    IMAGE_START_TOKEN,
    IMAGE_TOKEN,
    IMAGE_TOKEN_COUNT,
    PATCH_END_TOKEN,
    PATCH_START_TOKEN,
    PATCH_TOKEN_COUNT,
    Step37MultimodalTemplate,
)

_UNSET_ID = -1


@dataclass(kw_only=True)
class _StandaloneProvider:
    """The fields that Megatron-Bridge's base class brings, with its defaults."""

    dataloader_type: Literal["single", "cyclic", "batch", "external"] | None = None
    num_workers: int = 2
    data_sharding: bool = True
    pin_memory: bool = True
    drop_last: bool = True
    persistent_workers: bool = True
    trust_remote_code: bool | None = None


def _provider_base() -> Any:
    """``DatasetProvider`` of Megatron-Bridge, newest place first; a stand-in where it is absent."""
    try:
        from megatron.bridge.data.base import DatasetProvider

        return DatasetProvider
    except ModuleNotFoundError as error:
        _require_megatron_missing(error)
    try:
        from megatron.bridge.training.config import DatasetProvider

        return DatasetProvider
    except ModuleNotFoundError as error:
        _require_megatron_missing(error)
    return _StandaloneProvider


def _require_megatron_missing(error: ModuleNotFoundError) -> None:
    """Let an installed but broken Megatron-Bridge say what it lacks."""
    if error.name is None or error.name.partition(".")[0] != "megatron":
        raise error


_Base: Any = _provider_base()


class _FixedPackDataset(torch.utils.data.Dataset[Any]):
    """Gives the same pack for every index, so that every rank and step sees identical input.

    Its length is a large constant, because Megatron-Bridge compares it with the global batch size
    times the number of iterations.
    """

    _SENTINEL_LEN = 10_000_000

    def __init__(self, inner: Any, fixed_idx: int) -> None:
        self._inner = inner
        self._fixed_idx = fixed_idx % len(inner)
        if hasattr(inner, "collate_fn"):
            self.collate_fn = inner.collate_fn

    def __len__(self) -> int:
        return self._SENTINEL_LEN

    def __iter__(self) -> Iterator[Any]:
        return (self[idx] for idx in range(len(self)))

    def __getitem__(self, idx: int) -> Any:
        return self._inner[self._fixed_idx]


@dataclass(kw_only=True)
class Step37Flickr8kSFTDataProvider(_Base):
    """Packed Flickr8k for supervised fine-tuning of Step-3.7.

    Set it as ``cfg.dataset`` of a Megatron-Bridge recipe, or call ``build_datasets(None)`` and hand
    the result and its ``collate_fn`` to a ``torch.utils.data.DataLoader``.
    """

    tokenizer_path: str
    """Folder with ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja``."""

    repo_id: str = "intro/flickr8k"
    split: str = "train"
    sample_count: int | None = 8
    """The first N samples, 8 for a smoke run; None takes all (about 6000 images, 1 GB)."""
    caption_key: str = "caption_0"
    cache_dir: str = ".cache/step37_flickr8k"
    prompt: str = "Describe this image in one sentence."
    revision: str | None = None
    """Branch, tag or commit of the data set; None is the default branch."""

    image_token_count: int = IMAGE_TOKEN_COUNT
    patch_token_count: int = PATCH_TOKEN_COUNT
    image_token: str = IMAGE_TOKEN
    image_start_token: str = IMAGE_START_TOKEN
    image_end_token: str = IMAGE_END_TOKEN
    patch_start_token: str = PATCH_START_TOKEN
    patch_end_token: str = PATCH_END_TOKEN

    multicrop: bool = False
    """See pictures as the model was trained to: in crops besides the full image. Samples become
    longer: a photograph of 500×333 takes 337 tokens in place of 171, one of 1920×1080 takes 836,
    one of 4032×3024 takes 2665, which needs a larger ``max_packing_seqlen``. Lengths are read from
    the headers of the image files."""

    max_packing_seqlen: int = 2048
    """Tokens in a pack."""
    seqlen_divisible_by: int = 64
    oversize_policy: Literal["drop", "extend"] = "drop"
    dataset_sampling: Literal["sequential", "random"] = "random"
    packing: Literal["next_fit", "best_fit"] = "next_fit"
    """``"best_fit"`` reorders samples within ``packing_window`` draws for fuller packs."""
    packing_window: int = 4096
    fixed_pack_idx: int | None = None
    """Give this one pack for every index: a deterministic overfit. None for training."""

    cache_lengths: bool = True
    """Keep the lengths of samples on disk, so that a second start does not tokenise."""
    lengths_cache_dir: str | None = None
    """Folder of the lengths; None is ``.cache/step37_lengths`` in ``cache_dir``."""
    probe_workers: int | None = None
    """Processes that measure lengths; None decides by the size of the data set."""

    img_start_token_id: int = _UNSET_ID
    """Id of ``image_start_token``; -1 takes it from the tokenizer when the data set is built."""
    patch_start_token_id: int = _UNSET_ID
    """Id of ``patch_start_token``; -1 as above."""
    image_size: int = 728
    patch_image_size: int = 504
    encoder_patch_size: int = 14

    seq_length: int = 2048
    dataloader_type: Literal["single", "cyclic", "batch", "external"] | None = "single"
    skip_getting_attention_mask_from_dataset: bool = True
    global_data_keys: list[str] = field(default_factory=lambda: ["cu_seqlens", "position_id"])
    """Batch keys that every pipeline stage needs."""

    def build_datasets(self, context: Any) -> tuple[Any, None, None]:  # noqa: ARG002
        """Prepare the data and return ``(train, None, None)``: there is no other split.

        In a process group every rank calls this; one downloads and measures lengths, the others
        wait and read (see ``fill_cache_once``).

        Args:
            context: Megatron-Bridge's build context; nothing in it is needed, None will do.

        Returns:
            A map-style data set of packed dictionaries with a ``collate_fn``, and two None.
        """
        packs = self._build_train_packed_dataloader()
        packs.collate_fn = collate_single_pack  # type: ignore[attr-defined]
        if self.fixed_pack_idx is not None:
            return _FixedPackDataset(packs, self.fixed_pack_idx), None, None
        return packs, None, None

    def _make_template(self) -> Step37MultimodalTemplate:
        return Step37MultimodalTemplate(
            tokenizer_path=self.tokenizer_path,
            image_token_count=self.image_token_count,
            patch_token_count=self.patch_token_count,
            image_token=self.image_token,
            image_start_token=self.image_start_token,
            image_end_token=self.image_end_token,
            patch_start_token=self.patch_start_token,
            patch_end_token=self.patch_end_token,
            max_sequence_length=self.max_packing_seqlen,
            multicrop=self.multicrop,
        )

    def _resolve_special_token_ids(self, template: Step37MultimodalTemplate) -> None:
        if self.img_start_token_id < 0:
            self.img_start_token_id = template.img_start_token_id
        if self.patch_start_token_id < 0:
            self.patch_start_token_id = template.patch_start_token_id

    def _build_train_packed_dataloader(self) -> MixedPackedDataloader:
        # First, because it is quick: a wrong tokenizer is reported before an hour of download.
        template = self._make_template()
        self._resolve_special_token_ids(template)
        samples = prepare_flickr8k_samples(
            repo_id=self.repo_id,
            split=self.split,
            sample_count=self.sample_count,
            caption_key=self.caption_key,
            cache_dir=self.cache_dir,
            revision=self.revision,
        )
        dataset = Step37Flickr8kDataset(samples, template, self.prompt)
        lengths_cache = self._lengths_cache()
        if lengths_cache is not None:
            fill_cache_once(
                functools.partial(self._probe, dataset, lengths_cache),
                lambda: bool((LengthCache(lengths_cache, dataset).look_up() >= 0).all()),
                what="measuring sample lengths",
            )
        return MixedPackedDataloader(
            datasets=[dataset],
            epochs=[1.0],
            max_length=self.max_packing_seqlen,
            oversize_policy=self.oversize_policy,
            transform=functools.partial(
                pack_samples,
                seqlen_divisible_by=self.seqlen_divisible_by,
                start_token_ids={
                    self.img_start_token_id: template.image_token_count,
                    self.patch_start_token_id: template.patch_token_count,
                },
            ),
            dataset_sampling=self.dataset_sampling,
            packing=self.packing,
            packing_window=self.packing_window,
            lengths_cache_dir=lengths_cache,
            probe_workers=self.probe_workers,
        )

    def _lengths_cache(self) -> Path | None:
        if not self.cache_lengths:
            return None
        if self.lengths_cache_dir is not None:
            return Path(self.lengths_cache_dir).expanduser()
        return Path(self.cache_dir).expanduser() / ".cache" / "step37_lengths"

    def _probe(self, dataset: Step37Flickr8kDataset, cache_dir: Path) -> None:
        probe_lengths(dataset, cache_dir=cache_dir, workers=self.probe_workers)


def collate_single_pack(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """Unwrap a batch of one pack.

    Raises:
        ValueError: the batch holds another number of packs.
    """
    if len(batch) != 1:
        raise ValueError(
            f"Step37Flickr8kSFTDataProvider needs micro_batch_size=1, got {len(batch)}: a pack "
            "already holds many samples; raise max_packing_seqlen for larger batches"
        )
    return batch[0]
