"""Says which extra of this package to install for a missing module."""

from __future__ import annotations

EXTRA_OF = {
    "huggingface_hub": "data",
    "jinja2": "data",
    "tqdm": "data",
    "transformers": "data",
    "matplotlib": "plots",
    "megfile": "s3",
    "megatron": "megatron",
    "megatron.energon": "energon",
}


def how_to_get(error: ModuleNotFoundError) -> str:
    """Say what to install for the module that ``error`` names.

    Raises:
        ModuleNotFoundError: ``error`` itself, if the module belongs to no extra.
    """
    module = error.name or ""
    if module not in EXTRA_OF:
        module = module.partition(".")[0]
    if module not in EXTRA_OF:
        raise error
    return f"needs {module}: pip install 'step37[{EXTRA_OF[module]}]'"
