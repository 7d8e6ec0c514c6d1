"""Fine-tune Step-3.7-Flash with Megatron-Bridge, the fused embedding and packed Flickr8k.

    torchrun --nproc-per-node=8 -m examples.bridge_recipe --tokenizer /path/to/Step-3.7-Flash

Needs Megatron-Bridge with Step-3.7 and the GPUs that its recipe asks for. What is this project's
are the three places marked 1, 2, 3; everything else is Bridge's own recipe.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
from typing import Any

from step37_data.forward_step import ForwardStep
from step37_data.provider import Step37Flickr8kSFTDataProvider
from step37_kernels.megatron import patch_step37

RECIPES = (
    # Newest first; the name has changed with the place.
    ("megatron.bridge.recipes.stepfun.h100.step37", "step37_sft_64gpu_h100_bf16_flickr8k_config"),
    ("megatron.bridge.recipes.stepfun.step37", "step37_sft_flickr8k_config"),
)


def bridge_recipe() -> Any:
    """Bridge's own configuration for Step-3.7 on Flickr8k.

    Raises:
        ImportError: none of the places known has it.
    """
    for module, name in RECIPES:
        try:
            recipe = getattr(importlib.import_module(module), name, None)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
            continue
        if recipe is not None:
            return recipe()
    places = ", ".join(f"{module}.{name}" for module, name in RECIPES)
    raise ImportError(f"Megatron-Bridge has no Step-3.7 recipe where it was looked for: {places}")


def make_config(tokenizer: str, sample_count: int | None, train_iters: int) -> Any:
    """The recipe with our data set in place of Bridge's."""
    cfg = bridge_recipe()
    cfg.train.train_iters = train_iters
    cfg.train.micro_batch_size = 1
    # Packs differ in length, and pipeline stages have to tell each other.
    cfg.model.variable_seq_lengths = True
    cfg.model.moe_token_dispatcher_type = "alltoall"
    cfg.dataset = Step37Flickr8kSFTDataProvider(  # 2
        tokenizer_path=tokenizer,
        sample_count=sample_count,
        max_packing_seqlen=2048,
        seq_length=2048,
        packing="best_fit",
        num_workers=0,
        persistent_workers=False,
        data_sharding=False,
    )
    return cfg


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune Step-3.7-Flash on Flickr8k.")
    parser.add_argument("--tokenizer", required=True, help="folder with the model's tokenizer")
    parser.add_argument("--checkpoint", help="folder with weights converted to Megatron's format")
    parser.add_argument("--samples", type=int, default=None, help="the first N; all by default")
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()

    patch_step37()  # 1: before the model is built
    from megatron.bridge.training.pretrain import pretrain

    cfg = make_config(arguments.tokenizer, arguments.samples, arguments.steps)
    cfg.checkpoint.pretrained_checkpoint = arguments.checkpoint
    with contextlib.closing(ForwardStep(prefetch_depth=2)) as forward_step:  # 3
        pretrain(cfg, forward_step)


if __name__ == "__main__":
    main()
