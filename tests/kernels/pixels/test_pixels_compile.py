"""How often the pixel kernels are compiled, by Triton's own launch path and without a GPU."""

from __future__ import annotations

import json

from tests.kernels.checks import run_compiling

SCRIPT = """
import functools, json, sys
import torch

from bench.no_gpu import NoDriver, compiled

NoDriver(sys.argv[1]).install()

from step37_kernels import RaggedImages, clip_normalize, resize_clip_normalize
from step37_kernels.ops.normalize_pixels import normalize_kernel
from step37_kernels.ops.resize_pass import resize_pass_kernel

clip_normalize = functools.partial(clip_normalize, impl="triton")
resize_clip_normalize = functools.partial(resize_clip_normalize, impl="triton")
KERNELS = (normalize_kernel, resize_pass_kernel)


def picture(*shape):
    return torch.zeros(*shape, 3, dtype=torch.uint8)


for size in (728, 504):
    for height, width in [(1, 1), (375, 500), (333, 500), (16, 16), (4096, 3000), (2000, 16)]:
        for order in [(12, 1), (13, 0)]:
            resize_clip_normalize([picture(height, width)], size, pillow=order)
            resize_clip_normalize([picture(height, width)] * 3, size, pillow=order)
    buffer = picture(1001).reshape(-1)
    resize_clip_normalize(
        RaggedImages(data=buffer[1:], offsets=(2,), shapes=[(10, 20)]), size
    )
    for n in (1, 2, 16):
        clip_normalize(picture(n, size, size))
print(json.dumps({kernel.__name__: len(compiled(kernel)) for kernel in KERNELS}))
"""


def test_one_compilation_serves_all_sizes():
    done = run_compiling("-c", SCRIPT, "sm_90")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "normalize_kernel": 1,
        "resize_pass_kernel": 3,  # the first pass, and the second for each order of them
    }
