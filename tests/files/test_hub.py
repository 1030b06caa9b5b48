"""Adapters by an id of the hub, against a hub of our own on loopback."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import ended, start
from hub_server import Hub, Repo, serving
from huggingface_hub import constants, hf_api
from tiny import disturb, tiny_unet, unet_inputs
from torch import nn

import dreamtune
from dreamtune.cli import main
from dreamtune.files.find import adapter_file, name_of, run_settings
from dreamtune.files.hub import Repository, Where, is_inside
from dreamtune.models import folder as model_folder
from dreamtune.models.load import load_base


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as found:
        url = f"{found.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        monkeypatch.setattr(hf_api.api, "endpoint", found.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setenv("HF_ENDPOINT", found.address)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the client's retries
        monkeypatch.chdir(tmp_path)
        model_folder.hub_answers.cache_clear()
        yield found
    model_folder.hub_answers.cache_clear()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same change as kohya/, peft/, native/ and run/ have it; or nearly, in the run's best/."""
    root = tmp_path_factory.mktemp("made")
    adapter = dreamtune.inject(tiny_unet(), "lora", rank=2)
    disturb(adapter)
    dreamtune.export(adapter, root / "kohya", "kohya", name="dog")
    dreamtune.export(adapter, root / "peft", "peft")
    adapter.save(root / "native")
    run = root / "run"
    for place in ("", "best", "checkpoint-6", "checkpoint-6/best"):
        adapter.save(run / place)
    (run / "config.yaml").write_text("pretrained_model_name_or_path: embedded\nresolution: 64\n")
    (run / "checkpoint-6" / "run_state.json").write_text('{"step": 6}')
    (run / "report.html").write_text("much")
    return root


def weights(unet: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in unet.state_dict().items()}


@torch.no_grad()
def said(unet: nn.Module) -> torch.Tensor:
    return unet(*unet_inputs(2)).sample


