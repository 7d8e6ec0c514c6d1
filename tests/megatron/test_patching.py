"""What a patch says where a framework, or something that the framework needs, is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from step37_kernels.integration.patching import ClassPatch


def patch_of(module: str) -> ClassPatch:
    return ClassPatch(
        caller="patch_it",
        remedy="replace_in(model)",
        modules=(module,),
        name="Model",
        distribution="made-up-framework",
        known="made-up-framework 1.0",
    )


def test_a_framework_that_lacks_a_package_of_its_own_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_up_framework.py").write_text("import package_that_is_nowhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError) as raised:
        patch_of("made_up_framework").apply(lambda cls: cls, nn.Identity)
    assert raised.value.name == "package_that_is_nowhere"
    assert "patch_it" not in str(raised.value)


@pytest.mark.parametrize(
    "module", ["framework_nowhere", "framework_nowhere.model", "there.nowhere"]
)
def test_a_module_that_is_missing_is_named_with_the_known_releases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=f"cannot replace module {module}: no module") as raised:
        patch_of(module).apply(lambda cls: cls, nn.Identity)
    assert raised.value.name == module
    assert "Known to work: made-up-framework 1.0; installed: no made-up-framework" in str(
        raised.value
    )
