"""Pipeline x feature: what README's table says of a pipeline is what becomes of it here."""

from __future__ import annotations

from pathlib import Path

import pipeline_matrix
import pytest
import torch
from pipeline_matrix import FEATURES, OF_THE_NETWORK, TITLES, Bench, check_near, column, row
from pipelines import KITS, network_of

import dreamtune
from dreamtune.fast.served import served
from dreamtune.fast.watch import why_not_recorded

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


@pytest.mark.gpu
@pytest.mark.parametrize("name", KITS)
def test_recorded_on_a_gpu(name: str, tmp_path: Path, monkeypatch) -> None:
    """Base, strengths and routes of each network, by replays, are what they are without."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    bench = Bench(KITS[name], tmp_path)
    cuda = lambda pipe: pipe.to("cuda")  # noqa: E731
    plain, fast = (bench.loaded({"dog": 1.0, "cat": 0.9}, cuda) for _ in range(2))
    if why := why_not_recorded(network_of(fast)):
        with pytest.raises(ValueError, match=f"cannot be sped up: {why}"):
            dreamtune.speed_up(fast)
        return
    dreamtune.speed_up(fast)
    draw, network = bench.kit.draw, network_of(fast)
    recorder = served(network)

    def agree(which: list[int], base: torch.Tensor) -> None:
        want = draw(plain, which, steps=3)
        for _ in range(2):  # recorded, replayed
            check_near(draw(fast, which, steps=3), want, base)

    both = [0, 1, 2]
    base = draw(cuda(bench.kit.pipe()), both, steps=3)
    agree(both, base)
    for strengths in ({"dog": 0.5}, {"cat": 1.0, "dog": -0.5}):
        for pipe in (plain, fast):
            dreamtune.set_adapters(pipe, strengths)
        agree(both, base)
    made = recorder.recorded
    for rows in (["dog", None, {"dog": 0.5, "cat": 1.0}], [None, "cat", "dog"]):
        with dreamtune.route(plain, rows), dreamtune.route(fast, rows):
            agree(both, base)
    assert served(network) is recorder and recorder.replays > recorder.recorded > 0
    print(name, "recorded", made, recorder.recorded, "replayed", recorder.replays)


def test_the_table_is_printed_as_it_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_matrix, "column", of_the_readme)
    assert pipeline_matrix.table() in README.read_text()
