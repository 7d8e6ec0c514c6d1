"""A small Step-3.7 of NeMo Automodel's own, its batches, and a few steps of training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from nemo_automodel.components.models.common import BackendConfig
from nemo_automodel.components.models.step3p7 import model as step3p7
from nemo_automodel.components.models.step3p7.configuration_step3p7 import Step3p7Config
from torch import Tensor

HIDDEN, WIDTH, VOCABULARY, LENGTH = 32, 96, 64, 48
IMAGE = 9
SIDE, ROWS = 70, 4  # 70 px are 5 × 5 patches, halved twice: 2 × 2 rows
CROP_SIDE, CROP_ROWS = 56, 1


def config(
    *,
    layers: int = 2,
    projector_bias: bool = False,
    side: int = SIDE,
    vocabulary: int = VOCABULARY,
    length: int = 128,
    image: int = IMAGE,
) -> Step3p7Config:
    return Step3p7Config(
        vision_config={
            "width": WIDTH // 4,
            "layers": 1,
            "heads": 2,
            "image_size": side,
            "mlp_ratio": 2.0,
        },
        text_config={
            "hidden_size": HIDDEN,
            "intermediate_size": 48,
            "num_attention_heads": 2,
            "num_attention_groups": 2,
            "num_hidden_layers": layers,
            "vocab_size": vocabulary,
            "head_dim": 16,
            "max_position_embeddings": length,
            "layer_types": ["full_attention"] * layers,
            "moe_layers_enum": (),
            "moe_num_experts": 2,
            "moe_top_k": 1,
            "moe_intermediate_size": 16,
            "share_expert_dims": 16,
            "dtype": "float32",
        },
        image_token_id=image,
        projector_bias=projector_bias,
    )


def build(seed: int = 0, **options: Any) -> step3p7.Step3p7ForConditionalGeneration:
    """In fp32; the same weights for the same seed, whichever class is in place."""
    torch.manual_seed(seed)
    backend = BackendConfig(
        attn="sdpa",
        linear="torch",
        rms_norm="torch",
        rope_fusion=False,
        enable_hf_state_dict_adapter=False,
    )
    model = step3p7.Step3p7ForConditionalGeneration(config(**options), backend=backend)
    model.float()  # Its linear layers are born in bf16.
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" not in name and "ls_" not in name:
            with torch.no_grad():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(seed: int, crops: list[int] | None) -> dict[str, Tensor]:
    """One sample an entry of ``crops``: its image, that many crops; None is a batch of text."""
    generator = torch.Generator().manual_seed(seed)
    size = 2 if crops is None else len(crops)
    ids = torch.randint(10, VOCABULARY, (size, LENGTH), generator=generator)
    if crops is None:
        return {"input_ids": ids}

    def pixels(count: int, side: int) -> Tensor:
        return torch.randn(count, 3, side, side, generator=generator)

    for row, count in zip(ids, crops, strict=True):
        rows = ROWS + count * CROP_ROWS
        # Not in one piece: text stands between a crop and the next.
        row[3 + torch.randperm(LENGTH - 3, generator=generator)[:rows].sort().values] = IMAGE
    media = {"input_ids": ids, "pixel_values": pixels(size, SIDE)}
    if any(crops):
        media |= {
            "patch_pixel_values": pixels(sum(crops), CROP_SIDE),
            "num_patches": torch.tensor(crops),
        }
    return media


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
