"""Words and options of our own on the command line."""

import pytest

from graftwork.cli.arguments import Options, own_options, words_as_fields
from graftwork.errors import ConfigError

ALL = ("profile", "plan", "file", "from_adapter", "fit")


def test_options_are_taken_out_in_both_spellings() -> None:
    args = [
        "optim.lr=1e-3",
        "--profile",
        "big",
        "--file=run.yaml",
        "peft=[lora(dim=4)]",
        "--no-plan",
        "run.executor=slurm",
    ]
    options, rest = own_options(args, ALL)
    assert options == Options(profile="big", plan=False, file="run.yaml")
    assert rest == ["optim.lr=1e-3", "peft=[lora(dim=4)]", "run.executor=slurm"]


@pytest.mark.parametrize(
    "args, valid, sentence",
    [
        (["--profil", "x"], ALL, r"no option --profil here; did you mean '--profile'"),
        (["--fit", "8xH100"], ("profile",), r"no option --fit here; "),
        (["--file"], ALL, r"--file needs a value: --file VALUE"),
        (["--file", "--no-plan"], ALL, r"--file needs a value"),
        (["--file=a", "--file=b"], ALL, r"--file is given twice"),
    ],
)
def test_wrong_options_are_one_sentence(args: list[str], valid: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        own_options(args, valid)


def test_words_fill_fields_and_the_last_takes_the_rest() -> None:
    assert words_as_fields("profile", ["check", "path=x.yaml"]) == ["action=check", "path=x.yaml"]
    assert words_as_fields("compare", ["runs/a", "output=x.png", "runs/b"]) == [
        "directories=['runs/a', 'runs/b']",
        "output=x.png",
    ]
    assert words_as_fields("finetune", ["smollm2"]) == ["smollm2"]
    with pytest.raises(ConfigError, match="status takes EXPERIMENT and nothing more; 'b' is over"):
        words_as_fields("status", ["a", "b"])
