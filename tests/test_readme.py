"""What the README shows works as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_snippet_trains():
    names = {}
    exec(SNIPPETS[0], names)
    np.testing.assert_allclose(names["params"]["kernel"], [1.0, -2.0, 3.0, 0.5], atol=0.02)
    assert len(SNIPPETS[0].splitlines()) < 15


@pytest.mark.parametrize("snippet", SNIPPETS[1:])
def test_every_other_snippet_runs(snippet):
    exec(snippet, {})
