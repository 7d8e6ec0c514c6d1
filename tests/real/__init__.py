"""Tests on the classes of Megatron-Bridge and NeMo Automodel themselves: ``make real``.

Importing this package makes both importable on a machine without a GPU; see ``stubs``.
"""

import importlib.util

INSTALLED = all(importlib.util.find_spec(name) for name in ("megatron", "nemo_automodel"))
if INSTALLED:
    from tests.real.stubs import install

    install()
