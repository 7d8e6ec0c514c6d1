"""Flickr8k (``intro/flickr8k``): fetch its files once, then read image and caption pairs."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step37_data.template import IMAGE_PLACEHOLDER, MultimodalSFTSample


@dataclass(frozen=True, slots=True)
class Flickr8kSample:
    """One image file and its caption."""

    image_path: str
    caption: str


class Step37Flickr8kDataset:
    """Image and caption pairs as tokenised conversations: the prompt asks, the caption answers.

    Args:
        samples: what :func:`prepare_flickr8k_samples` returns; at least one.
        template: turns a conversation into a :class:`MultimodalSFTSample`.
        prompt: the user's text, after the image.
    """

    def __init__(
        self,
        samples: Sequence[Flickr8kSample],
        template: Callable[[dict[str, Any]], MultimodalSFTSample],
        prompt: str,
    ) -> None:
        if not samples:
            raise ValueError("samples: expected at least one, got none")
        self.samples = samples
        self.template = template
        self.prompt = prompt

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, idx: int) -> MultimodalSFTSample:
        sample = self.samples[idx]
        try:
            return self.template(self._to_dialog(sample, self.prompt))
        except ValueError as error:
            raise ValueError(f"sample {idx} ({sample.image_path}): {error}") from error

    @staticmethod
    def _to_dialog(sample: Flickr8kSample, prompt: str) -> dict[str, Any]:
        return {
            "images": [sample.image_path],
            "conversations": [
                {"role": "user", "content": f"{IMAGE_PLACEHOLDER}\n{prompt}"},
                {"role": "assistant", "content": sample.caption},
            ],
        }


def get_flickr8k_dataset_file(
    *, repo_id: str, filename: str, cache_dir: str | Path, revision: str | None = None
) -> Path:
    """Path of one file of the data set under ``cache_dir``, downloaded if it is not there."""
    path = Path(cache_dir) / filename
    if path.is_file() and path.stat().st_size > 0:
        return path
    from huggingface_hub import hf_hub_download

    return Path(
        hf_hub_download(
            repo_id=repo_id,
            repo_type="dataset",
            filename=filename,
            local_dir=str(cache_dir),
            revision=revision,
        )
    )


def prepare_flickr8k_samples(
    *,
    repo_id: str = "intro/flickr8k",
    split: str = "train",
    sample_count: int | None = 8,
    caption_key: str = "caption_0",
    cache_dir: str | Path = ".cache/step37_flickr8k",
    revision: str | None = None,
) -> list[Flickr8kSample]:
    """The first ``sample_count`` image and caption pairs, in the order of ``metadata.csv``."""

    def fetch(name: str) -> Path:
        return get_flickr8k_dataset_file(
            repo_id=repo_id, filename=f"{split}/{name}", cache_dir=cache_dir, revision=revision
        )

    samples: list[Flickr8kSample] = []
    with fetch("metadata.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            caption = (row.get(caption_key) or "").strip()
            file_name = (row.get("file_name") or "").strip()
            if caption and file_name:
                samples.append(Flickr8kSample(str(fetch(file_name)), caption))
            if len(samples) == sample_count:
                break
    if not samples:
        raise RuntimeError(f"no sample prepared from {repo_id}/{split} with {caption_key!r}")
    return samples
