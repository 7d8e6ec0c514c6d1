"""Replaces the parts that Megatron-Bridge's own recipe looks up by name with ours."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import step37_data
from step37_bridge.callbacks import CompareWithStock
from step37_kernels.megatron import patch_step37

STEP_MODULE = "megatron.bridge.models.stepfun.step37_flickr8k_step"
"""The module from which Bridge imports ``forward_step`` for ``step37_flickr8k_step``."""

RECIPE_MODULES = (
    "megatron.bridge.recipes.stepfun.h100.step37",
    "megatron.bridge.recipes.stepfun.step37",
)
"""The modules in which Bridge has had its recipe for Step-3.7, the newest first."""

PROVIDER = "Step37Flickr8kSFTDataProvider"
"""The name of the data set provider, in these modules and in step37_data."""

TRAINING_FUNCTIONS = (
    # This module imports the other's class by name, so it is imported before that is replaced.
    ("megatron.bridge.training.finetune", "finetune"),
    ("megatron.bridge.training.pretrain", "pretrain"),
)


def find(places: Sequence[tuple[str, str]]) -> tuple[ModuleType, str]:
    """Find the first of several names that Megatron-Bridge has.

    Args:
        places: pairs of a module and a name in it.

    Returns:
        The module, imported, and the name in it.

    Raises:
        ImportError: Megatron-Bridge has none of them; the message lists them.
        ModuleNotFoundError: Megatron-Bridge has one, which lacks another package.
    """
    for module_name, name in places:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise
            continue
        if hasattr(module, name):
            return module, name
    listed = ", nor ".join(f"{module_name}.{name}" for module_name, name in places)
    try:
        installed = f"megatron-bridge {importlib.metadata.version('megatron-bridge')}"
    except importlib.metadata.PackageNotFoundError:
        installed = "no megatron-bridge distribution"
    raise ImportError(f"there is no {listed}; known to work: 0.6.2; installed: {installed}")


def put_in_bridge(
    forward_step: Callable[..., Any], compare: CompareWithStock | None = None
) -> tuple[str, ...]:
    """Make Bridge's recipe train with our embedding, data set and forward step.

    If a name is missing, nothing is replaced.

    Args:
        forward_step: replaces Bridge's.
        compare: a callback to add to the training; it replaces Bridge's embedding later itself.

    Returns:
        The replaced names, dotted, each with what it refers to now.

    Raises:
        ImportError: Megatron-Bridge, or a name in it, is missing, or the extra ``data`` of this
            package is not installed.
    """
    step_module, step_name = find([(STEP_MODULE, "forward_step")])
    recipe_module, _ = find([(module, PROVIDER) for module in RECIPE_MODULES])
    provider = getattr(step37_data, PROVIDER)
    if compare is None:
        replaced = [f"{name} is now step37_kernels.ImageInsertEmbedding" for name in patch_step37()]
    else:
        replaced = add_callback(compare)
    setattr(step_module, step_name, forward_step)
    setattr(recipe_module, PROVIDER, provider)
    replaced += [
        f"{step_module.__name__}.{step_name} is now step37_data.forward_step.ForwardStep",
        f"{recipe_module.__name__}.{PROVIDER} is now {provider.__module__}.{PROVIDER}",
    ]
    return tuple(replaced)


def add_callback(callback: CompareWithStock) -> list[str]:
    """Make Bridge's training functions call ``callback`` in addition to their own callbacks.

    Returns:
        The replaced names, dotted, and what they do now.

    Raises:
        ImportError: a function is missing.
    """
    found = [find([place]) for place in TRAINING_FUNCTIONS]
    for module, name in found:
        setattr(module, name, _with_callback(getattr(module, name), callback))
    return [
        f"{module.__name__}.{name} now compares with stock besides training"
        for module, name in found
    ]


def _with_callback(train: Callable[..., Any], callback: CompareWithStock) -> Callable[..., Any]:
    @functools.wraps(train)
    def train_and_compare(config: Any, forward_step_func: Any, callbacks: Any = None) -> Any:
        if callbacks is None:
            callbacks = []
        if isinstance(callbacks, list):
            callbacks = [*callbacks, callback]
        else:  # Bridge's CallbackManager
            callbacks.add(callback)
        return train(config, forward_step_func, callbacks=callbacks)

    return train_and_compare