@pytest.mark.parametrize(
    ("kind", "got"),
    [
        ("kohya", {"dog_kohya.safetensors"}),
        ("peft", {"adapter_model.safetensors", "adapter_config.json"}),
        ("native", {"adapter.safetensors"}),
        ("run", {"best/adapter.safetensors", "config.yaml"}),
    ],
)
def test_what_is_needed_of_a_repository_is_had_and_is_the_adapter(
    hub: Hub, made: Path, kind: str, got: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, unet = tiny_unet(), tiny_unet()
    dreamtune.load(here, made / kind)
    repo = hub.repos["ann/dog"] = Repo.of(made / kind)
    repo.files["main"] |= {"README.md": b"# dog", "evil.bin": b"x", "x.py": b"boom", "_.md": b""}
    assert dreamtune.load(unet, "ann/dog", name="dog").name == "dog"
    assert {name for name in hub.got} == {n for n in got if n in repo.files["main"]}
    assert torch.equal(said(unet), said(here))
    hub.got.clear()
    dreamtune.load(tiny_unet(), "ann/dog")  # again: nothing comes twice
    assert not hub.got
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    other = tiny_unet()
    dreamtune.load(other, "ann/dog", local_files_only=True)
    assert torch.equal(said(other), said(here)) and not hub.asked


def test_a_run_s_settings_and_name(hub: Hub, made: Path) -> None:
    hub.repos["ann/dog"] = Repo.of(made / "run")
    file = adapter_file("ann/dog")
    assert (run_settings(file)["resolution"], name_of(file)) == (64, "dog")
    step = adapter_file("ann/dog", Where(subfolder="checkpoint-6"))
    assert step.parent.name == "checkpoint-6" and name_of(step) == "dog-checkpoint-6"
    assert hub.got.count("checkpoint-6/run_state.json") == 1
    assert "checkpoint-6/best/adapter.safetensors" not in hub.got
    assert adapter_file("hf://ann/dog/checkpoint-6", Where(local_files_only=True)) == step
    hub.repos["ann/cat"] = Repo.of(made / "native")
    assert name_of(adapter_file("ann/cat")) == "cat"


def test_one_of_several_and_of_a_revision(hub: Hub, made: Path) -> None:
    names = ("a [1]*.safetensors", "b.safetensors", "in/c.safetensors")
    held = {name: name.encode() for name in names}
    held |= {"in/d.bin": b"", "in/adapter_config.json": b"{}"}
    repo = hub.repos["ann/pets"] = Repo({"main": held, "v/2": {"e.safetensors": b"e"}})
    unet = tiny_unet()
    with pytest.raises(ValueError) as error:
        dreamtune.load(unet, "ann/pets")
    told = "holds several adapters: give one of `a [1]*.safetensors`, `b.safetensors` as `weight_n"
    assert told in str(error.value) and not hub.got
    for name in names:
        assert adapter_file("ann/pets", Where(weight_name=name)).read_bytes() == name.encode()
    assert sorted(hub.got) == sorted([*names, "in/adapter_config.json"])
    assert adapter_file("ann/pets", Where("c.safetensors", "in/")).name == "c.safetensors"
    assert adapter_file("hf://ann/pets/in").parent.name == "in"
    assert adapter_file("hf://ann/pets/in/c.safetensors").name == "c.safetensors"
    assert len(hub.got) == 4
    e = adapter_file("ann/pets", Where(revision="v/2"))
    assert e.name == "e.safetensors" == adapter_file("hf://ann/pets@v%2F2").name
    assert adapter_file("hf://ann/pets@v%2F2/e.safetensors", Where(revision="v/2")) == e
    assert adapter_file("ann/pets", Where(revision=repo.commit("v/2"))) == e


Case = tuple[Repo | None, dict[str, Any], str]
CASES: dict[str, Case] = {
    "missing": (None, {}, "`ann/dog` is no file or folder here, and the hub shows no such model"),
    "private": (Repo({"main": {"a.safetensors": b""}}, token="me"), {}, "hub shows no such model"),
    "gated": (Repo({"main": {"a.safetensors": b""}}, "gated"), {}, "`ann/dog` is gated: accept"),
    "revision": (Repo({"main": {}}), {"revision": "v9"}, "has no revision `v9`: give a branch"),
    "file": (
        Repo({"main": {"a.safetensors": b""}}),
        {"weight_name": "b.safetensors"},
        "no `b.safetensors` in `ann/dog`. Its .safetensors files are `a.safetensors`",
    ),
    "folder": (
        Repo({"main": {"in/a.txt": b"", "a.safetensors": b""}}),
        {"subfolder": "in"},
        "no adapter in `ann/dog`, `in`. Its .safetensors files are `a.safetensors`",
    ),
    "pickle": (
        Repo({"main": {"pytorch_lora_weights.bin": b"evil"}}),
        {},
        "no adapter in `ann/dog`. It holds no .safetensors file",
    ),
    "pickle by name": (
        Repo({"main": {"x.bin": b"evil"}}),
        {"weight_name": "x.bin"},
        "`x.bin` of `ann/dog` is no .safetensors file: others are not downloaded, a pickle may run",
    ),
    "truncated": (
        Repo({"main": {"a.safetensors": bytes(1000)}}, "truncated"),
        {},
        "`ann/dog` is no file or folder here, and could not be had from the hub (",
    ),
    "gone": (Repo({"main": {"a.safetensors": b""}}, "gone"), {}, "could not be had from the hub ("),
    "down": (Repo({"main": {"a.safetensors": b""}}, "down"), {}, "could not be had from the hub ("),
    "no adapter": (Repo({"main": {"a.safetensors": b"no"}}), {}, "`a.safetensors`"),
    "offline": (Repo({"main": {}}), {"local_files_only": True}, "alone is read by `local_files_o"),
    "escape": (
        Repo({"main": {"../../evil.safetensors": b"", "a.safetensors": b""}}),
        {},
        "lists a file `../../evil.safetensors`, which would lie outside its folder: nothing",
    ),
    "up": (Repo({"main": {}}), {"weight_name": "../x.safetensors"}, "must name a place inside"),
    "up by folder": (Repo({"main": {}}), {"subfolder": "a/.."}, "must name a place inside the rep"),
    "revision up": (Repo({"main": {}}), {"revision": "../x"}, "be a branch, tag or commit of"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_had_leaves_the_pipeline_alone(hub: Hub, tmp_path: Path, case: str) -> None:
    repo, more, told = CASES[case]
    if repo is not None:
        hub.repos["ann/dog"] = repo
    unet = tiny_unet()
    before, hooks = weights(unet), len(unet._forward_pre_hooks)
    with pytest.raises(ValueError) as error:
        dreamtune.load(unet, "ann/dog", name="dog", **more)
    assert told in str(error.value)
    assert not dreamtune.get_adapters(unet) and len(unet._forward_pre_hooks) == hooks
    assert all(torch.equal(v, before[k]) for k, v in weights(unet).items())
    assert not any(name.endswith((".bin", "evil.safetensors")) for name in hub.got)
    assert {p.name for p in tmp_path.iterdir()} <= {"cache"}


def test_other_bytes_of_the_same_length(hub: Hub, made: Path) -> None:
    """The hub's client compares the length; our own file has its hash in its header."""
    hub.repos["ann/dog"] = Repo.of(made / "native", fault="altered")
    with pytest.raises(ValueError, match="`adapter.safetensors`"):
        dreamtune.load(unet := tiny_unet(), "ann/dog")
    assert not dreamtune.get_adapters(unet)


def test_a_token_opens_and_is_not_told(hub: Hub, made: Path) -> None:
    hub.repos["ann/dog"] = Repo.of(made / "native", token="hf_secret")
    assert dreamtune.load(tiny_unet(), "ann/dog", token="hf_secret").name == "default"
    hub.repos["ann/dog"].fault = "down"
    with pytest.raises(ValueError) as error:
        dreamtune.load(tiny_unet(), "ann/dog", revision="other", token="hf_secret")
    assert "hf_secret" not in str(error.value)


def test_what_is_cached_is_taken_where_the_hub_is_down(
    hub: Hub, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["ann/dog"] = Repo.of(made / "peft")
    first = adapter_file("ann/dog")
    hub.repos["ann/dog"].fault = "down"
    assert adapter_file("ann/dog") == first
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    model_folder.hub_answers.cache_clear()
    hub.asked.clear()
    assert adapter_file("ann/dog") == first
    with pytest.raises(ValueError, match="cache, and the hub cannot be reached: run once with"):
        adapter_file("ann/cat")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="which alone is read as HF_HUB_OFFLINE is set"):
        adapter_file("ann/cat")
    assert not hub.asked


def test_a_path_here_wins_and_a_path_is_never_asked_for(
    hub: Hub, made: Path, tmp_path: Path
) -> None:
    hub.repos["ann/dog"] = hub.repos["runs/dgo"] = Repo.of(made / "native")
    (tmp_path / "ann").symlink_to(made / "run")
    for path, told in (
        ("ann/dog", "no adapter at `ann/dog`, where nothing is.*be `hf://ann/dog`$"),
        (Path("runs/dgo"), "no adapter at `runs/dgo`, where nothing is"),
        ("dog", "no adapter at `dog`, where nothing is. Give a file, the folder of a run, or an"),
        ("a/b/c", "no adapter at `a/b/c`, where nothing is"),
        ("./dog", "no adapter at `./dog`"),
        ("my dog/dog", "no adapter at `my dog/dog`"),
        ("a/b.safetensors", "no adapter file at `a/b.safetensors`"),
        ("a/..", "no adapter at"),
        ("hf://dog", "`hf://dog` is no address on the hub: such is `user/repo`"),
        ("hf://a/..", "is no id on the hub"),
        ("hf://ann/dog/../x", "must name a place inside"),
    ):
        with pytest.raises(ValueError, match=told):
            adapter_file(path)
    assert adapter_file("ann/best") == Path("ann/best/adapter.safetensors")
    assert adapter_file("ann", Where(subfolder="best")) == Path("ann/best/adapter.safetensors")
    assert adapter_file("ann", Where("adapter.safetensors")) == Path("ann/adapter.safetensors")
    with pytest.raises(ValueError, match="no adapter file at `ann/x.safetensors`"):
        adapter_file("ann", Where("x.safetensors"))
    for more in ({"revision": "main"}, {"token": "x"}, {"cache_dir": "x"}):
        with pytest.raises(ValueError, match=f"`{next(iter(more))}` is for the hub, and `ann` is"):
            adapter_file("ann", Where(**more))
    with pytest.raises(ValueError, match="`revision` is 'x', and `hf://a/b@y` has another"):
        adapter_file("hf://a/b@y", Where(revision="x"))
    with pytest.raises(ValueError, match="names a place inside, and so do `subfolder`"):
        adapter_file("hf://a/b/c", Where(subfolder="x"))
    assert not hub.asked
    assert adapter_file("hf://ann/dog").name == "adapter.safetensors"  # where it is meant


def test_names_inside() -> None:
    assert all(map(is_inside, ("", "a", "a/b.c", ".a/..b", "a [1]*")))
    assert not any(map(is_inside, ("..", "a/../b", "/a", "a//b", "a/.", "a\\b", "a\nb", "a/")))
    assert Repository.named("x/y", Where()) == Repository("x/y", Where())


def test_the_commands_take_an_id(
    hub: Hub, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repos["ann/dog"] = Repo.of(made / "kohya")
    base = ["--pretrained_model_name_or_path", str(tmp_path / "unet")]
    tiny_unet().save_pretrained(tmp_path / "unet")
    assert main(["info", "ann/dog"]) == 0
    assert "kohya" in capsys.readouterr().out
    assert main(["export", "ann/dog", "out", *base]) == 0
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
    assert main(["analyse", "ann/dog", *base, "--output", "a.json"]) == 0
    assert (tmp_path / "a.json").is_file()
    assert main(["generate", "ann/dog", "--prompt", "x"]) == 1
    assert "does not lie in the folder of a run: name its base" in capsys.readouterr().err
    assert main(["score", "ann/dog"]) == 1
    assert "an adapter outside a run needs --photos" in capsys.readouterr().err
    assert main(["info", "ann/cat"]) == 1
    assert "dreamtune info: `ann/cat` is no file or folder here" in capsys.readouterr().err


def test_the_environment_is_the_hub_s(hub: Hub, made: Path, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_TOKEN, of a process whose client finds them when it starts."""
    hub.repos["ann/dog"] = Repo.of(made / "native", token="me")

    def work() -> None:
        for name in [n for n in sys.modules if n.partition(".")[0] == "huggingface_hub"]:
            del sys.modules[name]
        os.environ |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
        os.environ["HF_TOKEN"] = "me"
        print(adapter_file("ann/dog"))

    status = ended(start(work, tmp_path / "log"))
    log = (tmp_path / "log").read_text()
    assert status == 0, log
    assert str(tmp_path / "home" / "hub" / "models--ann--dog") in log


def test_a_network_that_breaks_off_is_a_sentence_for_a_base_too(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's own errors of the network are no OSErrors."""
    kinds = [kind for kind in model_folder.hub_errors() if kind.__name__ == "HTTPError"]

    def broken(*args: object, **more: object) -> None:
        raise kinds[0]("broken off")

    monkeypatch.setattr("huggingface_hub.list_repo_files", broken)
    for ask in (lambda: load_base("ann/dog"), lambda: adapter_file("ann/dog")):
        with pytest.raises(ValueError, match=r"could not be had from the hub \(HTTPError: broken"):
            ask()
