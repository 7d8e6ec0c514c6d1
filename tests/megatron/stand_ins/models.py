"""A small ``Step37Model`` of the stand-ins, its input, and a few steps of training."""

from __future__ import annotations

import importlib
import re
import warnings
import zlib
from typing import Any

import torch
from torch import Tensor

from step37_kernels import ImageForInsert
from tests.megatron.stand_ins import bridge

HIDDEN, WIDTH, VOCABULARY, LENGTH = 32, 48, 64, 32
IM_START, PATCH_START = 7, 8
ROWS = 4


def build(*, seed: int | None = 0, projector_bias: bool = False, **options: Any) -> Any:
    """Two layers in fp32; the same weights for the same seed, whichever class is in place."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    names = ("pre_process", "post_process", "vp_stage", "position_embedding_type")
    stage = {name: options.pop(name) for name in names if name in options}
    config = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "use_cpu_initialization": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
    } | options
    if seed is not None:
        torch.manual_seed(seed)
    model = importlib.import_module(bridge.MODEL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.Step37Model(
            TransformerConfig(**config),
            vocab_size=VOCABULARY,
            encoder_width=WIDTH,
            projector_bias=projector_bias,
            **stage,
        )


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
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)


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
