"""Automodel's own fine-tuning recipe around a small Step-3.7: its processor, its collate, its step.

The recipe for Step-3.7 names ``Step3VLProcessor`` and ``default_collate_fn``, both of the wheel.
What is ours is what a hub would give: a tokenizer (bytes, and the special tokens that the processor
looks up), a chat template, pictures. The processor's sizes are fixed: 728 px an image, 504 a crop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nemo_automodel._transformers.capabilities import ModelSupports
from nemo_automodel.components.datasets.vlm import loader
from nemo_automodel.components.datasets.vlm.collate_fns import default_collate_fn
from nemo_automodel.components.distributed.cp_vision_frame_shard import CpVisionFrameShardingConfig
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.components.loss.mtp import MTPLossConfig
from nemo_automodel.components.models.step3p7.processing_step3 import Step3VLProcessor
from nemo_automodel.recipes.vlm import finetune
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import PreTrainedTokenizerFast

from step37_data import pp_media

SPECIAL = (
    "<im_patch>",
    *("<im_start>", "<im_end>"),
    *("<patch_start>", "<patch_end>", "<patch_newline>"),
    *("<|user|>", "<|assistant|>", "<|end|>"),
)
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{{ '<im_patch>' if part.type == 'image' else part.text }}"
    "{% endfor %}{% endif %}<|end|>{% endfor %}"
)
# Two samples a step. Four crops in two rows, none; two crops, three.
PICTURES = [[(800, 700), (100, 80)], [(300, 600), (700, 220)]]
CROPS = [[4, 0], [2, 3]]
LENGTH = 560  # To which the collate function pads, before it takes the last token off.


def processor() -> Step3VLProcessor:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", additional_special_tokens=list(SPECIAL)
    )
    fast.chat_template = TEMPLATE
    return Step3VLProcessor(tokenizer=fast, chat_template=TEMPLATE)


class Conversations:
    """What takes the place of MedPix: one picture, a question, an answer."""

    def build(self) -> list[dict[str, Any]]:
        return [
            {"conversation": [turn("user", picture(size)), turn("assistant", answer(size))]}
            for batch in PICTURES
            for size in batch
        ]


def turn(role: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {"role": role, "content": content}


def picture(size: tuple[int, int]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(size[0])
    pixels = torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy())
    return [{"type": "image", "image": image}, {"type": "text", "text": "How large?"}]


def answer(size: tuple[int, int]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": f"{size[0]} by {size[1]} pixels"}]


def batches(microbatches: int | None = None) -> list[dict[str, Any]]:
    """The batches of its data loader, one a step; with microbatches as its pipeline takes them."""
    config = loader.VlmDataloaderConfig(
        dataset_config=Conversations(),  # type: ignore[arg-type]
        processor_config=loader.VlmProcessorConfig(factory=processor),
        collator=loader.VlmCollatorConfig(
            factory=default_collate_fn, kwargs={"max_length": LENGTH}
        ),
        shuffle=False,
    )
    built = config.build(
        pretrained_model_name_or_path="",
        dp_rank=0,
        dp_world_size=1,
        batch_size=2,
        pp_n_microbatches=microbatches,
    )
    return [dict(batch) for batch in built.dataloader]


def model_options() -> dict[str, Any]:
    """Of a model that takes what the processor gives."""
    own = processor()
    return {
        "side": own.image_size,
        "vocabulary": len(own.tokenizer),
        "length": LENGTH,
        "image": own.image_token_id,
    }


@contextmanager
def our_media(asked: bool) -> Iterator[None]:
    """``step37_data.pp_media`` where its loader and its recipe look theirs up."""
    with pytest.MonkeyPatch.context() as patch:
        if asked:
            patch.setattr(loader, "wrap_vlm_collate_for_pp", pp_media.wrap_vlm_collate_for_pp)
            patch.setattr(finetune, "stage_vlm_media_for_pp", pp_media.stage_vlm_media_for_pp)
        yield


def mesh(**sizes: int) -> DeviceMesh:
    """The axes of its FSDP2 meshes, and the two flattened ones that its recipe asks for."""
    axes = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
    made = init_device_mesh("cpu", tuple(sizes.get(a, 1) for a in axes), mesh_dim_names=axes)
    made["dp_replicate", "dp_shard"]._flatten("dp")
    made["dp_replicate", "dp_shard", "cp"]._flatten("dp_cp")
    return made


def recipe(model: Any, device_mesh: DeviceMesh, pipeline: Any = None) -> Any:
    """Its recipe as ``setup`` leaves it, as far as a step reads it."""
    made = object.__new__(finetune.FinetuneRecipeForVLM)
    made.cfg = SimpleNamespace(mtp=MTPLossConfig())
    made.dist_env = SimpleNamespace(device=torch.device("cpu"), is_main=False)
    made.device_mesh = device_mesh
    made.mesh_context = SimpleNamespace(cp_size=device_mesh["cp"].size())
    made.distributed_config = SimpleNamespace()
    made.cp_vision_frame_sharding = CpVisionFrameShardingConfig()
    made.loss_fn = MaskedCrossEntropy(fp32_upcast=False)
    made.step_scheduler = SimpleNamespace(is_remote_logging_step=False)
    made.pp_enabled = pipeline is not None
    made.pp = pipeline
    made.model_parts = pipeline.parts if pipeline is not None else [model]
    for part in made.model_parts:
        part.supports = ModelSupports(part)
    made._configure_pipeline_loss_fn()
    return made


def step(made: Any, batch: dict[str, Any], labels: int) -> Tensor:
    """The loss of this rank (of the last stage) of one step of the recipe; gradients are there."""
    losses: list[Tensor] = []
    made._forward_backward_step(
        0, batch, loss_buffer=losses, num_label_tokens=labels, num_batches=1
    )
    return losses[0]
