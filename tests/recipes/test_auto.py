"""Any base becomes a recipe: its numbers are the checkpoint's, its layout fits, and it is a plain recipe."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import catalogue
import fiddle as fdl
import nemo_run as run
import pytest
from huggingface_hub import constants

from graftwork import recipes
from graftwork.cli.context import GraftContext
from graftwork.cli.factories import register
from graftwork.data.chat import row_templates
from graftwork.data.encoder import RowEncoder
from graftwork.data.schema import Place, parse_row
from graftwork.errors import CheckpointError, ConfigError, GraftworkError
from graftwork.inference import generate
from graftwork.layout import Layout
from graftwork.models import GPT, T5
from graftwork.models.weights import read_config, shape_from_hf
from graftwork.models.weights.hub import resolve
from graftwork.peft import LoRA
from graftwork.planning.blueprint import Blueprint
from graftwork.planning.checks import Intent, layout_problems
from graftwork.planning.choice import FREE, choose
from graftwork.planning.devices import DEVICES
from graftwork.planning.plan import make_plan
from graftwork.planning.workload import Workload
from graftwork.recipes import auto, show
from graftwork.recipes.files import from_text, load, save
from graftwork.training import finetune
from tests.contracts.methods import shape
from tests.helpers.t5_tokenizer import t5_tokenizer
from tests.helpers.tiny_gguf import write_gguf
from tests.helpers.tiny_hf import make_tiny
from tests.helpers.tiny_recipe import make_place, summary
from tests.helpers.tiny_t5 import make_t5
from tests.helpers.tiny_tokenizer import tiny_tokenizer

ROW = {"input": "a {warm} film", "output": "posi}tive"}
DATED = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a chat template and rows to learn from."""
    return make_place(tmp_path_factory.mktemp("auto"))


@pytest.fixture(autouse=True)
def laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, whatever this one has."""
    monkeypatch.setattr("graftwork.recipes.auto.torch.cuda.device_count", lambda: 0)


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices on which everything fits as it is; nothing is measured."""
    monkeypatch.setattr("graftwork.recipes.auto.choose", lambda intent, *_: intent)


def test_a_gpt_on_a_laptop(place: Path) -> None:
    recipe = auto.finetune_recipe(base=str(place / "base"), dir="out", name="x")
    assert recipe.model.__fn_or_cls__ is GPT and recipe.model.checkpoint == str(place / "base")
    assert fdl.build(recipe.model.shape) == shape_from_hf(read_config(place / "base"))
    assert (recipe.trainer.devices, recipe.trainer.num_nodes, recipe.trainer.default_root_dir) == (1, 1, "out/x")
    assert recipe.model.dtype == "fp32" and recipe.data.seq_length == 128 and not recipe.data.packing
    assert [type(fdl.build(one)) for one in recipe.peft] == [LoRA]
    assert not [one for one in recipes.plan(recipe, ["cpu"]).problems if one.field != "data.train"]


def test_a_t5_over_gpus(tmp_path: Path) -> None:
    base = make_t5("t5v11", tmp_path / "t5")
    recipe = auto.finetune_recipe(base=str(base), num_gpus_per_node=2, peft=None, seq_length=32)
    assert recipe.model.__fn_or_cls__ is T5 and recipe.peft is None
    assert fdl.build(recipe.model.shape) == shape_from_hf(read_config(base))
    assert (recipe.model.dtype, recipe.trainer.devices, recipe.data.packing) == ("bf16", 2, False)
    assert (recipe.data.global_batch_size, recipe.data.micro_batch_size, recipe.data.seq_length) == (64, 16, 32)


def test_a_mixture_spreads_its_experts(tmp_path: Path) -> None:
    base = make_tiny("qwen3_moe_some", tmp_path / "moe")
    recipe = auto.finetune_recipe(base=str(base), num_gpus_per_node=2, num_nodes=2)
    assert fdl.build(recipe.model.shape) == shape_from_hf(read_config(base))
    assert recipe.peft[0].target_modules == ["linear_qkv", "linear_proj"] and recipe.model.recompute == "selective"
    assert (recipe.trainer.num_nodes, recipe.trainer.devices, recipe.data.packing) == (2, 2, True)
    sizes = recipes.RECIPES["mixtral_8x7b"].finetune_recipe().model.shape
    intent = Intent(Blueprint(GPT, fdl.build(sizes), "bf16"), Layout(), 8, Workload(4096, 1, 8, packing=True))
    chosen = choose(intent, 8, DEVICES["H100"])
    assert chosen is not None and chosen.layout == Layout(expert_model_parallel_size=2)
    assert 2 * 46.7e9 / 2 < (1 - FREE) * 80e9 < 2 * 46.7e9
    assert choose(replace(intent, world=1), 1, DEVICES["H100"]) is None


