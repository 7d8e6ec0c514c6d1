"""The tests' shortcut in Triton's interpreter changes nothing but its time."""

from __future__ import annotations

import pytest
import torch
from triton import language
from triton.runtime import interpreter

from step37_kernels import plan_insert
from step37_kernels.ops.common import INTERPRETED


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")
def test_names_of_triton_are_replaced_once_a_launch_and_restored_behind_it(monkeypatch):
    ids = torch.tensor([[5, 7, 5, 7, 5, 5, 7, 5]])
    plan_insert(ids, [(7, [3, 2, 4])], impl="triton")
    searched = []
    search = interpreter._patch_builtin

    def noted(package, *arguments):
        searched.append(package)
        search(package, *arguments)

    monkeypatch.setattr(interpreter, "_patch_builtin", noted)
    load = language.load
    plan = plan_insert(ids, [(7, [3, 2, 4])], impl="triton")
    assert plan.starts.tolist() == [2, 4, 7]
    assert searched.count(language) == 1
    assert language.load is load
    assert language.core.is_builtin(load)
