"""An adapter knows how it was trained to be asked: nobody has to repeat the templates, and nobody can mix them up."""

import json
import logging
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from graftwork.data import SFTDataModule
from graftwork.errors import ConfigError
from graftwork.inference import Examples, evaluate, evaluate_model, generate
from graftwork.models import GPT, load
from graftwork.optim import AdamW
from graftwork.peft import LoRA, PTuning
from graftwork.training import MegatronStrategy
from tests.helpers.tiny_run import finetune
from tests.inference.conftest import TEMPLATE

ANSWER = " -> {output}"
FORMAT = {"prompt_template": TEMPLATE, "answer_template": ANSWER, "add_bos": None, "add_eos": True}


def data_module(file: Path, **options) -> SFTDataModule:
    settings = {"prompt_template": TEMPLATE, "answer_template": ANSWER, "seq_length": 64} | options
    return SFTDataModule(
        train=str(file), predict=str(file), global_batch_size=4, micro_batch_size=4, cache_dir=str(file.parent / "c"),
        **settings,
    )  # fmt: skip


def train(model: GPT, file: Path, root: Path, strategy: bool = True, **options) -> Trainer:
    arguments = {"strategy": MegatronStrategy()} if strategy else {"enable_checkpointing": False, "logger": False}
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=2, default_root_dir=root, enable_progress_bar=False,
        enable_model_summary=False, **arguments,
    )  # fmt: skip
    if strategy:
        finetune(model, trainer, data_module(file, **options), optim=AdamW(lr=1e-2))
    else:
        trainer.fit(model, datamodule=data_module(file, **options))
    return trainer


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.fixture
def run(model, file, tmp_path) -> Path:
    """The run directory of a LoRA trained with its own templates."""
    model.add_adapter(LoRA(dim=2))
    train(model, file, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.fault(
    "an adapter is asked with another template than it was trained with",
    "the template travels with the adapter",
)
def test_generate_and_evaluate_ask_as_the_training_did(run, checkpoint, file):
    where = {"base": str(checkpoint), "adapter": str(run / "adapter"), "dtype": "fp32"}
    ours, explicit = (
        evaluate(**where, data=str(file), baseline=True, **templates)
        for templates in ({}, {"prompt_template": TEMPLATE, "answer_template": ANSWER})
    )
    assert ours == explicit
    assert ours["loss"] != evaluate(**where, data=str(file), prompt_template="{input}")["loss"]
    assert ours["loss"] != evaluate(**where, data=str(file), answer_template=" {output}")["loss"]
    asked = {"prompts": ["dull"], "max_new_tokens": 6}
    assert generate(**where, **asked) == generate(**where, **asked, prompt_template=TEMPLATE)


def test_the_artifact_keeps_it_and_tells_it(run):
    [entry] = json.loads((run / "adapter" / "adapter_config.json").read_text())["adapters"]
    assert entry["prompt"] == FORMAT
    assert repr(TEMPLATE) in (run / "adapter" / "README.md").read_text()


def test_it_survives_loading_and_saving_and_leaves_with_its_adapter(run, checkpoint, tmp_path):
    model = load(checkpoint, dtype="fp32")
    model.add_adapter(PTuning(virtual_tokens=2, embedding_dim=4, bottleneck_dim=4))
    assert model.prompt_format() == {}
    model.load_adapters(run / "adapter")
    model.save_adapters(tmp_path / "again")
    entries = json.loads((tmp_path / "again" / "adapter_config.json").read_text())["adapters"]
    assert [e["prompt"] for e in entries] == [{}, FORMAT]
    model.delete_adapter("lora")
    assert model.prompt_format() == {}


def test_a_plain_trainer_notes_it_for_what_trains_only(run, checkpoint, file, tmp_path):
    model = load(checkpoint, dtype="fp32")
    model.load_adapters(run / "adapter", trainable=False)
    model.add_adapter(LoRA(name="second", dim=2))
    train(model, file, tmp_path / "plain", strategy=False, prompt_template="{input} ?")
    model.save_adapters(tmp_path / "both")
    entries = json.loads((tmp_path / "both" / "adapter_config.json").read_text())["adapters"]
    assert [e["prompt"]["prompt_template"] for e in entries] == [TEMPLATE, "{input} ?"]
    with pytest.raises(ConfigError, match=r"'lora' and 'second' were trained with different values of prompt_template"):
        evaluate_model(model, file)
    assert evaluate_model(model, file, prompt_template=TEMPLATE)["rows"] == 10  # in the rest they agree


def test_the_base_is_asked_alike_where_a_template_places_the_prompt(model, file, tmp_path):
    model.add_adapter(PTuning(virtual_tokens=3, embedding_dim=4, bottleneck_dim=4, placement="template"))
    train(model, file, tmp_path / "run", prompt_template="{virtual:3}" + TEMPLATE)
    with model.adapters_disabled():
        before = evaluate_model(model, file)
        assert before == evaluate_model(model, file, prompt_template=TEMPLATE)
    assert before["loss"] != evaluate_model(model, file)["loss"]


def test_prediction_with_other_templates_warns(run, checkpoint, file, caplog):
    model = load(checkpoint, dtype="fp32")
    model.load_adapters(run / "adapter")
    model.generation = {"max_new_tokens": 1}
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    with caplog.at_level(logging.WARNING, "graftwork"):
        trainer.predict(model, datamodule=data_module(file))
        assert not warnings(caplog)
        trainer.predict(model, datamodule=data_module(file, prompt_template="{input}"))
        model.add_adapter(LoRA(name="second", dim=2))  # trained otherwise: the data's template is the one that counts
        model.stack.prompt_formats["second"] = FORMAT | {"prompt_template": "{input}"}
        trainer.predict(model, datamodule=data_module(file, prompt_template="{input}"))
    told = f"prompt_template is '{{input}}', but adapter 'lora' was trained with {TEMPLATE!r}."
    assert warnings(caplog) == [told, told]


def test_a_format_of_a_newer_version_is_refused(run, checkpoint, file):
    model = load(checkpoint, dtype="fp32")
    model.load_adapters(run / "adapter")
    model.stack.prompt_formats["lora"] = {"few_shot": 3}
    with pytest.raises(ConfigError, match="'few_shot', unknown here; update graftwork"):
        Examples.from_file(str(file)).references(model)
