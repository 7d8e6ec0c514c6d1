"""The pixel kernels compiled by Triton's own launch path, on a machine without a GPU.

Only the driver is a stand-in, because there is none here: it names the architecture and launches
nothing. What is specialised, cached and compiled is decided by Triton.
"""

from __future__ import annotations

import json

import pytest

from tests.kernels.checks import run_compiling

SCRIPT = """
import json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bench.resources import _resource_usage


class Utils:
    def load_binary(self, *_):
        return 0, 0, 0, 0, 1024

    def unload_module(self, *_):
        pass

    def get_device_properties(self, _):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}


class NoDriver:
    utils = Utils()

    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 0

    def launcher_cls(self, *_):
        return lambda *_, **__: None


driver.set_active(NoDriver())

from step37_kernels import pixels
from step37_kernels.ops.pixels import normalize_kernel
from step37_kernels.ops.resize import first_pass_kernel, second_pass_kernel

pixels.use_triton = lambda *_: True
KERNELS = (normalize_kernel, first_pass_kernel, second_pass_kernel)


def compiled():
    return {kernel.__name__: list(kernel.device_caches[0][0].values()) for kernel in KERNELS}


def picture(*shape):
    return torch.zeros(*shape, 3, dtype=torch.uint8)


for size in (728, 504):
    for height, width in [(1, 1), (375, 500), (333, 500), (16, 16), (4096, 3000), (2000, 16)]:
        for order in [(12, 1), (13, 0)]:
            pixels.resize_clip_normalize([picture(height, width)], size, pillow=order)
            pixels.resize_clip_normalize([picture(height, width)] * 3, size, pillow=order)
    buffer = picture(1001).reshape(-1)
    pixels.resize_clip_normalize(
        pixels.RaggedImages(data=buffer[1:], offsets=(2,), shapes=[(10, 20)]), size
    )
    for n in (1, 2, 16):
        pixels.clip_normalize(picture(n, size, size))
once = {name: len(kernels) for name, kernels in compiled().items()}

for dtype in pixels.DTYPES:
    pixels.resize_clip_normalize([picture(5, 6)], 31, dtype=dtype)
    pixels.resize_clip_normalize([picture(5, 6)], 32, dtype=dtype)
    pixels.clip_normalize(picture(1, 31, 31), dtype=dtype)
    pixels.clip_normalize(picture(1, 32, 32), dtype=dtype)
resources = [
    (name, *_resource_usage(kernel.asm["cubin"]), kernel.metadata.shared)
    for name, kernels in compiled().items()
    for kernel in kernels
]
print(json.dumps({"once": once, "resources": resources}))
"""


@pytest.mark.parametrize(
    "arch",
    [90, pytest.param(80, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)],
)
def test_one_compilation_serves_all_sizes_and_nothing_spills(arch):
    done = run_compiling("-c", SCRIPT, str(arch))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["once"] == {
        "normalize_kernel": 1,
        "first_pass_kernel": 1,
        "second_pass_kernel": 1,
    }
    # Packed or not, rows aligned or not, in three dtypes; the first pass knows neither.
    assert len(report["resources"]) == 6 + 1 + 6
    for name, registers, stack, shared in report["resources"]:
        assert stack == 0, name
        assert registers <= 128, name
        assert shared <= 16384, name
