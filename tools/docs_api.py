"""A hook of mkdocs: the API pages name modules, this puts every public name of them there.

A line ``<!-- api: package.module -->`` becomes the reference of each name in the module's
``__all__``, taken from where it is defined. reStructuredText's roles in docstrings become code.
"""

from __future__ import annotations

import importlib
import inspect
import re
from types import ModuleType
from typing import Any

_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc|obj):<code>~?([^<]*)</code>")


def public_names(module: str) -> dict[str, str]:
    """``{name: dotted path of its definition}`` of the module's public names, sorted."""
    loaded = importlib.import_module(module)
    return {name: _defined_at(loaded, name) for name in sorted(loaded.__all__)}


def _defined_at(module: ModuleType, name: str) -> str:
    value = getattr(module, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        return f"{value.__module__}.{value.__qualname__}"
    # A constant does not know where it is from.
    source = getattr(module, "_MODULE_OF", {}).get(name)
    home = f"{module.__name__}.{source}" if source else module.__name__
    return f"{home}.{name}"


def reference(module: str) -> str:
    """Markdown for the public names of a module; one that is from elsewhere is a link."""
    parts = []
    for name, path in public_names(module).items():
        if path.partition(".")[0] == module.partition(".")[0]:
            parts.append(f"::: {path}")
        else:
            parts.append(f"### {name}\n\nThe same as [`{path}`][{path}].")
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    marker = re.compile(r"^<!-- api: ([\w.]+) -->$", re.MULTILINE)
    return marker.sub(lambda match: reference(match[1]), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Called by mkdocs for each page once it is HTML."""
    return _ROLE.sub(r"<code>\1</code>", html).replace("::</p>", ":</p>")
