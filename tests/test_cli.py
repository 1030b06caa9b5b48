"""Flags, YAML and messages, without a model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dreamtune.cli import main
from dreamtune.config import FIELDS, Config
from dreamtune.configfile import continued, packaged, signatures
from dreamtune.flags import train_config, train_parser

PHOTOS = ["--instance_data_dir", "photos", "--instance_prompt", "a sks dog"]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from dreamtune.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "bad = {'torch', 'diffusers', 'transformers', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--pretrained_model_name_or_path" in done.stdout


def test_help_states_every_default_and_every_method_option() -> None:
    text = " ".join(train_parser().format_help().split())
    for name, field in FIELDS.items():
        if name != "options":
            assert f"--{name} " in text, name
            assert field.metadata["help"].split("%")[0] in text, name
    assert text.count("[default: ") == len(FIELDS)  # all but `options`, and --config
    for options in signatures().values():
        for option in options:
            assert f"--{option} " in text


def test_options_in_the_help_are_those_of_the_classes() -> None:
    """Read from the source, types and ranges and defaults."""
    from dreamtune.adapters import registered_signatures

    assert packaged() == registered_signatures()


def test_flags_make_a_config() -> None:
    flags = "--method lora --rank 4 --alpha=8 --no_center_crop --crops 3 --learning_rate 1e-4"
    prompts = ["--validation_prompt", "a {}", "a red {}"]
    config = train_config([*PHOTOS, *flags.split(), *prompts, "--mixed_precision", "no"])
    assert config.options == {"rank": 4, "alpha": 8}
    assert (config.center_crop, config.crops, config.learning_rate) == (False, 3, 1e-4)
    assert config.validation_prompt == ["a {}", "a red {}"]


def test_yaml_and_flags(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("method: lora\nrank: 4\nlearning_rate: 1e-4\nmixed_precision: no\nseed: 3\n")
    config = train_config(["--config", str(file), "--seed", "5", "--rank", "8"])
    assert (config.method, config.options, config.seed) == ("lora", {"rank": 8}, 5)
    assert (config.learning_rate, config.mixed_precision) == (1e-4, "no")


def test_the_shipped_configs_are_valid() -> None:
    files = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
    assert files
    for file in files:
        train_config(["--config", str(file), *PHOTOS])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rat", "1"], "unknown flag --learning_rat. Did you mean `learning_rate`"),
        (["--rnk", "4"], "unknown flag --rnk. Did you mean `rank`"),
        (["--method", "lorra"], "unknown method `lorra`. Did you mean `lora`"),
        (["--blocks", "4"], "`blocks` is an option of ether, ether+, oft, not of delora"),
        (["--train_text_encoder"], "--train_text_encoder is a flag of another trainer: the text"),
        (["--num_train_epochs", "3"], "use --max_train_steps"),
        (["--max-train-steps", "3"], "spelled with underscores: --max_train_steps"),
        (["--rank"], "--rank needs a value"),
        (["--instance_prompt", "a", "sks"], "`sks` belongs to no flag. A value with spaces needs"),
        (["--max_train_steps", "many"], "`max_train_steps` must be a whole number, got 'many'"),
        (["--max_train_steps", "0"], "`max_train_steps` must be at least 1, got 0"),
        (["--learning_rate", "-1"], "`learning_rate` must be above 0 and finite, got -1.0"),
        (["--learning_rate", "nan"], "`learning_rate` must be finite, got nan"),
        (["--resolution", "500"], "`resolution` must be a multiple of 8, got 500; the nearest"),
        (["--lr_scheduler", "polynomial"], "`lr_scheduler` must be one of constant"),
        (["--crops", "3"], "`crops` above 1 needs random crops"),
        (["--class_data_dir", "x", "--class_prompt", "a dog"], "add --with_prior_preservation"),
        (["--pretrained_model_name_or_path", "x"], "`instance_data_dir` is missing"),
        (["--config", "no.yaml"], "there is no config file `no.yaml`"),
    ],
)
def test_refusals(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dreamtune train: ")
    assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "run", "--prompt", "a", "--resolutoin", "8"], "Did you mean `resolution`"),
        (["generate", "run"], "the following arguments are required: --prompt"),
        (["generate", "run", "--prompt", "a", "--num_inference_steps", "0"], "at least 1, got 0"),
        (["generate", "run", "--prompt", "a", "--num_images", "0"], "`num_images` must be at"),
        (["generate", "run", "--prompt", "a", "--resolution", "100"], "a multiple of 8, got 100"),
        (["generate", "run", "--prompt", "a", "--seed", "-1"], "`seed` must be at least 0, got -1"),
        (["generate", "run", "--prompt", "a"], "no adapter at `run`"),
        (["export", "run", "out", "--formt", "kohya"], "Did you mean `format`"),
        (["methods", "--verbose"], "unknown argument --verbose."),
    ],
)
def test_refusals_of_the_other_commands(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"dreamtune {arguments[0]}: ")
    assert message in error


def test_yaml_refusals(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for text, message in (
        ("lerning_rate: 1", "unknown option `lerning_rate`. Did you mean `learning_rate`"),
        ("seed: [1]", r"`seed` must be of type int, got \[1\]"),
        ("seed: true", "`seed` must be of type int"),
        ("- a", "must hold `name: value` lines"),
        ("a: [", "is not YAML"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            train_config(["--config", str(file)])


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert main(["trian"]) == 2
    assert "unknown command `trian`. Did you mean `train`" in capsys.readouterr().err
    assert main(["methods"]) == 0
    listed = capsys.readouterr().out
    assert "delora" in listed
    note = "alpha None is the rank; the papers' rows of rank 16 are of alpha = 2 rank: --alpha 32"
    assert note in listed


def saved(tmp_path: Path, **changes: object) -> Path:
    values = Config(instance_data_dir="p", learning_rate=1e-3, max_train_steps=10).to_dict()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**values, **changes}))
    return tmp_path / "config.yaml"


def test_resume_takes_the_rest_from_the_run_and_names_what_differs(tmp_path: Path) -> None:
    file = saved(tmp_path, seed=7, options={"rank": 8, "start": "residual"})
    config = continued(Config(max_train_steps=20, options={"rank": 8}), file)
    assert (config.seed, config.learning_rate, config.max_train_steps) == (7, 1e-3, 20)
    assert config.options == {"rank": 8, "start": "residual"}
    with pytest.raises(ValueError, match=r"`seed` was 7, is 8; `learning_rate` was 0.001, is 0.1"):
        continued(Config(seed=8, learning_rate=0.1), file)
    with pytest.raises(ValueError, match="`options` was .*8.* is .*4"):
        continued(Config(options={"rank": 4}), file)
    with pytest.raises(ValueError, match="`max_train_steps` was 10, is 20"):
        continued(Config(max_train_steps=20), saved(tmp_path, lr_scheduler="cosine"))
    with pytest.raises(ValueError, match="is not the folder of a run"):
        continued(Config(), tmp_path / "no" / "config.yaml")


def test_the_end_of_a_process_collects_nothing() -> None:
    """It would go over all that torch holds, for about a second."""
    code = (
        "import atexit, gc; from dreamtune.cli import main; main(['--version']); "
        "atexit._run_exitfuncs(); print(gc.get_freeze_count() > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[-1]) == (0, "True"), done.stderr
