"""A hook of mkdocs that inserts the public names of modules into the API pages.

A line ``<!-- api: package.module -->`` is replaced by the reference of each name in the module's
``__all__``, from the place of its definition. Roles of reStructuredText in docstrings become code,
without the dot or tilde that a path may begin with.
"""

from __future__ import annotations

import importlib
import inspect
import re
from types import ModuleType
from typing import Any

_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc|obj):<code>[~.]*([^<]*)</code>")


def public_names(module: str) -> dict[str, str]:
    """Return ``{name: dotted path of its definition}`` of the module's public names, sorted."""
    loaded = importlib.import_module(module)
    return {name: _defined_at(loaded, name) for name in sorted(loaded.__all__)}


def _defined_at(module: ModuleType, name: str) -> str:
    value = getattr(module, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        return f"{value.__module__}.{value.__qualname__}"
    # A constant has no __module__.
    source = getattr(module, "_MODULE_OF", {}).get(name)
    home = f"{module.__name__}.{source}" if source else module.__name__
    return f"{home}.{name}"


def reference(module: str) -> str:
    """Write Markdown for the public names of a module; names defined elsewhere become links."""
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
    """Called by mkdocs for each page after conversion to HTML."""
    return _ROLE.sub(r"<code>\1</code>", html).replace("::</p>", ":</p>")
