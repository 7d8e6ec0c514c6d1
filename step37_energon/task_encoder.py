"""Packs from WebDataset shards, through Megatron-Energon.

Energon reads (shards, object stores, blends, ranks, workers, exact resume); this is its task
encoder for Step-3.7: the template, the packing and ``pack_samples`` of the folder's provider. A
pack is the dictionary that ``preprocess_packed_batch`` and ``forward_step`` take, with the files of
its pictures in place of their paths::

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
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    from megatron.energon import (
        BaseWebdatasetFactory,
        Cooker,
        TaskEncoder,
        basic_sample_keys,
        stateless,
    )
except ModuleNotFoundError as error:
    if error.name not in ("megatron", "megatron.energon"):
        raise
    # By its full name: other parts of megatron come with other extras.
    raise ModuleNotFoundError(str(error), name="megatron.energon") from error

from step37_data.common.checks import checked_choice
from step37_data.common.image_entry import EncodedImage
from step37_data.common.threads import default_threads
from step37_data.images.decode import OnBroken
from step37_data.pack_transform import pack_samples
from step37_data.packing import Packing, ScheduleSettings, pack_as
from step37_data.provider import collate_single_pack
from step37_data.template import MultimodalSFTSample, Step37MultimodalTemplate
from step37_data.text.messages import CAPTION_PROMPT, caption_dialogue
from step37_energon.shards import PICTURE_SUFFIXES


@stateless
def cook_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """From the parts of a WebDataset sample to a conversation, or a caption, and its pictures.

    Parts that end in ``jpg``, ``jpeg``, ``png`` or ``webp`` are pictures. ``json`` holds
    ``messages``, and ``images``, which name the parts in the order of the placeholders (``"0.jpg"``
    of ``key.0.jpg``; ``["0.jpg", 1]`` is a crop); without ``images`` the pictures come in the order
    of their names, in which 2 is before 10. Without ``json``, ``txt`` is a caption.

    Raises:
        ValueError: there is neither of the two, the ``json`` is of another form, or names a picture
            that is not there.
    """
    pictures = {
        part: EncodedImage(f"{sample['__key__']}.{part}", data)
        for part, data in sample.items()
        if part.rpartition(".")[2].lower() in PICTURE_SUFFIXES
    }
    cooked = basic_sample_keys(sample)
    names: Sequence[Any] = sorted(pictures, key=_in_order)
    if "json" in sample:
        body = json.loads(sample["json"])
        if not isinstance(body, dict) or not isinstance(body.get("messages"), list):
            raise ValueError(f"{sample['__key__']}.json: expected an object with messages")
        cooked["conversations"] = body["messages"]
        names = body.get("images", names)
    elif "txt" in sample:
        cooked["caption"] = sample["txt"].decode().strip()
    else:
        parts = sorted(part for part in sample if not part.startswith("__"))
        raise ValueError(f"{sample['__key__']}: expected json or txt, got the parts {parts}")
    images = []
    for given in names:
        name, kind = given if isinstance(given, list) and len(given) == 2 else (given, None)
        if name not in pictures:
            raise ValueError(
                f"{sample['__key__']}.json: images name {name!r}, its pictures are {list(pictures)}"
            )
        images.append(pictures[name] if kind is None else (pictures[name], kind))
    return {**cooked, "images": images}


def _in_order(name: str) -> list[Any]:
    """Texts and numbers take turns in it, so that like is compared with like."""
    return [int(part) if part.isdecimal() else part for part in re.split("([0-9]+)", name)]


class Step37TaskEncoder(TaskEncoder[Any, Any, Any, Any]):
    """Energon's task encoder for packed Step-3.7 samples.

    Give Energon a ``packing_buffer_size`` and a ``batch_size`` of 1 or None. A worker packs
    buffer after buffer, so ``"best_fit"`` is the folder's with a ``packing_window`` of that size,
    and ``"next_fit"`` closes a pack where a buffer ends. A worker holds a buffer of encoded
    pictures: 256 photographs of 150 KB are 40 MB. Longer samples than a pack are dropped.

    A sample that cannot be encoded (pictures and placeholders that differ in number, reserved
    tokens, a broken ``json``) raises ``ValueError`` in Energon, whose error handler of the
    ``WorkerConfig`` decides; Energon's own logs the sample, skips it, and gives up after 100 in a
    row. Every pack says in ``skipped_samples`` how many such samples, and in ``dropped_samples``
    how many too long ones, its worker has met since its last pack.

    Args:
        tokenizer_path: folder of the tokenizer.
        max_packing_seqlen: tokens in a pack.
        seqlen_divisible_by: padded to a multiple of this.
        packing: ``"next_fit"`` packs in the order that Energon draws, ``"best_fit"`` reorders
            within the buffer for fuller packs, ``"balanced"`` besides makes the packs of a buffer
            more alike in vision tokens (ranks do not talk to each other about it).
        multicrop: see pictures in crops, too.
        prompt: what the user asks about the picture of a caption; None is the question that the
            folder's provider asks.
        on_broken: what ``preprocess_packed_batch`` does about an unreadable picture of these packs
            unless it is told otherwise.

    Raises:
        ValueError: an argument is none of the values it may be, or the tokenizer has not what the
            template needs.
    """

    cookers = (Cooker(cook_sample),)
    decoder = None  # Pictures stay encoded until the pack is prepared.

    def __init__(
        self,
        tokenizer_path: str,
        *,
        max_packing_seqlen: int = 2048,
        seqlen_divisible_by: int = 64,
        packing: Packing = "next_fit",
        multicrop: bool = False,
        prompt: str | None = None,
        on_broken: OnBroken = "zero",
    ) -> None:
        super().__init__()
        checked_choice("packing", packing, Packing)
        checked_choice("on_broken", on_broken, OnBroken)
        self.template = Step37MultimodalTemplate(
            tokenizer_path=tokenizer_path,
            max_sequence_length=max_packing_seqlen,
            multicrop=multicrop,
        )
        self.max_packing_seqlen = max_packing_seqlen
        self.seqlen_divisible_by = seqlen_divisible_by
        self.packing = packing
        self.prompt = CAPTION_PROMPT if prompt is None else prompt
        self.on_broken = on_broken
        self._skipped = self._dropped = 0

    @contextlib.contextmanager
    def _skips_counted(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self._skipped += 1
            raise

    @stateless
    def cook_crude_sample(self, sample: Any, cooker: Any, aux: Any) -> Any:
        """Energon's, and counts what it cannot cook."""
        with self._skips_counted():
            return super().cook_crude_sample(sample, cooker, aux)

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
                told["conversations"] = caption_dialogue(sample["caption"], self.prompt)
            try:
                encoded = self.template(told)
            except ValueError as error:
                raise ValueError(f"sample {sample['__key__']}: {error}") from error
        encoded.update(basic_sample_keys(sample))
        return encoded

    def select_samples_to_pack(
        self, samples: list[MultimodalSFTSample]
    ) -> list[list[MultimodalSFTSample]]:
        """Deal a buffer out to packs; samples that are longer than a pack are left out."""
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
        ordered = [samples[index] for index in np.arange(len(samples))[order]]
        return [ordered[at : at + count] for at, count in result.packed_sample_ranges]

    def _vision_tokens(self, sample: MultimodalSFTSample) -> int:
        return sum(self.template.kinds[entry[1]][2] for entry in sample["image_paths"])

    @stateless
    def pack_selected_samples(self, samples: list[MultimodalSFTSample]) -> dict[str, Any]:
        """One pack: what ``pack_samples`` gives, and Energon's keys of its samples."""
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
            "__restore_key__": (),  # Energon's, set when it takes the pack
        }

    @stateless
    def batch(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """The pack itself: a pack is a batch already."""
        return collate_single_pack(samples)


def prepare_shards(folder: str | Path, shards: Mapping[str, Sequence[str]]) -> None:
    """Write Energon's metadata beside shards: what ``energon prepare`` makes, nothing asked.

    Args:
        folder: of the data set.
        shards: per split the paths of its shards in ``folder``.
    """
    BaseWebdatasetFactory.prepare_dataset(
        Path(folder),
        [path for paths in shards.values() for path in paths],
        split_parts_patterns=[(split, f"{re.escape(split)}/") for split in shards],
        workers=default_threads(),
    )
    # The task encoder cooks the samples itself.
    definition = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
    Path(folder, ".nv-meta", "dataset.yaml").write_text(definition, encoding="utf-8")
