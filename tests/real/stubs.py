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
from typing import Any, ClassVar

STUBS = {
    "transformer_engine": (
        "is built against CUDA. Bridge imports it at the top of modules of other models and names "
        "it in annotations; nothing that runs here calls it. For Bridge alone: megatron-core has "
        "layers of its own for a machine without it, and builds no GPTModel with a stub"
    ),
}
"""Package by name, and why."""

BORROWED = {
    "typing.override": (
        "is new in Python 3.12, which megatron-core's training package asks for; "
        "typing_extensions has the same for 3.11"
    ),
}
"""What a Python before 3.12 lacks, and why it is needed."""

_FOR = "megatron.bridge"
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


def _import_with_stubs(
    name: str,
    globals: Mapping[str, object] | None = None,
    locals: Mapping[str, object] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> types.ModuleType:
    top, *rest = name.split(".")
    importer = str((globals or {}).get("__name__", ""))
    if level or top not in _stubs or not f"{importer}.".startswith(f"{_FOR}."):
        return _import(name, globals, locals, fromlist or (), level)
    module: Any = _stubs[top]
    for part in rest if fromlist else ():
        module = getattr(module, part)
    return module


def install() -> None:
    """Put both in place; idempotent."""
    # Read by huggingface_hub on import: nothing here may wait for a network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if sys.version_info < (3, 12):
        import typing_extensions

        typing.override = typing_extensions.override  # type: ignore[attr-defined]
    builtins.__import__ = _import_with_stubs