def test_it_is_a_plain_recipe_that_needs_no_checkpoint_again(place: Path, tmp_path: Path, roomy: None) -> None:
    base = shutil.copytree(place / "base", tmp_path / "base")
    recipe = auto.finetune_recipe(base=str(base))
    saved = save(recipe, tmp_path / "run.yaml")
    shutil.rmtree(base)
    assert load(saved) == recipe and show(from_text(show(recipe))) == show(recipe)
    grid = recipes.grid(recipe, {"peft[0].dim": [4, 8]})
    assert [one.peft[0].dim for one in grid] == [4, 8]
    changed = load(saved)
    changed.optim.lr = 1e-3
    assert recipes.diff(recipe, changed).splitlines() == ["- optim.lr = None", "+ optim.lr = 0.001"]


def test_a_gguf_file_is_the_same_base_before_and_after_its_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, roomy: None
) -> None:
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    source = make_tiny("llama", tmp_path / "source", vocab_size=16)
    file = write_gguf(tmp_path / "tiny.gguf", source)
    before = auto.finetune_recipe(base=str(file))
    assert fdl.build(before.model.shape) == shape_from_hf(read_config(source)) and before.model.dtype == "auto"
    assert not (tmp_path / "cache").exists()
    resolve(file)
    assert auto.finetune_recipe(base=str(file)) == before


@pytest.mark.parametrize("adds_bos", [False, True])
def test_templates_give_the_tokens_that_the_conversation_has(tmp_path: Path, adds_bos: bool) -> None:
    tokenizer: Any = tiny_tokenizer(tmp_path, adds_bos=adds_bos)
    if adds_bos:
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    templates = row_templates(tokenizer)
    assert templates is not None
    prompt, answer = templates
    at = Place("rows", "line", 1)
    messages = [{"role": "user", "content": ROW["input"]}, {"role": "assistant", "content": ROW["output"]}]
    rows = [(at, parse_row(row, at, answered=True)) for row in (ROW, {"messages": messages})]
    encoder = RowEncoder(tokenizer, prompt_template=prompt, answer_template=answer)
    ours, theirs = encoder.whole(rows)
    assert (ours.tokens, ours.loss) == (theirs.tokens, theirs.loss) and any(ours.loss)


def test_a_template_that_says_the_date_or_drops_the_row_gives_none(tmp_path: Path) -> None:
    tokenizer: Any = tiny_tokenizer(tmp_path, chat_template=DATED)
    assert row_templates(tokenizer) is None
    tokenizer.chat_template = "{{ messages[0].role }}"
    assert row_templates(tokenizer) is None
    tokenizer.chat_template = None
    assert row_templates(tokenizer) is None


def intent(rows: Workload, world: int = 8) -> Intent:
    return Intent(Blueprint(GPT, shape(), "bf16", None, (LoRA(dim=4),)), Layout(), world, rows)


def test_the_choice_fits_and_nothing_simpler_does() -> None:
    wanted = intent(Workload(64, 1, 8, packing=True))
    small = replace(DEVICES["A100"], runtime=0.0)
    whole = make_plan(replace(wanted, world=1), [small]).devices[0].peak
    assert choose(wanted, 8, small) == wanted
    tight = replace(small, memory=0.8 * whole)
    chosen = choose(wanted, 8, tight)
    assert chosen is not None and chosen.layout.model_ranks > 1 and not layout_problems(chosen)
    assert make_plan(chosen, [tight]).devices[0].peak <= tight.memory
    assert choose(wanted, 8, replace(small, memory=1e3)) is None


def hub_id_offline(root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root / "hub"))
    return "owner/nothing"


def of_config(**fields: Any) -> Callable[[Path, pytest.MonkeyPatch], str]:
    def make(root: Path, _: pytest.MonkeyPatch) -> str:
        (root / "config.json").write_text(json.dumps(fields))
        return str(root)

    return make


