"""Makes packs from WebDataset shards, through Megatron-Energon.

Energon reads the shards, also from object stores and blends, and distributes them to ranks and
workers. The task encoder in this module makes packs of the samples, with the same template, packing
and ``pack_samples`` as the provider for folders. A pack is the dictionary that
``preprocess_packed_batch`` and ``forward_step`` take. It holds the contents of image files, instead
of their paths::

    workers = WorkerConfig(rank=0, world_size=1, num_workers=2)
    packs = get_train_dataset(
        "shards", worker_config=workers, batch_size=1, packing_buffer_size=256,
        shuffle_buffer_size=100, max_samples_per_sequence=100,
        task_encoder=Step37TaskEncoder("tokenizer"),
    )
    for pack in get_savable_loader(packs):
        ...
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np

try:
    from megatron.energon import (
        BaseWebdatasetFactory,
        Cooker,
        SkipSample,
        TaskEncoder,
        basic_sample_keys,
        stateless,
    )
except ModuleNotFoundError as error:
    if error.name not in ("megatron", "megatron.energon"):
        raise
    # The full name, because other extras install other parts of megatron.
    raise ModuleNotFoundError(str(error), name="megatron.energon") from error
from megatron.energon.errors import FatalSampleError

from step37_data.caches.hub_cache import refuse_links
from step37_data.common.checks import checked_choice, checked_int
from step37_data.common.image_entry import IMAGE_ITEM_TYPE, EncodedImage, checked_kind
from step37_data.common.threads import default_threads
from step37_data.images.decode import OnBroken
from step37_data.pack_transform import pack_samples
from step37_data.packing import Packing, ScheduleSettings, pack_as
from step37_data.provider import collate_single_pack
from step37_data.template import MultimodalSFTSample, Step37MultimodalTemplate
from step37_data.text.messages import CAPTION_PROMPT, caption_dialogue
from step37_energon.shards import PICTURE_SUFFIXES

# The run ends after so many blank captions in a row, or buffers without a sample that fits. Energon
# itself ends it after a hundred such buffers, with a message that does not give the reason.
_MOST_BLANK = 10_000
_MOST_EMPTY_BUFFERS = 100


@stateless
def cook_sample(sample: dict[str, Any], *, caption_key: str | None = None) -> dict[str, Any]:
    """Find the conversation, or the caption, and the pictures in the parts of a WebDataset sample.

    Parts whose names end in one of :data:`~step37_energon.shards.PICTURE_SUFFIXES` are pictures.
    The text is the first of these that the sample has:

    * ``messages`` in ``json``: a conversation. ``images`` in ``json`` names the parts in the order
      of the placeholders (``"0.jpg"`` is the part ``key.0.jpg``; ``["0.jpg", 1]`` is a crop).
      Without ``images`` the pictures are in the order of their names, 2 before 10.
    * ``caption_key`` in ``json``, if it is given: a caption.
    * ``txt``: a caption. ``json`` is ignored then, as metadata.

    Args:
        sample: the parts by name, as bytes, and Energon's keys.
        caption_key: the key of the caption in ``json``; None if ``json`` holds no captions.

    Returns:
        ``conversations`` or ``caption``, ``images`` and Energon's keys of the sample.

    Raises:
        ValueError: the sample has no such text, the text is not in UTF-8, ``json`` has another
            form, or ``images`` names a picture that is not there. The message has the key.
        SkipSample: the caption is empty or blank.
    """
    key = sample["__key__"]
    pictures = {
        part: EncodedImage(f"{key}.{part}", data)
        for part, data in sample.items()
        if part.rpartition(".")[2].lower() in PICTURE_SUFFIXES
    }
    cooked = basic_sample_keys(sample)
    images = [pictures[name] for name in sorted(pictures, key=_in_order)]
    body = _parsed(f"{key}.json", sample["json"]) if "json" in sample else None
    if isinstance(body, dict) and "messages" in body:
        if not isinstance(body["messages"], list):
            raise ValueError(f"{key}.json: expected a list of messages, got {body['messages']!r}")
        named = _named(f"{key}.json", body["images"], pictures) if "images" in body else images
        return {**cooked, "conversations": body["messages"], "images": named}
    if caption_key is not None and "json" in sample:
        caption = _caption_in(f"{key}.json", body, caption_key)
    elif "txt" in sample:
        caption = _decoded(f"{key}.txt", sample["txt"])
    elif "json" in sample:
        told = "or a txt beside it, or a caption_key that says where in it the caption is"
        raise ValueError(f"{key}.json: expected an object with messages, {told}; {_seen(body)}")
    else:
        parts = sorted(part for part in sample if not part.startswith("__"))
        raise ValueError(f"{key}: expected json or txt, got the parts {parts}")
    if not (caption := caption.strip()):
        raise SkipSample(f"{key}: the caption is blank")
    return {**cooked, "caption": caption, "images": images}


def _in_order(name: str) -> list[Any]:
    """Split a name into alternating texts and numbers, so that numbers are sorted as numbers."""
    return [int(part) if part.isdecimal() else part for part in re.split("([0-9]+)", name)]


def _decoded(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected text in UTF-8: {error}") from error


def _parsed(name: str, data: bytes) -> Any:
    try:
        return json.loads(_decoded(name, data))
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: expected JSON: {error}") from error
    except RecursionError as error:  # Energon would end the run because of this error.
        raise ValueError(f"{name}: its lists and objects are nested too deeply") from error


def _seen(body: Any) -> str:
    return f"got the keys {sorted(body)}" if isinstance(body, dict) else f"got {body!r}"


def _caption_in(name: str, body: Any, caption_key: str) -> str:
    if not isinstance(body, dict) or caption_key not in body:
        raise ValueError(f"{name}: expected the caption_key {caption_key!r}, {_seen(body)}")
    caption = body[caption_key]
    if not isinstance(caption, str | None):
        raise ValueError(f"{name}: expected a text under {caption_key!r}, got {caption!r}")
    return caption or ""


def _named(
    name: str, given: Any, pictures: Mapping[str, EncodedImage]
) -> list[EncodedImage | tuple[EncodedImage, int]]:
    """Look up the pictures that ``images`` names."""
    if not isinstance(given, list):
        raise ValueError(f"{name}: expected images to be a list of names, got {given!r}")
    images: list[EncodedImage | tuple[EncodedImage, int]] = []
    for each in given:
        part, kind = each if isinstance(each, list) and len(each) == 2 else (each, IMAGE_ITEM_TYPE)
        if not isinstance(part, str):
            raise ValueError(f"{name}: images: expected a name or [name, type], got {each!r}")
        if part not in pictures:
            raise ValueError(f"{name}: images name {part!r}, its pictures are {list(pictures)}")
        kind = checked_kind(f"{name}: images: {part}", kind)
        images.append(pictures[part] if each == part else (pictures[part], kind))
    return images


@dataclass(eq=False, repr=False)
class Step37TaskEncoder(TaskEncoder[Any, Any, Any, Any]):
    """Energon's task encoder for packed Step-3.7 samples.

    Give Energon a ``packing_buffer_size`` and a ``batch_size`` of 1 or None. A worker packs one
    buffer of samples after the other. So ``"best_fit"`` makes the same packs as the provider for
    folders with a ``packing_window`` of that size, and ``"next_fit"`` closes a pack at the end of a
    buffer. A worker keeps one buffer of encoded pictures in memory: 256 photographs of 150 KB are
    40 MB. Samples that are longer than a pack are dropped.

    A sample that cannot be encoded (pictures and placeholders that differ in number, reserved
    tokens, a broken ``json``) raises ``ValueError`` in Energon, and the error handler of the
    ``WorkerConfig`` decides about it. Energon's default handler logs the sample and skips it, and
    100 such samples in a row end the run. A sample with a blank caption is skipped without an
    error; 10,000 of them in a row end the run. In every pack ``skipped_samples`` is the number of
    both since the last pack of its worker, and ``dropped_samples`` the number of samples that were
    longer than a pack. 100 buffers in a row without a sample that fits end the run.

    Args:
        tokenizer_path: folder of the tokenizer.
        max_packing_seqlen: tokens in a pack.
        seqlen_divisible_by: packs are padded to a multiple of this.
        packing: ``"next_fit"`` packs in the order that Energon draws, ``"best_fit"`` reorders
            within the buffer for fuller packs, ``"balanced"`` also makes the packs of a buffer more
            alike in vision tokens (each worker by itself).
        multicrop: show the model crops of a picture besides the full image.
        as_viewed: show the model every picture as image viewers do, turned by EXIF for example (see
            ``ImageOptions``). Packs carry this value to ``preprocess_packed_batch``.
        prompt: the user's question about a picture with a caption; None is the default question of
            the provider for folders.
        caption_key: the key of captions in ``json``, such as ``"caption"``; None reads them from
            ``txt``. See :func:`cook_sample`.
        on_broken: the default of ``on_broken`` when ``preprocess_packed_batch`` reads the pictures
            of these packs.

    Raises:
        ValueError: an argument has a value that is not allowed, or the tokenizer lacks something
            that the template needs.
    """

    tokenizer_path: str
    _: KW_ONLY
    max_packing_seqlen: int = 2048
    seqlen_divisible_by: int = 64
    packing: Packing = "next_fit"
    multicrop: bool = False
    as_viewed: bool = False
    prompt: str | None = None
    caption_key: str | None = None
    on_broken: OnBroken = "zero"

    # Attributes that Energon reads. Pictures are decoded later, when a pack is prepared.
    cookers = (Cooker(cook_sample),)
    decoder = None

    def __post_init__(self) -> None:
        super().__init__()
        checked_int("max_packing_seqlen", self.max_packing_seqlen)
        checked_int("seqlen_divisible_by", self.seqlen_divisible_by)
        checked_choice("packing", self.packing, Packing)
        checked_choice("on_broken", self.on_broken, OnBroken)
        self.template = Step37MultimodalTemplate(
            tokenizer_path=self.tokenizer_path,
            max_sequence_length=self.max_packing_seqlen,
            multicrop=self.multicrop,
            as_viewed=self.as_viewed,
        )
        if self.caption_key is not None:
            cook = stateless(functools.partial(cook_sample, caption_key=self.caption_key))
            self.cookers = (Cooker(cook),)
        self._skipped = self._dropped = 0
        self._blank_in_a_row = self._empty_buffers = 0

    @contextlib.contextmanager
    def _skips_counted(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self._skipped += 1
            raise

    @stateless
    def cook_crude_sample(self, sample: Any, cooker: Any, aux: Any) -> Any:
        """Read a sample, as Energon's own method does, and count the samples that fail."""
        with self._skips_counted():
            try:
                cooked = super().cook_crude_sample(sample, cooker, aux)
            except SkipSample as error:
                # Without an end Energon would draw from a data set without captions for ever.
                self._blank_in_a_row += 1
                if self._blank_in_a_row >= _MOST_BLANK:
                    told = f"the last {self._blank_in_a_row} samples have blank captions"
                    raise FatalSampleError(f"{sample['__key__']}: {told}") from error
                raise
            self._blank_in_a_row = 0
            return cooked

    @stateless
    def encode_sample(self, sample: dict[str, Any]) -> MultimodalSFTSample:
        """Tokenise a cooked sample.

        Raises:
            ValueError: see :class:`~step37_data.template.Step37MultimodalTemplate`; the message has
                the key of the sample.
        """
        with self._skips_counted():
            told = dict(sample)
            if "caption" in sample:
                told["conversations"] = caption_dialogue(
                    sample["caption"], CAPTION_PROMPT if self.prompt is None else self.prompt
                )
            try:
                encoded = self.template(told)
            except ValueError as error:
                raise ValueError(f"sample {sample['__key__']}: {error}") from error
        encoded.update(basic_sample_keys(sample))
        return encoded

    def select_samples_to_pack(
        self, samples: list[MultimodalSFTSample]
    ) -> list[list[MultimodalSFTSample]]:
        """Divide a buffer into packs; samples that are longer than a pack are left out.

        Raises:
            FatalSampleError: in 100 buffers in a row no sample fits in a pack.
        """
        sizes = np.array([len(sample) for sample in samples], dtype=np.int64)
        to_balance = samples if self.packing == "balanced" else []
        loads = [self._vision_tokens(sample) for sample in to_balance]
        settings = ScheduleSettings(
            max_length=self.max_packing_seqlen,
            oversize_policy="drop",
            packing=self.packing,
            packing_window=max(1, len(samples)),
            balance_group=1,
        )
        order, result = pack_as(settings, sizes, loads)
        self._dropped += result.num_droped
        self._empty_buffers = 0 if result.num_packed_samples else self._empty_buffers + 1
        if self._empty_buffers >= _MOST_EMPTY_BUFFERS:
            raise FatalSampleError(
                f"nothing was packed: no sample fits in a pack of {self.max_packing_seqlen} tokens "
                f"(max_packing_seqlen); the shortest of the last {len(samples)} samples has "
                f"{sizes.min()}"
            )
        ordered = [samples[index] for index in np.arange(len(samples))[order]]
        return [ordered[at : at + count] for at, count in result.packed_sample_ranges]

    def _vision_tokens(self, sample: MultimodalSFTSample) -> int:
        return sum(self.template.kinds[entry[1]][2] for entry in sample["image_paths"])

    @stateless
    def pack_selected_samples(self, samples: list[MultimodalSFTSample]) -> dict[str, Any]:
        """Make one pack: the result of ``pack_samples``, and Energon's keys of its samples."""
        packed = pack_samples(
            samples,
            seqlen_divisible_by=self.seqlen_divisible_by,
            start_token_ids=self.template.rows_after,
        )
        skipped, self._skipped = self._skipped, 0
        dropped, self._dropped = self._dropped, 0
        return {
            **packed,
            "on_broken": self.on_broken,
            "skipped_samples": skipped,
            "dropped_samples": dropped,
            "__key__": [sample["__key__"] for sample in samples],
            "__subflavors__": [sample["__subflavors__"] for sample in samples],
            "__restore_key__": (),  # Energon sets it when it receives the pack
        }

    @stateless
    def batch(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the only pack of the batch."""
        return collate_single_pack(samples)


def prepare_shards(
    folder: str | Path, shards: Mapping[str, Sequence[str] | Mapping[str, int]]
) -> None:
    """Write Energon's metadata for shards, as ``energon prepare`` does, but without asking.

    Args:
        folder: folder of the data set.
        shards: for each split the paths of its shards in ``folder``. If these are the keys of a
            mapping, its values are the numbers of samples that Energon must find in them.

    Raises:
        ValueError: Energon cannot read a shard, finds another number of samples in it or the same
            key in two; or ``.nv-meta`` is a link that leads outside of ``folder``.
    """
    metadata = Path(folder, ".nv-meta")
    refuse_links(Path(folder), metadata)
    try:
        BaseWebdatasetFactory.prepare_dataset(
            Path(folder),
            [path for paths in shards.values() for path in paths],
            split_parts_patterns=[(split, f"{re.escape(split)}/") for split in shards],
            workers=default_threads(),
        )
    except AssertionError as error:
        raise ValueError(f"{folder}: Energon cannot index the shards: {error}") from error
    except SystemExit as error:
        told = "there are samples of one key in several of them"
        raise ValueError(f"{folder}: Energon cannot index the shards: {told}") from error
    # The task encoder cooks the samples itself.
    definition = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    (metadata / "dataset.yaml").write_text(definition, encoding="utf-8")
    indexed = json.loads((metadata / ".info.json").read_text(encoding="utf-8"))["shard_counts"]
    for of_split in shards.values():
        for path, count in of_split.items() if isinstance(of_split, Mapping) else ():
            if indexed.get(path) != count:
                told = f"{count} samples were written, Energon finds {indexed.get(path)}"
                raise ValueError(f"{Path(folder, path)}: {told}")
