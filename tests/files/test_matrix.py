"""Method x format: every cell is loaded by the stock loader of its format, or refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import stock
from matrix import NONE, ROWS, held, table, write, write_whole

from dreamtune.files.formats import EXPORTS

STOCK = ("diffusers", "kohya", "comfyui", "peft", "merged")  # native is dreamtune's own
README = Path(__file__).parents[2] / "README.md"

Cells = dict[str, dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def written(
    tiny_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("matrix")
    (folder / "base").symlink_to(tiny_pipeline_dir)
    write_whole(folder, tiny_pipeline_dir)
    return folder, write(folder)


@pytest.fixture(scope="module")
def cells(written: tuple[Path, dict[str, dict[str, str]]]) -> Cells:
    """What a process without dreamtune finds: one for all formats, as its imports take longest."""
    command = [sys.executable, stock.__file__, str(written[0]), *STOCK]
    done = subprocess.run(command, capture_output=True, text=True, cwd=written[0])
    assert done.stdout, done.stderr
    found: Cells = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("format", STOCK)
def test_the_stock_loader_gives_the_adapters_output(format: str, cells: Cells) -> None:
    """Of every method that the format says to hold, without a warning."""
    assert set(cells[format]) == {row for row in ROWS if held(row, format)}
    for row, cell in cells[format].items():
        assert cell["error"] < stock.TOLERANCE, row
        assert cell["change"] > 1e-2, row
        assert not cell["warned"], row


def test_a_merged_pipeline_gives_the_adapters_image(cells: Cells) -> None:
    """With the text encoder and tokenizer that were written with it, the network in shards."""
    assert cells["whole"]["image"]["error"] < stock.TOLERANCE


@pytest.mark.parametrize("format", EXPORTS)
def test_the_other_cells_are_refused(
    format: str, written: tuple[Path, dict[str, dict[str, str]]]
) -> None:
    refused = written[1][format]
    assert set(refused) == {row for row in ROWS if not held(row, format)}
    for row, message in refused.items():
        assert re.search("no plain LoRA holds it|no weight holds it", message), row
        assert "use the native file" in message
        assert not list((written[0] / format / str(list(ROWS).index(row))).glob("*"))


def test_the_readme_has_this_table() -> None:
    assert table() in README.read_text()
    assert NONE in table()
