"""Stands in for ``megatron.bridge.models.stepfun.modelling_step37.image_insert_embedding``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from step37_kernels import reference


@dataclass
class ImageForInsert:
    insert_start_token: int
    images: Tensor | None = None
    image_features: Tensor | list[Tensor] | None = None
    rope_cu_seqlens: Tensor | None = None
    rope_max_seq_len: int | None = None


class ImageInsertEmbedding(nn.Module):
    """The stock class as a user sees it; computes by the reference, loop and all."""

    def __init__(
        self,
        language_embedding: Any,
        encoder_output_dim: int,
        hidden_size: int,
        projector_bias: bool = False,
    ) -> None:
        super().__init__()
        object.__setattr__(self, "_language_embedding", language_embedding)
        self.align_projector = nn.Linear(encoder_output_dim, hidden_size, bias=projector_bias)
        nn.init.kaiming_normal_(self.align_projector.weight, mode="fan_in", nonlinearity="relu")
        if projector_bias:
            nn.init.zeros_(self.align_projector.bias)

    def forward(
        self,
        input_ids: Tensor,
        images: list[Any] | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> Tensor:
        embeddings = self._language_embedding(input_ids=input_ids, position_ids=position_ids)
        for image in images or []:
            if image.image_features is None:
                raise ValueError("image_features is None")
            embeddings = reference.insert_features(
                embeddings,
                self.align_projector(image.image_features.to(self.align_projector.weight.dtype)),
                input_ids,
                image.insert_start_token,
            )
        return embeddings
