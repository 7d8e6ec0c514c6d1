"""Test-wide settings: hypothesis profiles, and the device that the kernel tests use.

Where CUDA is present the kernels run compiled, on the GPU; elsewhere they run in Triton's
interpreter, which has to be chosen before any kernel module is imported: hence here.
``STEP37_TEST_PTX=sm_90`` compiles them for that architecture instead, and interprets the PTX.
"""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings

from tests import ptx
from tests.interpreter import replace_names_once_a_launch

if ptx.ARCHITECTURE:
    os.environ["TRITON_INTERPRET"] = "0"
elif not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# pytest-xdist runs one process per core: more threads than that only fight each other.
torch.set_num_threads(1)

_common = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
    "derandomize": bool(os.environ.get("CI")),
}
# Interpreting PTX takes its time, and the same properties have been searched without it.
settings.register_profile("default", max_examples=10 if ptx.ARCHITECTURE else 25, **_common)
settings.register_profile("deep", max_examples=1000, **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

ptx.install_if_asked()
if os.environ.get("TRITON_INTERPRET") == "1":
    replace_names_once_a_launch()
