"""What the server that forks ranks imports: see ``fork_server``."""

from __future__ import annotations

import contextlib
import gc
import importlib
import warnings

from tests.real import INSTALLED

MODULES = [
    "hypothesis",
    "pytest",
    "torch.distributed.fsdp",
    "torch.utils.checkpoint",
    "step37_kernels.image_insert_embedding",
    "step37_kernels.megatron",
    "step37_kernels.testing",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer",
]
if INSTALLED:
    MODULES += ["tests.real.bridge.bridge_model", "tests.real.automodel.automodel_ranks"]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for name in MODULES:
        with contextlib.suppress(ImportError):  # Megatron is not installed everywhere.
            importlib.import_module(name)

# A rank that collects garbage looks at none of it, and so shares its memory with the server.
gc.freeze()
