"""Triton's interpreter, without the work that it does again for every function a kernel calls.

Before a launch it replaces some hundred names of ``triton.language`` by interpreted ones, which it
restores behind it. It looks for them again in every call of a ``@triton.jit`` function from within
the kernel, where all are replaced already: that took a third of the time of the kernels' tests.
"""

from __future__ import annotations

from typing import Any


def replace_names_once_a_launch() -> None:
    """Let calls from within a kernel replace nothing where everything is replaced."""
    from triton import language
    from triton.runtime import interpreter

    replace = interpreter._patch_lang

    def replace_unless_done(function: Any) -> Any:
        is_builtin = language.core.is_builtin
        if is_builtin(language.load) or is_builtin(language.core.load):
            return replace(function)
        return interpreter._LangPatchScope()  # nothing to restore

    interpreter._patch_lang = replace_unless_done
