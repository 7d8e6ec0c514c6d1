"""The addresses in the package's metadata, of those that CITATION.cff gives.

The links of README are relative, to be followed in a checkout. On the index's page they would lead
nowhere: there they are those of the repository at this version. While CITATION.cff gives no
``repository-code`` there is nothing to lead to, and their text stays.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent


def field(name: str) -> str | None:
    """A field of CITATION.cff on a line of its own, or None."""
    text = (HERE / "CITATION.cff").read_text(encoding="utf-8")
    found = re.search(rf'^{name}: "?([^\s"]+)"?$', text, re.MULTILINE)
    return found[1].rstrip("/") if found else None


def absolute(text: str, repository: str | None, version: str) -> str:
    """The text with each relative link led into the repository, or taken away."""

    def replace(match: re.Match[str]) -> str:
        picture, label, target = match.groups()
        if re.match(r"[a-z]+:", target):
            return match[0]
        if repository is None:
            return "" if picture else label
        return (
            f"{picture}[{label}]({repository}/{'raw' if picture else 'blob'}/v{version}/{target})"
        )

    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    link = r"(!?)\[([^\]]*)\]\(([^)\s]+)\)"
    parts[::2] = [re.sub(link, replace, part) for part in parts[::2]]
    return "".join(parts)


def addresses(repository: str | None) -> dict[str, str]:
    if repository is None:
        return {}
    return {
        "Documentation": field("url") or f"{repository}/blob/HEAD/docs/index.md",
        "Source": repository,
        "Changelog": f"{repository}/blob/HEAD/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }


def main() -> None:
    repository = field("repository-code")
    package = (HERE / "step37_kernels" / "__init__.py").read_text(encoding="utf-8")
    version = re.findall(r'^__version__ = "(.*)"$', package, re.MULTILINE)[0]
    setup(
        long_description=absolute(
            (HERE / "README.md").read_text(encoding="utf-8"), repository, version
        ),
        long_description_content_type="text/markdown",
        project_urls=addresses(repository),
    )


main()  # pip imports this file, under another name
