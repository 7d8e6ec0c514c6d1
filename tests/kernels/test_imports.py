"""Choosing an implementation, and importing where Triton or a GPU is missing."""

from __future__ import annotations

import subprocess

import pytest
import torch

from step37_kernels.dispatch import use_triton
from tests.kernels.checks import run_compiling


def python(script: str) -> subprocess.CompletedProcess[str]:
    return run_compiling("-c", script)


WITHOUT_TRITON = """
import importlib.util, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else real(name, *a)
import torch, step37_kernels as k
ids = torch.tensor([[7, 1, 2]])
"""


def test_the_package_works_on_a_cpu_without_triton():
    done = python(
        WITHOUT_TRITON
        + """
m = k.ImageInsertEmbedding(lambda input_ids, position_ids: torch.zeros(3, 1, 4), 2, 4)
f = [k.ImageForInsert(insert_start_token=7, image_features=torch.ones(1, 2, 2))]
print(m(ids, f).abs().sum((1, 2)).bool().tolist(), "triton" in sys.modules)
"""
    )
    assert done.stdout.split() == ["[False,", "True,", "True]", "False"], done.stderr


@pytest.mark.parametrize("package", ["step37_kernels", "step37_data"])
def test_importing_a_package_loads_one_module(package):
    done = python(
        "import sys, torch, importlib; before = set(sys.modules); "
        f"importlib.import_module({package!r}); print(*sorted(set(sys.modules) - before))"
    )
    assert done.stdout.split() == [package], done.stderr


def test_every_name_of_the_package_is_loaded_when_it_is_used():  # of step37_data: tests/data
    import step37_kernels

    assert all(hasattr(step37_kernels, name) for name in step37_kernels.__all__)


def test_without_triton_asking_for_it_says_that_it_is_not_installed():
    done = python(WITHOUT_TRITON + "k.plan_insert(ids, [(7, [1])], impl='triton')")
    assert "ImportError: impl='triton' on cpu needs Triton, which is not installed" in done.stderr


def test_importing_the_package_imports_neither_triton_nor_megatron():
    done = python(
        "import sys, step37_kernels; "
        "print([m for m in ('triton', 'megatron', 'step37_data') if m in sys.modules])"
    )
    # torch itself may load triton where a GPU is present.
    assert done.stdout.strip() in ("[]", "['triton']" if torch.cuda.is_available() else "[]")


def test_triton_on_a_cpu_tensor_is_an_error_without_the_interpreter():
    done = python(
        "import torch, step37_kernels as k; "
        "k.plan_insert(torch.tensor([[7]]), [(7, [1])], impl='triton')"
    )
    assert "ValueError: impl='triton': Triton kernels need CUDA tensors, got cpu" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr


def test_the_interpreter_has_to_be_chosen_before_the_kernels_are_imported():
    done = python(
        "import os, torch, step37_kernels as k, step37_kernels.ops.plan_rows; "
        "os.environ['TRITON_INTERPRET'] = '1'; "
        "k.plan_insert(torch.tensor([[7]]), [(7, [1])], impl='triton')"
    )
    assert "ValueError: impl='triton': Triton kernels need CUDA tensors, got cpu" in done.stderr


def test_auto_takes_triton_for_cuda_tensors_only():
    assert not use_triton("auto", torch.device("cpu"))
    assert use_triton("auto", torch.device("cuda"))
    assert not use_triton("torch", torch.device("cuda"))


def test_triton_is_refused_on_devices_it_does_not_know():
    with pytest.raises(ValueError, match=r"Triton kernels need CUDA tensors, got meta"):
        use_triton("triton", torch.device("meta"))
