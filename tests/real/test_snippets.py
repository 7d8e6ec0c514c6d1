"""The snippets of the README and the pages that need a framework run on the framework itself."""

from __future__ import annotations

import pytest

from step37_kernels.automodel import unpatch_step3p7
from step37_kernels.megatron import unpatch_step37
from tests.project.test_snippets import WITH_SNIPPETS, Snippet, snippets

NEEDED = {
    f"{page.name}-{snippet.line}": snippet
    for page in WITH_SNIPPETS
    for snippet in snippets(page)
    if snippet.needs in ("megatron.bridge", "nemo_automodel")
}


@pytest.mark.parametrize("snippet", NEEDED.values(), ids=NEEDED)
def test_a_snippet_runs_on_its_framework(snippet: Snippet, bridge: None) -> None:  # noqa: ARG001
    try:
        exec(snippet.code, {})
    finally:
        unpatch_step37()
        unpatch_step3p7()
