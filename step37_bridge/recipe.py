"""Fine-tunes Step-3.7-Flash by Megatron-Bridge's recipe, with our embedding, data and step.

    torchrun --nnodes=8 --nproc-per-node=8 -m step37_bridge.recipe --checkpoint /path/to/weights
    torchrun --nproc-per-node=4 -m step37_bridge.recipe --smoke --checkpoint /path/to/weights

It needs an installed Megatron-Bridge with Step-3.7, but no checkout of it. This project's parts are
set at the places marked 1, 2 and 3; everything else is Bridge's.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from dataclasses import dataclass
from typing import Any

import step37_data
from step37_bridge.callbacks import CompareWithStock
from step37_bridge.command_line import at_least_one, say
from step37_bridge.ranks import ParallelSizes, ranks_started
from step37_bridge.replacing import RECIPE_MODULES, find
from step37_data.forward_step import ForwardStep
from step37_kernels.megatron import patch_step37

__all__ = ["ParallelSizes", "RecipeOptions", "bridge_recipe", "make_config", "set_parallel_sizes"]

MODEL = "stepfun-ai/Step-3.7-Flash"
# Where Bridge has had its recipes, and their names there; the newest first.
RECIPES = (
    (RECIPE_MODULES[0], "step37_sft_64gpu_h100_bf16_flickr8k_config"),
    (RECIPE_MODULES[1], "step37_sft_flickr8k_config"),
)
SMOKE_RECIPES = (
    (RECIPE_MODULES[0], "step37_sft_4gpu_h100_bf16_flickr8k_smoke_config"),
    (RECIPE_MODULES[1], "step37_sft_flickr8k_smoke_config"),
)
FULL_SIZES = ParallelSizes(tensor=1, pipeline=8, expert=8)
"""The sizes of Bridge's recipe, for 64 ranks."""
SMOKE_SIZES = ParallelSizes(tensor=1, pipeline=4, expert=1)
"""The sizes of Bridge's smoke configuration, for 4 ranks."""


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """The differences from Bridge's recipe."""

    smoke: bool = False
    """Use Bridge's smoke configuration: the same pack in every step, language model and vision
    tower frozen, a high learning rate, so that the loss falls within 100 steps."""
    tokenizer: str = MODEL
    """A folder with the model's tokenizer, or a name on the Hugging Face hub."""
    checkpoint: str | None = None
    """A folder with weights, a checkpoint of Megatron or of Hugging Face as Bridge loads them; None
    starts from random ones."""
    data_dir: str | None = None
    """The folder that holds Flickr8k, or into which it is downloaded; None: as in the recipe."""
    sample_count: int | None = None
    """Use the first N samples; None: all, or with ``smoke`` the recipe's 8."""
    train_iters: int = 100
    """Training steps."""
    sizes: ParallelSizes | None = None
    """The model's parallel sizes; None: as in Bridge's recipe."""

    @property
    def parallel_sizes(self) -> ParallelSizes:
        """``sizes``, or those of Bridge's recipe."""
        return self.sizes or (SMOKE_SIZES if self.smoke else FULL_SIZES)


def bridge_recipe(*, smoke: bool = False) -> Any:
    """Return Bridge's own configuration for Step-3.7 on Flickr8k, a ``ConfigContainer``.

    Args:
        smoke: return the smoke configuration for 4 GPUs instead of the whole recipe for 64.

    Raises:
        ImportError: it is in none of the known places.
    """
    module, name = find(SMOKE_RECIPES if smoke else RECIPES)
    return getattr(module, name)()


def make_config(options: RecipeOptions) -> Any:
    """Return Bridge's recipe with our data set instead of its own, changed by ``options``.

    Args:
        options: the other differences.

    Returns:
        A ``ConfigContainer`` for Bridge's ``pretrain``.

    Raises:
        ImportError: Megatron-Bridge has no recipe for Step-3.7.
        ValueError: the model's layers cannot be split into so many pipeline stages, or the
            checkpoint's folder is missing or holds none.
    """
    if options.checkpoint is not None:
        check_checkpoint(options.checkpoint)
    cfg = bridge_recipe(smoke=options.smoke)
    cfg.train.train_iters = options.train_iters
    cfg.train.micro_batch_size = 1
    cfg.checkpoint.pretrained_checkpoint = options.checkpoint
    # Packs differ in length, so pipeline stages have to send each other the shapes.
    cfg.model.variable_seq_lengths = True
    cfg.model.moe_token_dispatcher_type = "alltoall"
    set_parallel_sizes(cfg.model, options.parallel_sizes)

    of_bridge = {f.name: getattr(cfg.dataset, f.name) for f in dataclasses.fields(cfg.dataset)}
    cfg.dataset = step37_data.Step37Flickr8kSFTDataProvider(**of_bridge)  # 2
    cfg.dataset.tokenizer_path = options.tokenizer
    if options.data_dir is not None:
        cfg.dataset.cache_dir = options.data_dir
    if options.sample_count is not None or not options.smoke:
        cfg.dataset.sample_count = options.sample_count
    if not options.smoke:
        cfg.dataset.packing = "best_fit"
        # Without this the training would end with an error after one pass over the packs.
        cfg.dataset.dataloader_type = "cyclic"
    return cfg