WRONG: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], str], str]] = {
    "none": (lambda *_: "", r"auto needs a base, auto\(base=PLACE\)"),
    "not there": (lambda root, _: str(root / "no"), "is no checkpoint directory, GGUF file, hub id"),
    "no gguf": (lambda root, _: str(root / "no.gguf"), "the GGUF file '.*no.gguf' does not exist"),
    "offline": (hub_id_offline, "its config.json is neither in the hub's local cache.*run: hf download owner/nothing"),
    "family": (of_config(model_type="nemotron_h"), "model_type 'nemotron_h' is not supported; .*nemotron"),
    "class": (
        of_config(model_type="t5", architectures=["T5EncoderModel"]),
        r"architectures=\['T5EncoderModel'\].*valid for model_type 't5': T5ForConditionalGeneration",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_base_that_is_none_is_one_sentence(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, message = WRONG[case]
    with pytest.raises(GraftworkError, match=message) as caught:
        auto.finetune_recipe(base=make(tmp_path, monkeypatch))
    assert "\n" not in str(caught.value) and isinstance(caught.value, ConfigError | CheckpointError)


def test_of_a_hub_id_config_and_tokenizer_are_enough(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, roomy: None
) -> None:
    hub_id_offline(tmp_path, monkeypatch)
    home = tmp_path / "hub" / "models--owner--tiny"
    snapshot = shutil.copytree(place / "base", home / "snapshots" / ("a" * 40))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("a" * 40)
    (snapshot / "model.safetensors").unlink()
    ours = auto.finetune_recipe(base="owner/tiny")
    assert show(ours).replace("owner/tiny", str(place / "base")) == show(auto.finetune_recipe(base=str(place / "base")))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_nodes": 2}, "num_nodes=2 needs num_gpus_per_node"),
        ({"num_gpus_per_node": 0}, "num_gpus_per_node=0 is no number of devices; 1 and more are valid"),
        ({"device": "V100"}, "device is 'V100'"),
        ({"seq_length": 256}, "data.seq_length=256 is longer than the model's context"),
    ],
)
def test_devices_and_rows_that_cannot_be_are_refused(asked: dict[str, Any], message: str, place: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        auto.finetune_recipe(base=str(place / "base"), **asked)


def test_a_cpu_that_is_too_small_for_fp32_takes_bf16(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftwork.recipes.auto.choose", lambda one, *_: one if one.blueprint.dtype == "bf16" else None)
    recipe = auto.finetune_recipe(base=str(place / "base"))
    assert recipe.model.dtype == "bf16" and recipe.trainer.devices == 1


def test_what_fits_nowhere_says_what_would_help(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftwork.recipes.auto.choose", lambda *_: None)
    with pytest.raises(ConfigError, match=r"does not fit 1 x cpu of .* GB: name the GPUs .*num_gpus_per_node"):
        auto.finetune_recipe(base=str(place / "base"))
    with pytest.raises(ConfigError, match=r"does not fit 2 x A100 of 80 GB: take more devices"):
        auto.finetune_recipe(base=str(place / "base"), num_gpus_per_node=2)


class Parsed(GraftContext):
    """Keeps the task instead of running it."""

    def execute(self, task: run.Partial) -> None:
        self.__dict__["task"] = task


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The bases that the command line asks for; none of them is looked at."""
    asked: list[str] = []

    def finetune_recipe(base: str = "", name: str = "default", num_nodes: int = 1) -> run.Partial:
        asked.append(base)
        return run.Partial(finetune)

    monkeypatch.setattr(auto, "finetune_recipe", finetune_recipe)
    monkeypatch.setattr(catalogue, "REGISTRY", dict(catalogue.REGISTRY))
    register()
    return asked


@pytest.mark.parametrize("written", ["base={}", "base='{}'", 'base="{}"', "name=x, base={}"])
@pytest.mark.parametrize("base", ["/p/x.y/m", "owner/Model-0.5B", "../run.d/my model", "a=b/c(1).gguf", "~/m"])
def test_a_place_is_taken_as_it_is_typed(written: str, base: str, made: list[str]) -> None:
    Parsed(name="finetune", factory=f"auto({written.format(base)})", skip_confirmation=True).cli_execute(finetune, [])
    assert made == [base]


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("auto", "auto needs a base, auto(base=PLACE)"),
        ("auto(base=/p/a,b)", "'b' of auto(...) is no argument=value; a comma separates arguments"),
        ("auto(bas=x)", "auto has no argument 'bas'; did you mean 'base'"),
        ("auto(base=x,num_nodes=two)", "auto: num_nodes=two is not valid: a value of type int is expected"),
        ("auto(base=/no/such/place)", "'/no/such/place' is no checkpoint directory"),
    ],
)
def test_a_wrong_factory_is_one_line(factory: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        Parsed(name="finetune", factory=factory, skip_confirmation=True).cli_execute(finetune, [])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_it_trains_from_the_command_line(place: Path) -> None:
    factory = f"auto(base={place / 'base'}, dir={place}, name=run)"
    words = [
        f"data.train={place / 'train.jsonl'}",
        f"data.cache_dir={place / 'cache'}",
        "data.validation_fraction=0.25",
    ]
    GraftContext(name="finetune", factory=factory, skip_confirmation=True).cli_execute(
        finetune, [*words, "trainer.max_steps=2", "trainer.val_check_interval=2"]
    )
    assert summary(place / "run")["steps"] == 2
    assert "+ trainer.max_steps = 2" in (place / "run" / "report.html").read_text()
    told = recipes.files.from_adapter(place / "run" / "adapter")
    assert told.model.checkpoint == str(place / "base") and told.data.prompt_template.endswith("assistant\n")


def test_an_encoder_decoder_trains_too_and_answers(tmp_path: Path) -> None:
    words = t5_tokenizer(tmp_path / "base")
    base = make_t5("t5v11", tmp_path / "base", vocab_size=len(words))
    rows = [{"input": f"a {word} film", "output": word} for word in ("warm", "cold", "long", "good") * 4]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = auto.finetune_recipe(base=str(base), dir=str(tmp_path), name="run", seq_length=16)
    assert recipe.model.__fn_or_cls__ is T5 and recipe.data.seq_length == 16
    recipe.data.train, recipe.data.cache_dir = str(tmp_path / "train.jsonl"), str(tmp_path / "cache")
    recipe.trainer.max_steps, recipe.samples = 2, 0
    fdl.build(recipe)()
    assert summary(tmp_path / "run")["steps"] == 2
    answers = generate(str(base), ["a warm film"], adapter=str(tmp_path / "run" / "adapter"), max_new_tokens=4)
    assert len(answers) == 1
