"""Provides packed Flickr8k to Megatron-Bridge as its data set; works without Megatron too."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import torch

from step37_data.common.checks import checked_int
from step37_data.flickr8k_loader import pack_captions, prepare_flickr8k_samples
from step37_data.packed_dataloader import MixedPackedDataloader
from step37_data.packing import OversizePolicy, Packing, Sampling, ScheduleSettings
from step37_data.template import Step37MultimodalTemplate
from step37_data.text.messages import CAPTION_PROMPT
from step37_data.text.tokens import ImageTokens


@dataclass(kw_only=True)
class _StandaloneProvider:
    """The fields of Megatron-Bridge's base class, with its defaults."""

    dataloader_type: Literal["single", "cyclic", "batch", "external"] | None = None
    num_workers: int = 2
    data_sharding: bool = True
    pin_memory: bool = True
    drop_last: bool = True
    persistent_workers: bool = True
    trust_remote_code: bool | None = None


def _provider_base() -> Any:
    """Import Megatron-Bridge's ``DatasetProvider`` from where it is; else return a stand-in."""
    for module in ("megatron.bridge.data.base", "megatron.bridge.training.config"):
        try:
            return importlib.import_module(module).DatasetProvider
        except ModuleNotFoundError as error:
            # If Megatron-Bridge is installed but broken, raise its own error.
            if (error.name or "").partition(".")[0] != "megatron":
                raise
    return _StandaloneProvider


def allow_in_configurations(module: str) -> None:
    """Allow Megatron-Bridge to instantiate classes of ``module`` when it reads a configuration."""
    try:
        from megatron.bridge.utils.instantiate_utils import register_allowed_target_prefix
    except ImportError:
        return  # this version of Bridge has no list of allowed modules
    register_allowed_target_prefix(f"{module}.")


if TYPE_CHECKING:
    # Both bases have the same fields, so type checkers check arguments against the stand-in.
    _Base = _StandaloneProvider
else:
    _Base = _provider_base()

allow_in_configurations(__name__)


class _FixedPackDataset(torch.utils.data.Dataset[Any]):
    """Returns the same pack for every index, so that every rank and step has the same input.

    Its length is a large constant, because Megatron-Bridge compares it with the global batch size
    times the number of iterations.
    """

    _SENTINEL_LEN = 10_000_000

    def __init__(self, inner: Any, fixed_idx: int) -> None:
        self._inner = inner
        self._fixed_idx = fixed_idx % len(inner)
        self.collate_fn = getattr(inner, "collate_fn", None)

    def __len__(self) -> int:
        return self._SENTINEL_LEN

    def __iter__(self) -> Iterator[Any]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, idx: int) -> Any:
        return self._inner[self._fixed_idx]


@dataclass(kw_only=True)
class PackProvider(_Base):
    """Base of providers of packs: token ids, sizes, and the fields that Bridge reads."""

    img_start_token_id: int = -1
    """Id of the image's start token; -1 takes it from the tokenizer when the data set is built."""
    patch_start_token_id: int = -1
    """Id of the crop's start token; -1 as above."""
    image_size: int = 728
    patch_image_size: int = 504
    encoder_patch_size: int = 14

    padding_mask: bool = True
    """The routers of the model's experts are told which positions are padding, so that padding
    counts in none of their statistics (see :class:`~step37_data.forward_step.ForwardStep`). False
    is what Bridge's own step does."""

    seq_length: int = 2048
    skip_getting_attention_mask_from_dataset: bool = True
    global_data_keys: list[str] = field(default_factory=lambda: ["cu_seqlens", "position_id"])
    """Batch keys that every pipeline stage needs."""

    def _resolve_special_token_ids(self, template: Step37MultimodalTemplate) -> None:
        for name in ("img_start_token_id", "patch_start_token_id"):
            if getattr(self, name) < 0:
                setattr(self, name, getattr(template, name))