def check_checkpoint(path: str) -> None:
    """Check that Bridge would load this folder.

    Bridge itself asks only whether the path exists, minutes later, and starts from random weights
    if it holds no checkpoint.

    Args:
        path: a folder with a checkpoint of Megatron or of Hugging Face, or one of its iterations.

    Raises:
        ValueError: it is missing, or holds neither.
        ImportError: Bridge has no such checks.
    """
    checks = "megatron.bridge.training.utils.checkpoint_utils"
    names = ("checkpoint_exists", "is_hf_checkpoint_dir")
    if any(getattr(*find([(checks, name)]))(path) for name in names):
        return
    if not os.path.isdir(path):
        raise ValueError(f"checkpoint: there is no folder {path}")
    raise ValueError(
        f"checkpoint: {path} holds neither a checkpoint of Megatron (nor is it one of its "
        "iterations) nor one of Hugging Face (config.json and weights); Bridge would start from "
        "random weights. Convert the weights first, or leave the checkpoint out"
    )


def set_parallel_sizes(model: Any, sizes: ParallelSizes) -> None:
    """Set the parallel sizes of a model.

    Args:
        model: the ``cfg.model`` of Bridge's recipe.
        sizes: the parallel sizes.

    Raises:
        ValueError: its layers cannot be divided into so many pipeline stages of equal size, of
            which only the last may be smaller.
    """
    model.tensor_model_parallel_size = sizes.tensor
    model.pipeline_model_parallel_size = sizes.pipeline
    model.expert_model_parallel_size = sizes.expert
    model.expert_tensor_parallel_size = 1
    # Megatron requires it for models with experts and tensor parallelism.
    model.sequence_parallel = sizes.tensor > 1
    of_a_stage = -(-model.num_layers // sizes.pipeline)
    of_the_last = model.num_layers - of_a_stage * (sizes.pipeline - 1)
    if of_the_last < 1:
        raise ValueError(
            f"pipeline: {sizes.pipeline} stages of {of_a_stage} layers each leave none of the "
            f"model's {model.num_layers} for the last one"
        )
    model.num_layers_in_first_pipeline_stage = None
    model.num_layers_in_last_pipeline_stage = None if of_the_last == of_a_stage else of_the_last


def main() -> None:
    """Read the command line, check the number of ranks, and train."""
    options, compared_steps = _parse()
    sizes, started = options.parallel_sizes, ranks_started()
    try:
        sizes.check(started)
    except ValueError as error:
        sys.exit(
            f"step37_bridge.recipe: {error}. Start as many with torchrun or srun, or give other "
            "--pipeline, --expert and --tensor"
        )
    say(f"{started} ranks started, and a multiple of {sizes.ranks_needed()} needed: {sizes}")
    callbacks = []
    try:
        if compared_steps is None:
            patch_step37()  # 1: before the model is built
        else:
            callbacks.append(CompareWithStock(steps=compared_steps))
        pretrain_module, _ = find([("megatron.bridge.training.pretrain", "pretrain")])
        cfg = make_config(options)
    except (ImportError, ValueError) as error:
        sys.exit(f"step37_bridge.recipe: {error}")
    with contextlib.closing(ForwardStep(prefetch_depth=2)) as forward_step:  # 3
        pretrain_module.pretrain(cfg, forward_step, callbacks=callbacks)


def _parse() -> tuple[RecipeOptions, int | None]:
    """Read the command line: the options, and how many steps to compare with each embedding."""
    default = RecipeOptions()
    parser = argparse.ArgumentParser(
        prog="python -m step37_bridge.recipe",
        description="Fine-tune Step-3.7-Flash on Flickr8k by Megatron-Bridge's own recipe, with "
        "step37's embedding, data set and forward step.",
        epilog=f"A rank is a GPU. The recipe needs a multiple of {FULL_SIZES.ranks_needed()} "
        f"ranks, with --smoke of {SMOKE_SIZES.ranks_needed()}; with other sizes, of PIPELINE "
        "times the least common multiple of EXPERT and TENSOR.",
    )
    add = parser.add_argument
    number: dict[str, Any] = {"type": at_least_one, "metavar": "N"}
    add("--smoke", action="store_true", help="Bridge's smoke configuration: one pack, 4 GPUs")
    add("--tokenizer", default=default.tokenizer, help="folder, or name on the hub: %(default)s")
    add("--checkpoint", help="folder with weights (Megatron's or Hugging Face's); random without")
    add("--data-dir", help="folder that holds Flickr8k, or into which it is downloaded")
    add("--samples", **number, help="the first N; without it all, in --smoke 8")
    add("--steps", **number, default=default.train_iters, help="default: %(default)s")
    for field in dataclasses.fields(ParallelSizes):
        add(f"--{field.name}", **number, help=f"{field.name} parallel size")
    add("--compare", **number, help="time N steps of stock's embedding, then N of ours")
    given = parser.parse_args()
    sizes = SMOKE_SIZES if given.smoke else FULL_SIZES
    changed = {
        field.name: getattr(given, field.name)
        for field in dataclasses.fields(sizes)
        if getattr(given, field.name) is not None
    }
    options = RecipeOptions(
        smoke=given.smoke,
        tokenizer=given.tokenizer,
        checkpoint=given.checkpoint,
        data_dir=given.data_dir,
        sample_count=given.samples,
        train_iters=given.steps,
        sizes=dataclasses.replace(sizes, **changed),
    )
    return options, given.compare


if __name__ == "__main__":
    main()
