"""The insertion group that travels from the data to the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class ImageForInsert:
    """One insertion group: the images that go after one start token.

    insert_start_token: token id after which the features are inserted.
    images: `[N, 3, H, W]`.
    image_features: `[N, L, C]`, or a list mixing `[L, C]` and `[N, L, C]`.
    rope_cu_seqlens: `[N + 1]` int32, cumulative patches of the images.
    rope_max_seq_len: patches of the largest image.
    """

    insert_start_token: int
    images: torch.Tensor | None = None
    image_features: torch.Tensor | list[torch.Tensor] | None = None
    rope_cu_seqlens: torch.Tensor | None = None
    rope_max_seq_len: int | None = None
