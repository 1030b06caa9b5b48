"""Pipeline x feature: what README's table says of a pipeline is what becomes of it here."""

from __future__ import annotations

from pathlib import Path

import pipeline_matrix
import pytest
import torch
from pipeline_matrix import FEATURES, OF_THE_NETWORK, TITLES, Bench, column, row
from pipelines import KITS

import dreamtune

README = Path(__file__).parents[2] / "README.md"


def of_the_readme(name: str) -> dict[str, str]:
    """A pipeline's column."""
    lines = README.read_text().splitlines()
    first = lines.index(row("", list(TITLES.values())))
    number = list(TITLES).index(name) + 2
    table = lines[first + 2 : first + 2 + len(FEATURES | OF_THE_NETWORK)]
    cells = [[cell.strip() for cell in line.split("|")] for line in table]
    return {cell[1]: cell[number] for cell in cells}


@pytest.mark.parametrize("name", KITS)
def test_the_readme_has_what_becomes_of_each_feature(name: str) -> None:
    assert column(name) == of_the_readme(name)


def test_a_row_that_is_not_what_it_is_alone_is_seen(tmp_path: Path, monkeypatch) -> None:
    """The table can fail: of a guided batch taken for twice the images, and of another adapter."""
    bench = Bench(KITS["QwenImagePipeline"], tmp_path)
    bench.routed()
    own = dreamtune.route
    monkeypatch.setattr(dreamtune, "route", lambda pipe, rows: own(pipe, rows[::-1]))
    with pytest.raises(AssertionError, match="from what it is alone"):
        bench.routed()


def test_two_calls_and_a_doubled_batch_are_told_apart(tmp_path: Path) -> None:
    """Two prompts of two images: Flux.2 Klein says to be guided and calls twice with four rows, of
    which its property alone would make two prompts of one image each, without and with the prompt.
    """
    bench = Bench(KITS["Flux2KleinPipeline"], tmp_path)
    pipe, seen = bench.loaded("dog"), []
    bank = next(h.__self__ for h in pipe.transformer._forward_pre_hooks.values())
    pipe.transformer.register_forward_pre_hook(lambda *given: seen.append(bank.mix.order.tolist()))
    with dreamtune.route(pipe, ["dog", None]):
        bench.kit.draw(pipe, [0, 1], guided=True, images=2)
    assert pipe.do_classifier_free_guidance and seen == [[0, 0, 1, 1]] * 2


def test_another_pipeline_of_the_same_network(tmp_path: Path) -> None:
    """Tells its own rows, though the one that was routed was never called."""
    bench = Bench(KITS["StableDiffusionPipeline"], tmp_path)
    held = bench.loaded("dog")
    other = KITS["StableDiffusionImg2ImgPipeline"].make(held.unet)
    other.set_progress_bar_config(disable=True)
    other.own_scheduler = other.scheduler
    draw = KITS["StableDiffusionImg2ImgPipeline"].draw
    with torch.no_grad(), dreamtune.route(held, ["dog", None]):
        got = draw(other, [0, 1], guided=True)
    want = draw(other, [0], guided=True)
    dreamtune.set_adapters(held, {})
    base = [draw(other, [i], guided=True) for i in (0, 1)]
    change = float((want - base[0]).abs().max())
    assert (got[:1] - want).abs().max() < 1e-4 * change
    assert (got[1:] - base[1]).abs().max() < 1e-4 * change


def test_the_table_is_printed_as_it_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_matrix, "column", of_the_readme)
    assert pipeline_matrix.table() in README.read_text()
