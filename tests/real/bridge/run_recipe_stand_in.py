"""Does what the ``run_recipe.py`` of Megatron-Bridge's repository does, which its wheel lacks.

It reads ``--recipe`` and ``--step_func``, leaves the rest to Bridge's overrides, looks the step
function up by module and name, and calls the training function of the recipe's kind.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

from recipe_neighbour import RECIPES  # type: ignore[import-not-found]

STEP_FUNCTIONS = {
    "gpt_step": ("megatron.bridge.training.gpt_step", "forward_step"),
    "step37_flickr8k_step": (
        "megatron.bridge.models.stepfun.step37_flickr8k_step",
        "forward_step",
    ),
}


def looked_up(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--step_func", choices=sorted(STEP_FUNCTIONS), required=True)
    given, overrides = parser.parse_known_args()
    override = looked_up(
        "megatron.bridge.training.utils.omegaconf_utils", "process_config_with_overrides"
    )
    config = override(looked_up(RECIPES, given.recipe)(), cli_overrides=overrides or None)
    config.command = sys.argv
    finetune = looked_up("megatron.bridge.training.finetune", "finetune")
    finetune(config=config, forward_step_func=looked_up(*STEP_FUNCTIONS[given.step_func]))


if __name__ == "__main__":
    main()
