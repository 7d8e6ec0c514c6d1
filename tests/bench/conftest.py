"""The suite on the CPU: the same harness, gate and report as on a GPU, at sizes that take no time.

The kernels under test are then PyTorch's (``impl="torch"``), the compiled peers go through
``aot_eager``, and a host clock takes the place of events.
"""

from __future__ import annotations

import pytest
import torch

from bench.harness import Settings
from bench.shapes import Shape


@pytest.fixture(scope="session")
def settings() -> Settings:
    return Settings(
        device=torch.device("cpu"),
        dtypes=(torch.float32,),
        impl="torch",
        row_seconds=0.002,
        compile_backend=None,
    )


@pytest.fixture(scope="session")
def tiny() -> Shape:
    return Shape(
        name="tiny",
        seq_len=64,
        images=3,
        crops=4,
        image_rows=9,
        crop_rows=4,
        hidden=16,
        width=24,
    )
