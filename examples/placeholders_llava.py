"""Uses the kernels in a model that fills placeholders by ``masked_scatter``: a small LLaVA.

    python -m examples.placeholders_llava

It trains the same model of ``transformers`` twice, unchanged and with its last projection and the
merge in one pass, and prints both losses. Nothing is downloaded. The two calls of this project are
marked 1 and 2.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from step37_kernels import plan_placeholders, project_and_insert

IMAGE_TOKEN, VOCABULARY, ROWS = 9, 64, 4


def build() -> Any:
    """Make a LLaVA with two layers in each part; a picture of 28 px has 4 rows."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    shared = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                image_size=28, patch_size=14, num_hidden_layers=2, **shared
            ),
            text_config=LlamaConfig(
                vocab_size=VOCABULARY, num_hidden_layers=2, num_key_value_heads=2, **shared
            ),
            image_token_id=IMAGE_TOKEN,
        )
    )


def fused_embeddings(model: Any, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
    """Return ``[B, S, H]`` with the image rows inserted, as ``LlavaModel.forward`` does."""
    inner, config = model.model, model.config
    encoded = inner.vision_tower(pixel_values, output_hidden_states=True)
    # LLaVA takes the last layer but one, without the class token.
    rows = encoded.hidden_states[config.vision_feature_layer][:, 1:]
    projector = inner.multi_modal_projector
    rows = projector.act(projector.linear_1(rows))
    embeddings = inner.get_input_embeddings()(input_ids)
    plan = plan_placeholders(  # 1
        input_ids, IMAGE_TOKEN, rows.shape[:2].numel(), batch_first=True
    )
    last = projector.linear_2
    return project_and_insert(embeddings, rows, last.weight, last.bias, plan)  # 2


def batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, VOCABULARY, (2, 24), generator=generator)
    ids[0, 3 : 3 + ROWS] = ids[1, 9 : 9 + ROWS] = IMAGE_TOKEN
    pixels = torch.randn(2, 3, 28, 28, generator=generator)
    return {"input_ids": ids, "pixel_values": pixels}


def train(model: Any, fused: bool, steps: int = 4) -> list[float]:
    """Train some steps by Adam; returns the losses."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        inputs = batch(step)
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
        if fused:
            inputs = {"inputs_embeds": fused_embeddings(model, **inputs)}
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    model = build()
    stock, ours = (train(copy.deepcopy(model), fused) for fused in (False, True))
    for step, (theirs, mine) in enumerate(zip(stock, ours, strict=True)):
        print(f"step {step}: loss {theirs:.6f} as it is, {mine:.6f} with the merge fused")


if __name__ == "__main__":
    main()
