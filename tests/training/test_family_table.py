"""The README's table of the families says what their tests do."""

from __future__ import annotations

from pathlib import Path

import family_table
import pytest
from families import FAMILIES

README = Path(__file__).parents[2] / "README.md"


def test_the_table_is_the_readmes() -> None:
    assert family_table.table() in README.read_text()
    assert set(family_table.TITLES) == set(FAMILIES)


def test_a_family_that_a_test_leaves_out_has_no_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is there a time where none was measured."""

    @pytest.mark.parametrize("family", ["sd"])
    def narrower(family: str) -> None: ...

    monkeypatch.setitem(family_table.COLUMNS, "plugin", (narrower,))
    monkeypatch.setattr(family_table, "MEASURED", Path("nowhere"))
    assert list(family_table.cells("xl"))[3:] == ["—", "yes", "diffusers, kohya, merged", *"———"]
    assert list(family_table.cells("sd"))[3] == "yes"
    assert list(family_table.cells("qwen_image"))[4] == "no"