@dataclass(kw_only=True)
class Step37Flickr8kSFTDataProvider(ImageTokens, PackProvider):
    """Packed Flickr8k for supervised fine-tuning of Step-3.7.

    Set it as ``cfg.dataset`` of a Megatron-Bridge recipe, or call ``build_datasets(None)`` and pass
    the result and its ``collate_fn`` to a ``torch.utils.data.DataLoader``.
    """

    tokenizer_path: str
    """Folder with ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja``."""

    repo_id: str = "intro/flickr8k"
    """Data set on the hub. With the default, nothing is downloaded into a folder of your own."""
    split: str = "train"
    sample_count: int | None = 8
    """Use the first N samples, 8 for a smoke run; None uses all (about 6000 images, 1 GB)."""
    caption_key: str = "caption_0"
    cache_dir: str = ".cache/step37_flickr8k"
    prompt: str = CAPTION_PROMPT
    revision: str | None = None
    """Branch, tag or commit of the data set; None is the default branch."""

    multicrop: bool = False
    """Show each picture as a full image and in crops, as the model was trained. Samples become
    longer: a photograph of 500×333 takes 337 tokens instead of 171, one of 1920×1080 takes 836, one
    of 4032×3024 takes 2665, which needs a larger ``max_packing_seqlen``. Lengths then depend on the
    sizes of the pictures, which are read from the headers of their files."""
    as_viewed: bool = False
    """Show the model every picture as image viewers do: turned by EXIF, transparent parts on white,
    the upper 8 of 16 bits (see ``ImageOptions``). Packs carry this value, so that
    ``preprocess_packed_batch`` and ``ForwardStep`` read the pictures accordingly."""

    max_packing_seqlen: int = 2048
    """Tokens in a pack."""
    seqlen_divisible_by: int = 64
    oversize_policy: OversizePolicy = "drop"
    dataset_sampling: Sampling = "random"
    packing: Packing = ScheduleSettings.packing
    """``"best_fit"`` reorders samples within ``packing_window`` draws for fuller packs;
    ``"balanced"`` also gives the packs of a step nearly as many vision tokens each."""
    packing_window: int = ScheduleSettings.packing_window
    balance_group: int = ScheduleSettings.balance_group
    """Consecutive packs that ``"balanced"`` makes similar; a multiple of the data-parallel size."""
    fixed_pack_idx: int | None = None
    """Return this pack for every index, to overfit deterministically. None for training."""

    cache_lengths: bool = True
    """Keep the lengths of samples on disk, so that a second start does not tokenise."""
    lengths_cache_dir: str | None = None
    """Folder of the lengths; None is ``.cache/step37_lengths`` in ``cache_dir``."""
    probe_workers: int | None = None
    """Processes that measure lengths; None decides by the size of the data set."""

    dataloader_type: Literal["single", "cyclic", "batch", "external"] | None = "single"

    def __post_init__(self) -> None:
        parent: Any = super()
        if hasattr(parent, "__post_init__"):
            parent.__post_init__()
        self._checked_settings()

    def _checked_settings(self) -> ScheduleSettings:
        """Return the settings of packing.

        Raises:
            ValueError: a field is none of the values it may be.
        """
        for name in ("max_packing_seqlen", "seqlen_divisible_by"):
            checked_int(name, getattr(self, name))
        lengths_cache_dir = self.lengths_cache_dir or f"{self.cache_dir}/.cache/step37_lengths"
        return ScheduleSettings(
            max_length=self.max_packing_seqlen,
            oversize_policy=self.oversize_policy,
            dataset_sampling=self.dataset_sampling,
            packing=self.packing,
            packing_window=self.packing_window,
            balance_group=self.balance_group,
            lengths_cache_dir=lengths_cache_dir if self.cache_lengths else None,
            probe_workers=self.probe_workers,
            together=True,
        )

    def build_datasets(self, context: Any) -> tuple[Any, None, None]:  # noqa: ARG002
        """Prepare the data and return ``(train, None, None)``; there are no other splits.

        In a process group every rank calls this; one downloads and measures lengths, the others
        wait and read.

        Args:
            context: Megatron-Bridge's build context; it is not used and may be None.

        Returns:
            A map-style data set of packed dictionaries with a ``collate_fn``, and two None.
        """
        packs = self._build_train_packed_dataloader()
        if self.fixed_pack_idx is not None:
            return _FixedPackDataset(packs, self.fixed_pack_idx), None, None
        return packs, None, None

    def _make_template(self) -> Step37MultimodalTemplate:
        return Step37MultimodalTemplate(
            tokenizer_path=self.tokenizer_path,
            max_sequence_length=self.max_packing_seqlen,
            multicrop=self.multicrop,
            as_viewed=self.as_viewed,
            **{field.name: getattr(self, field.name) for field in fields(ImageTokens)},
        )

    def _build_train_packed_dataloader(self) -> MixedPackedDataloader:
        # These quick checks come before a long download. Fields may have been set since
        # __post_init__.
        settings = self._checked_settings()
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
        return pack_captions(
            samples,
            template,
            prompt=self.prompt,
            seqlen_divisible_by=self.seqlen_divisible_by,
            collate_fn=collate_single_pack,
            **vars(settings),
        )


def collate_single_pack(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """Unwrap a batch of one pack.

    Raises:
        ValueError: the batch holds another number of packs.
    """
    if len(batch) != 1:
        larger = "a pack holds many samples: raise max_packing_seqlen for larger batches"
        raise ValueError(f"needs micro_batch_size=1, got {len(batch)}; {larger}")
    return batch[0]
