"""Writes the folder that Hugging Face's ``kernels`` package loads: ``make kernel-hub``.

    from kernels import get_local_kernel
    step37 = get_local_kernel(Path("out/kernel-hub"))

Under ``build/`` there is a variant for each backend. Each is the package ``step37_kernels`` with
relative imports and another namespace of operators, so that it can be loaded together with an
installed step37, and with ``layers``. Modules for frameworks and for tests are left out. Nothing is
uploaded. It needs only the standard library.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "step37_kernels"
BACKENDS = ("cpu", "cuda", "rocm")
LEFT_OUT = ("megatron.py", "automodel.py", "testing.py")
CARD = """---
license: apache-2.0
library_name: kernels
tags:
- kernel
---

# step37

Triton kernels that fuse the multimodal embedding of Step-3.7-Flash: projection and insertion of
image features in one pass, and Pillow's resize with CLIP's normalisation, bit for bit. Written by
`make kernel-hub` of the project step37, version {version}.

```python
from kernels import LocalLayerRepository, Mode, kernelize
from kernels import replace_kernel_forward_from_hub, use_kernel_mapping

# The class of your model.
replace_kernel_forward_from_hub(ImageInsertEmbedding, "ImageInsertEmbedding")
layer = LocalLayerRepository(repo_path=folder, layer_name="ImageInsertEmbedding")
with use_kernel_mapping({{"ImageInsertEmbedding": {{"cuda": layer}}}}):
    model = kernelize(model, mode=Mode.TRAINING, device="cuda")
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a folder for the kernels package.")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "kernel-hub")
    out = parser.parse_args().out
    write_hub(out)
    print(f"{out}: variants {', '.join(sorted(p.name for p in (out / 'build').iterdir()))}")


def write_hub(out: Path) -> None:
    """Write the folder, replacing an earlier one.

    Raises:
        ValueError: a file imports the package in a way that cannot be made relative.
        FileExistsError: ``out`` exists and is not such a folder.
    """
    sources = hub_sources()
    version = re.search(r'^__version__ = "(.*)"$', sources["__init__.py"], re.MULTILINE)
    assert version is not None
    if out.exists() and any(out.iterdir()):
        if not (out / "build" / "torch-cpu" / "metadata.json").exists():
            raise FileExistsError(f"{out} is not empty, and was not written by this command")
        shutil.rmtree(out)
    digest = hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()[:12]
    for backend in BACKENDS:
        name = f"_step37_{backend}_{digest}"
        folder = out / "build" / f"torch-{backend}"
        for path, text in sources.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text.replace('"step37::', f'"{name}::'), encoding="utf-8")
        metadata = {
            "id": name,
            "name": "step37",
            "version": 1,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    (out / "README.md").write_text(CARD.format(version=version[1]), encoding="utf-8")


def hub_sources() -> dict[str, str]:
    """Return the text of every file of a variant by its path, with relative imports."""
    package = ROOT / PACKAGE
    files = {
        path.relative_to(package).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(package.rglob("*.py"))
        if path.relative_to(package).as_posix() not in LEFT_OUT
    }
    files["__init__.py"] += "\nfrom step37_kernels import layers as layers  # for kernels\n"
    files["layers.py"] = (ROOT / "tools" / "hub_layers.py").read_text(encoding="utf-8")
    return {path: relative(path, text) for path, text in files.items()}


def relative(path: str, text: str) -> str:
    """Make the imports of the package relative in ``text``, its file ``path``."""
    dots = "." * (path.count("/") + 1)
    text = re.sub(
        rf"^(\s*)from {PACKAGE}(?:\.([\w.]+))? import ",
        lambda match: f"{match[1]}from {dots}{match[2] or ''} import ",
        text,
        flags=re.MULTILINE,
    )
    for node in ast.walk(ast.parse(text)):
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and node.level == 0
            else []
        )
        if any(name.partition(".")[0] == PACKAGE for name in names):
            line = getattr(node, "lineno", "?")
            raise ValueError(f"{path}, line {line}: an import that cannot be made relative")
    return text


if __name__ == "__main__":
    main()
