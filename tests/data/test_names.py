"""What `step37_data` offers at its door."""

from __future__ import annotations

import importlib
import subprocess
import sys

import step37_data


def test_every_name_of_the_door_can_be_imported_from_it() -> None:
    for name in step37_data.__all__:
        module = importlib.import_module(f"step37_data.{step37_data._MODULE_OF[name]}")
        assert getattr(step37_data, name) is getattr(module, name)
    assert {"Prefetcher", "BrokenImages", "ForwardStep", "ImageForInsert"} <= set(
        step37_data.__all__
    )


def test_importing_the_package_loads_none_of_its_modules() -> None:
    script = (
        "import sys, step37_data; "
        "print([m for m in sys.modules if m.startswith('step37_data.')], "
        "[m for m in ('torch', 'numpy', 'PIL', 'transformers', 'megatron') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["[]", "[]"]
