"""Assertions against the float64 reference, and a Python that compiles; for the kernel tests."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from step37_kernels import reference
from step37_kernels.testing import InsertCase, deviation, expected


def run_compiling(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python without Triton's interpreter, whatever this process uses."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def assert_within(name: str, actual: Tensor, exact: Tensor, bound: Tensor) -> None:
    worst, share = deviation(actual, exact, bound)
    assert share <= 1, f"{name}: off by {worst:.3g}, {share:.3g} of what rounding allows"


def assert_output(case: InsertCase, output: Tensor) -> None:
    wanted = expected(case)
    assert output.shape == case.embeddings.shape
    assert output.dtype == case.embeddings.dtype
    assert_within("output", output, wanted.output, wanted.output_bound)
    plan = reference.plan_insert(case.input_ids.cpu(), case.plan_groups)
    text = (plan.row_at < 0).to(output.device)
    assert torch.equal(output[text], case.embeddings[text])


def assert_gradients(case: InsertCase, output: Tensor, grad_output: Tensor) -> None:
    wanted = expected(dataclasses.replace(case, grad_output=grad_output))
    leaves = [case.embeddings, case.weight, *case.features]
    if case.bias is not None:
        leaves.append(case.bias)
    grads = torch.autograd.grad(
        output, leaves, grad_output, allow_unused=True, materialize_grads=True
    )
    embeddings, weight, *rest = grads
    assert torch.equal(embeddings.double().cpu(), wanted.grad_embeddings)
    assert_within("grad weight", weight, wanted.grad_weight, wanted.grad_weight_bound)
    for i, (exact, bound) in enumerate(
        zip(wanted.grad_features, wanted.grad_features_bound, strict=True)
    ):
        assert_within(f"grad features[{i}]", rest[i], exact, bound)
    if case.bias is not None:
        assert_within("grad bias", rest[-1], wanted.grad_bias, wanted.grad_bias_bound)
