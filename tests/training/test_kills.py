"""Small forms of eval/reliability/kills.py and disk.py: runs of tiny models in forked processes,
stopped at their writes.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "eval" / "reliability"))
from children import differences, give_up_root, run, signal_at, torn_at  # noqa: E402
from disk import litter  # noqa: E402
from kills import EQUAL, Kind, not_saved, to_the_end  # noqa: E402

from dreamtune.training.run_folder import checkpoints, damage  # noqa: E402

TINY = (
    "--instance_prompt=a sks dog", "--validation_prompt=a {}", "--max_train_steps=4",
    "--validation_steps=2", "--num_inference_steps=1", "--rank=2", "--dino=none", "--clip=none",
    "--device=cpu", "--train_batch_size=1",
)  # fmt: skip


def prepared(work: Path, base: Path, photos: Path, *more: str) -> Kind:
    """What an uninterrupted run leaves, twice the same, and its writes."""
    places = [f"--pretrained_model_name_or_path={base}", f"--instance_data_dir={photos}"]
    kind = Kind("tiny", [*TINY, *places, *more], work / "kills")
    kind.prepare()
    return kind


@pytest.fixture(scope="module")
def single(
    tmp_path_factory: pytest.TempPathFactory, tiny_v_pipeline_dir: Path, photo_dir: Path
) -> Kind:
    return prepared(tmp_path_factory.mktemp("one"), tiny_v_pipeline_dir, photo_dir)


def at(kind: Kind, event: str, part: str) -> int:
    """The number of the last such change."""
    return [n for n, what, path in kind.writes if what == event and part in path][-1]


def test_kills_at_the_writes_of_a_run(single: Kind) -> None:
    """In the middle of a scoring's line, and again before a write of the run that goes on."""
    single.fresh()
    scoring = at(single, "open", "metrics.jsonl")
    assert single.launch(False, torn_at(single.folder, scoring, 20)).status == -signal.SIGXFSZ
    assert [p.name for p in checkpoints(single.folder)] == ["checkpoint-2"]
    assert not (single.folder / "metrics.jsonl").read_bytes().endswith(b"\n")
    assert single.launch(True, signal_at(single.folder, 40, signal.SIGKILL)).status == -9
    assert to_the_end(single) == (EQUAL, "")


def test_a_kill_between_the_checkpoints_of_two_stacked_runs(
    tmp_path: Path, tiny_v_pipeline_dir: Path, photo_dir: Path
) -> None:
    """Bit for bit only if they go on together."""
    kind = prepared(tmp_path, tiny_v_pipeline_dir, photo_dir, "--sweep=seed=0,1")
    second = at(kind, "os.mkdir", "seed=1/.checkpoint-4.part")
    kind.fresh()
    assert kind.launch(False, signal_at(kind.folder, second, signal.SIGKILL)).status == -9
    found = {p.name: [c.name for c in checkpoints(p)] for p in sorted(kind.folder.glob("seed*"))}
    both = ["checkpoint-2", "checkpoint-4"]
    assert found == {"seed=0": both, "seed=1": both[:1]}
    assert to_the_end(kind) == (EQUAL, "")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_signals_in_the_middle_of_a_checkpoint(single: Kind, name: str) -> None:
    """It is written to its end, and one is made of where the run stands."""
    single.fresh()
    number = getattr(signal, name)
    place = at(single, "open", ".checkpoint-2.part/best")
    ended = single.launch(False, signal_at(single.folder, place, number))
    assert ended.status == 128 + number
    assert "Stopped after step 2 of 4; saved in" in ended.text
    assert not_saved(single.folder, ended.text) == "" and not litter(single.folder)


def test_a_signal_in_the_middle_of_a_scoring(single: Kind) -> None:
    """The record is written, its mean loss with it, and the next one counts from there."""
    single.fresh()
    first = next(n for n, what, path in single.writes if "000002.png" in path)
    ended = single.launch(False, signal_at(single.folder, first, signal.SIGTERM))
    assert ended.status == 143 and not_saved(single.folder, ended.text) == ""
    assert to_the_end(single, stopped_at=2) == (EQUAL, "")


def test_a_file_that_cannot_be_written_whole(single: Kind) -> None:
    """A limit of the files' size takes the place of a full disk: a sentence, the last checkpoint
    whole, nothing half written; with room again on to the end.
    """
    single.fresh()
    sizes = {p.name: p.stat().st_size for p in (single.whole / "checkpoint-4").iterdir()}
    limit = sizes["optimizer.safetensors"] - 1

    def before() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    ended = single.launch(False, before)
    assert ended.status == 1 and not ended.crashed
    last = ended.text.strip().splitlines()[-1]
    assert f"`{single.folder / 'best' / 'adapter.safetensors'}`: files may not be so large" in last
    assert "No checkpoint had been saved" in last
    assert not checkpoints(single.folder) and not litter(single.folder)
    assert to_the_end(single) == (EQUAL, "")


def test_a_progress_line_that_cannot_be_written_ends_nothing(single: Kind) -> None:
    """A full disk behind the one, nobody behind the other."""
    single.fresh()

    def before() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        read, write = os.pipe()
        os.dup2(write, 2)
        os.close(read)

    assert single.launch(False, before).status == 0
    assert differences(single.folder, single.whole) == []


def test_a_run_that_nobody_may_write_to_is_refused_at_once(single: Kind, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o555)

    place = str(out / "run")
    ended = run(["train", f"--output_dir={place}"], tmp_path / "log.txt", give_up_root)
    assert (ended.status, ended.text) == (1, f"dreamtune train: `{place}`: permission denied.\n")
    assert not any(damage(p) for p in checkpoints(single.folder))
