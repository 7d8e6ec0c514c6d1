"""Stands in for ``megatron.bridge.models.stepfun.modelling_step37.model``.

A real megatron-core ``GPTModel`` with local layers, a vision tower of one layer, and the class
looked up as Bridge looks it up: by a name of this module, imported from the other one.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.bridge.models.stepfun.modelling_step37.image_insert_embedding import (
    ImageForInsert,
    ImageInsertEmbedding,
)
from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from step37_kernels.parallel import context_parallel_positions

PATCH = 14


class VisionTower(nn.Module):
    """``[N, 3, s, s]`` → a channels-first view ``[N, (s / 14)², C]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, PATCH, PATCH)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).flatten(2).transpose(1, 2)


class GatheredAttention(nn.Module):
    """Core attention for context parallelism, which megatron-core leaves to Transformer Engine.

    Each rank gathers all keys and values and attends with its own queries: one of the ways in which
    Transformer Engine does it (``cp_comm_type="all_gather"``). The mask is ``[1, 1, S / cp, S]``,
    its columns in the order in which the ranks' rows are gathered.
    """

    def __init__(self, config: TransformerConfig, **options: Any) -> None:
        super().__init__()
        del config
        self.group = options["pg_collection"].cp

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **options: Any
    ) -> Tensor:
        del options
        key, value = (
            gather_from_sequence_parallel_region(t, group=self.group) for t in (key, value)
        )
        scores = torch.einsum("qbnd,kbnd->bnqk", query, key) / query.shape[-1] ** 0.5
        shares = scores.masked_fill(attention_mask, float("-inf")).softmax(-1)
        return torch.einsum("bnqk,kbnd->qbnd", shares, value).flatten(2)


class MarkedNorm(nn.LayerNorm):
    """A norm for sequence parallelism, which megatron-core leaves to Transformer Engine and Apex.

    They mark the parameters, so that ``finalize_model_grads`` sums their gradients.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel


def local_layers(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Local layers, with the parts above where megatron-core has none of its own."""
    layer = get_gpt_layer_local_spec()
    parts, norm = layer.submodules, WrappedTorchNorm
    if config.context_parallel_size > 1:
        parts.self_attention.submodules.core_attention = GatheredAttention
    if config.sequence_parallel:
        parts.input_layernorm = parts.pre_mlp_layernorm = norm = MarkedNorm
    count = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)


class Step37Model(MegatronModule):
    """Vision tower and image insertion on the first pipeline stage, ``GPTModel`` on all."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        vocab_size: int,
        encoder_width: int,
        projector_bias: bool = False,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        position_embedding_type: str = "rope",
    ) -> None:
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        self.pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        self.language_model = GPTModel(
            config,
            local_layers(config, vp_stage),
            vocab_size=vocab_size,
            max_sequence_length=4096,
            pre_process=pre_process,
            post_process=post_process,
            position_embedding_type=position_embedding_type,
            scatter_embedding_sequence_parallel=False,
            vp_stage=vp_stage,
        )
        self.share_embeddings_and_output_weights = False
        self.vision_model = None
        self.image_insert_embedding = None
        if pre_process:
            self.vision_model = VisionTower(encoder_width)
            self.image_insert_embedding = ImageInsertEmbedding(
                language_embedding=self.language_model.embedding,
                encoder_output_dim=encoder_width,
                hidden_size=config.hidden_size,
                projector_bias=projector_bias,
            )

    def set_input_tensor(self, input_tensor: Any) -> None:
        tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.language_model.set_input_tensor(tensor)

    def forward(
        self,
        input_ids: Tensor | None = None,
        images: list[Any] | None = None,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        del attention_mask, cu_seqlens
        embeddings = None
        if self.image_insert_embedding is not None:
            encoded = [
                ImageForInsert(
                    insert_start_token=group.insert_start_token,
                    image_features=self.vision_model(group.images)
                    if group.image_features is None
                    else group.image_features,
                )
                for group in images or []
            ]
            embeddings = self.image_insert_embedding(
                input_ids=input_ids, images=encoded, position_ids=position_ids
            )
        # Local attention takes no PackedSeqParams; only Transformer Engine's does.
        hidden = hidden_from(packed_seq_params.cu_seqlens_q)
        ranks = self.config.context_parallel_size
        if ranks > 1:
            rows = [
                context_parallel_positions(
                    hidden.shape[-1], ranks, r, packed_seq_params.cu_seqlens_q
                )
                for r in range(ranks)
            ]
            hidden = hidden[:, :, rows[self.pg_collection.cp.rank()]][..., torch.cat(rows)]
        return self.language_model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=hidden,
            decoder_input=embeddings,
            labels=labels,
            loss_mask=loss_mask,
        )


def hidden_from(cu_seqlens: Tensor) -> Tensor:
    """``[1, 1, S, S]``, True where attention must not look: other sub-sequences, the future."""
    position = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    segment = torch.bucketize(position, cu_seqlens[1:].long(), right=True)
    visible = (segment[:, None] == segment[None]) & (position[:, None] >= position[None])
    return ~visible[None, None]
