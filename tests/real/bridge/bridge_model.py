"""A small ``Step37Model`` of Megatron-Bridge's own, its input, and a few steps of training.

Bridge's vision tower, its fusion step, megatron-core's ``GPTModel`` with local layers: Bridge's own
need Transformer Engine.
"""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
import zlib
from types import SimpleNamespace
from typing import Any

import torch
from megatron.bridge.models.stepfun.modelling_step37.transformer_config import (
    Step37TransformerConfig,
)
from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch import Tensor, nn

from step37_kernels import ImageForInsert
from step37_kernels.integration.parallel import context_parallel_positions

PACKAGE = "megatron.bridge.models.stepfun.modelling_step37"
MODEL = f"{PACKAGE}.model"
EMBEDDING = f"{PACKAGE}.image_insert_embedding"

HIDDEN, WIDTH, VOCABULARY, LENGTH = 32, 96, 64, 32
IM_START, PATCH_START = 7, 8
SIDE, ROWS = 70, 4  # 70 px are 5 × 5 patches, halved twice: 2 × 2 rows
VISION = {
    "width": WIDTH // 4,
    "layers": 1,
    "heads": 2,
    "patch_size": 14,
    "image_size": SIDE,
    "num_channels": 3,
    "layer_norm_eps": 1e-5,
    "mlp_ratio": 2.0,
    "hidden_act": "quick_gelu",
    "ls_init_value": 0.1,
    "use_ln_pre": True,
    "use_ln_post": False,
}
# What Step37Model reads of its configuration, which in Bridge is the model's provider, too.
TEXT = {
    "vocab_size": VOCABULARY,
    "rotary_percent": 1.0,
    "rotary_base": 10000,
    "fp16_lm_cross_entropy": False,
    "share_embeddings_and_output_weights": False,
    "image_token_id": 9,
    "language_max_sequence_length": 4096,
    "logit_dtype": None,  # of Bridge's main branch
}


class PackedAttention(DotProductAttention):
    """Core attention for packed sequences and context parallelism.

    megatron-core leaves both to Transformer Engine. Each rank gathers all keys and values and
    attends with its own queries: one of the ways in which Transformer Engine does it
    (``cp_comm_type="all_gather"``).
    """

    def __init__(self, config: Any, **options: Any) -> None:
        if config.context_parallel_size > 1:
            MegatronModule.__init__(self, config)  # The base class refuses.
        else:
            super().__init__(config, **options)
        self.group = options["pg_collection"].cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: Any = None,
        **options: Any,
    ) -> Tensor:
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask, **options)
        key, value = (
            gather_from_sequence_parallel_region(t, group=self.group) for t in (key, value)
        )
        bounds, ranks = packed_seq_params.cu_seqlens_q, self.group.size()
        rows = [context_parallel_positions(len(key), ranks, r, bounds) for r in range(ranks)]
        mine, all_rows = rows[self.group.rank()], torch.cat(rows)
        hidden = hidden_from(bounds)[mine][:, all_rows]
        scores = torch.einsum("qnd,knd->nqk", query, key) / query.shape[-1] ** 0.5
        shares = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return torch.einsum("nqk,knd->qnd", shares, value)


def hidden_from(cu_seqlens: Tensor) -> Tensor:
    """``[S, S]``, True where attention must not look: other sub-sequences, the future."""
    position = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    segment = torch.bucketize(position, cu_seqlens[1:].long(), right=True)
    visible = (segment[:, None] == segment[None]) & (position[:, None] >= position[None])
    return ~visible


class MarkedNorm(nn.LayerNorm):
    """A norm for sequence parallelism, which megatron-core leaves to Transformer Engine and Apex.

    They mark the parameters, so that ``finalize_model_grads`` sums their gradients.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **options: Any) -> None:
        del options
        super().__init__(hidden_size, eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel


def local_layers(config: Any, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Local layers, with the parts above where megatron-core has none of its own."""
    layer = get_gpt_layer_local_spec(num_experts=config.num_moe_experts)
    parts, norm = layer.submodules, WrappedTorchNorm
    parts.self_attention.submodules.core_attention = PackedAttention
    if config.sequence_parallel:
        parts.input_layernorm = parts.pre_mlp_layernorm = norm = MarkedNorm
    count = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)


