"""The code on the pages of the methods that train models to know runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGES = Path(__file__).parent.parent.parent / "docs/methods"


@pytest.mark.parametrize("page", ["choosing", "forgetting", "gradient_matching", "merging", "model_specific"])
def test_a_page_s_code_runs(page: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (PAGES / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, f"{page}.md", "exec"), {})
