"""What the frameworks import and a machine without a GPU cannot have, and who is given it.

Everything else is real. ``python -m tools.real`` installs it.
"""

from __future__ import annotations

import builtins
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch

STUBS = {
    "transformer_engine": (
        "megatron.bridge",
        "is built against CUDA. Bridge imports it at the top of modules of other models and names "
        "it in annotations; nothing that runs here calls it. For Bridge alone: megatron-core has "
        "layers of its own for a machine without it, and builds no GPTModel with a stub",
    ),
    "torchao": (
        "nemo_automodel",
        "has its float8 for CUDA alone, and its release of today and the diffusers that Bridge "
        "imports do not import each other. Automodel's recipe imports it; nothing here is in fp8",
    ),
    "mlflow": (
        "nemo_automodel",
        "is a service for logs. The recipe of Automodel's main branch of August 2026 imports it at "
        "the top, that of 0.7.0 where it is installed; nothing here logs to it",
    ),
    "wandb": (
        "nemo_automodel",
        "as above: a service for logs, imported at the top by the recipe of its main branch",
    ),
    "nemo_automodel.components._peft.lora_kernel": (
        "nemo_automodel",
        "names an argument for its autotuner that the kernel has not, which Triton 3.9 refuses. "
        "Automodel's recipe imports it for LoRA, which nothing here trains",
    ),
}
"""Package or module by name: who is given a stub of it, and why."""

DECLARED = {
    "torchvision::nms": (
        "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "is described when torchvision is imported, and lies in its library, which on PyPI is "
        "built against CUDA. Automodel's processor calls its transforms, which are Python",
    ),
    "torchvision::qnms": (
        "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "as above",
    ),
}
"""Operator by name: its signature, and why it is declared where its library does not load."""

BORROWED = {
    "typing.override": (
        "is new in Python 3.12, which megatron-core's training package asks for; "
        "typing_extensions has the same for 3.11"
    ),
}
"""What a Python before 3.12 lacks, and why it is needed."""

_LORA = "nemo_automodel.components._peft.lora_kernel"
_import = builtins.__import__


class _Stub(types.ModuleType):
    """A package in which every name is there: an empty class, or another such package."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        made = type(name, (), {"__module__": full}) if name[0].isupper() else _Stub(full)
        setattr(self, name, made)
        return made


_stubs = {name: _Stub(name) for name in STUBS}
_declared: list[torch.library.Library] = []


def _import_with_stubs(
    name: str,
    globals: Mapping[str, object] | None = None,
    locals: Mapping[str, object] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> types.ModuleType:
    top, *rest = name.split(".")
    importer = str((globals or {}).get("__name__", ""))
    if level or top not in _stubs or not f"{importer}.".startswith(f"{STUBS[top][0]}."):
        return _import(name, globals, locals, fromlist or (), level)
    module: Any = _stubs[top]
    for part in rest if fromlist else ():
        module = getattr(module, part)
    return module


def _loads_torchvision() -> bool:
    """Whether the library with torchvision's operators loads beside this torch."""
    (folder,) = find_spec("torchvision").submodule_search_locations  # type: ignore[union-attr,misc]
    try:
        for library in Path(folder).glob("_C*.so"):
            torch.ops.load_library(library)
    except OSError:
        return False
    return True


def install() -> None:
    """Put all in place; idempotent."""
    if sys.modules.get(_LORA) is _stubs[_LORA]:
        return
    # Read by huggingface_hub on import: nothing here may wait for a network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if sys.version_info < (3, 12):
        import typing_extensions

        typing.override = typing_extensions.override  # type: ignore[attr-defined]
    sys.modules[_LORA] = _stubs[_LORA]
    if not _loads_torchvision():
        for name, (signature, _) in DECLARED.items():
            library, operator = name.split("::")
            _declared.append(torch.library.Library(library, "FRAGMENT"))
            _declared[-1].define(operator + signature)
    builtins.__import__ = _import_with_stubs