def build(
    *,
    seed: int | None = 0,
    projector_bias: bool = False,
    vision: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Two layers in fp32; the same weights for the same seed, whichever class is in place."""
    stage = {
        name: options.pop(name)
        for name in ("pre_process", "post_process", "vp_stage", "mtp_block_spec")
        if name in options
    }
    config = Step37TransformerConfig(
        **{
            "num_layers": 2,
            "hidden_size": HIDDEN,
            "num_attention_heads": 2,
            "use_cpu_initialization": True,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "masked_softmax_fusion": False,
            "gradient_accumulation_fusion": False,
            "persist_layer_norm": False,
            "bias_dropout_fusion": False,
        }
        | options
    )
    for name, value in (TEXT | {"projector_bias": projector_bias}).items():
        setattr(config, name, value)
    if seed is not None:
        torch.manual_seed(seed)
    module = importlib.import_module(MODEL)
    layers = local_layers(config, stage.get("vp_stage"))
    arguments: dict[str, Any] = {
        "language_transformer_config": config,
        "vision_transformer_config": SimpleNamespace(**VISION | (vision or {})),
        **stage,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Bridge has had two constructors: one builds the decoder, the other is handed it.
        if "language_model" in inspect.signature(module.Step37Model).parameters:
            arguments["language_model"] = GPTModel(
                config,
                layers,
                vocab_size=VOCABULARY,
                max_sequence_length=TEXT["language_max_sequence_length"],
                position_embedding_type="rope",
                scatter_embedding_sequence_parallel=False,
                **stage,
            )
            arguments |= {"image_token_id": 9, "projector_bias": projector_bias}
        else:
            arguments["language_transformer_layer_spec"] = layers
        model = module.Step37Model(**arguments)
    # Bridge's provider sets both when it builds a model.
    model.model_type = ModelType.encoder_or_decoder
    model.vp_stage = stage.get("vp_stage")
    if model.vision_model is not None:
        for name, parameter in model.vision_model.named_parameters():
            if "in_proj" in name:  # Zeros until a checkpoint is loaded.
                nn.init.normal_(parameter, std=0.2)
    return model


def set_weights(model: Any, first_layer: int = 0, tensor_rank: int = 0) -> None:
    """The same weights for a layer wherever it is: drawn from its name in the whole model, and of
    what tensor parallelism shards, this rank's part."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            continue
        generator = torch.Generator().manual_seed(
            zlib.crc32(name_in_whole(name, first_layer).encode())
        )
        shape = list(parameter.shape)
        sharded = getattr(parameter, "tensor_model_parallel", False)
        if sharded:
            shape[parameter.partition_dim] *= model.config.tensor_model_parallel_size
        whole = 0.1 * torch.randn(shape, generator=generator)
        if sharded:
            ranks = model.config.tensor_model_parallel_size
            whole = whole.tensor_split(ranks, parameter.partition_dim)[tensor_rank]
        with torch.no_grad():
            parameter.copy_(whole)


def name_in_whole(name: str, first_layer: int) -> str:
    """A parameter's name in a model of one stage, from that in a chunk behind ``first_layer``."""
    return re.sub(
        r"decoder\.layers\.(\d+)",
        lambda match: f"decoder.layers.{int(match[1]) + first_layer}",
        name,
    )


def ids(seed: int = 1, images: int = 2) -> Tensor:
    """``[1, LENGTH]`` token ids with the given number of start tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(10, VOCABULARY, (1, LENGTH), generator=generator)
    for k in range(images):
        tokens[0, 3 + 12 * k] = IM_START
    return tokens


def features(seed: int = 2, images: int = 2) -> Tensor:
    """``[N, ROWS, WIDTH]``, a channels-first view as a vision tower returns it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, WIDTH, ROWS, generator=generator).transpose(1, 2)


def groups(seed: int = 2, images: int = 2) -> list[ImageForInsert]:
    return [ImageForInsert(insert_start_token=IM_START, image_features=features(seed, images))]


def packed(lengths: tuple[int, ...] = (20, 12)) -> Any:
    from megatron.core.packed_seq_params import PackedSeqParams

    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


def forward(model: Any, images: list[Any] | None = None, seed: int = 1) -> Tensor:
    """Losses ``[1, LENGTH]``."""
    tokens = ids(seed, 2 if images is None else sum(len(g.image_features) for g in images))
    return model(
        input_ids=tokens,
        images=groups() if images is None else images,
        labels=tokens.roll(-1, 1),
        packed_seq_params=packed(),
    )


def train(model: Any, steps: int) -> Tensor:
    """The losses of some steps of Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = forward(model).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)
