"""``nemorun graft VERB --help``: examples as they are typed, every field with what it means, options last."""

import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pkgutil import resolve_name
from typing import Any, Optional, Union, get_args, get_origin

import typer
from nemo_run.cli import api
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from graftwork.cli.arguments import OPTION_HELP, option_names
from graftwork.cli.verbs import VERBS, Verb

GROUPS: Mapping[str, Sequence[str]] = {
    "What it is about": (
        "action", "shell", "experiment", "directory", "directories", "prompts", "file", "adapters", "weights",
    ),
    "Model": ("model", "base", "adapter", "peft", "names", "against", "client", "dtype", "check_base"),
    "Data": (
        "data", "prompt_template", "answer_template", "task", "system", "labels", "limit", "row_layout",
        "batch_tokens",
    ),
    "Training": (
        "trainer", "optim", "resume", "seed", "allow_changes", "samples", "early_stopping", "recipe_text",
        "recipe_changes",
    ),
    "Answers": ("max_new_tokens", "temperature", "top_p", "seed"),
    "Output": (
        "output", "baseline", "loggers", "for_", "experts", "combine", "rank", "name", "merged", "sort", "follow",
        "verify",
    ),
}  # fmt: skip
"""The fields of all verbs, in the order in which help lists them."""

NESTED: Mapping[str, tuple[str, Sequence[str]]] = {
    "model.": ("graftwork.models:GPT", ()),
    "peft[0].": ("graftwork.peft:LoRA", ()),
    "data.": ("graftwork.data:SFTDataModule", ()),
    "trainer.": ("lightning.pytorch:Trainer", (
        "devices", "num_nodes", "max_steps", "max_epochs", "max_time", "val_check_interval", "limit_val_batches",
        "gradient_clip_val", "log_every_n_steps", "default_root_dir",
    )),
    "trainer.strategy.": ("graftwork.training:MegatronStrategy", ()),
    "optim.": ("graftwork.optim:AdamW", ()),
}  # fmt: skip
"""What stands in the fields of a recipe: its class, and which of its fields are shown where there are too many."""

_ONLY_WITH = {"Training": "trainer", "Answers": "max_new_tokens"}
"""Groups of verbs that have this field; a seed belongs to one of them."""

_ENTRY = re.compile(r"    (\w+): (.*)")


class GraftEntrypoint(api.Entrypoint[..., object]):
    """NeMo Run's entry point of a verb, with help of our own."""

    def _add_executor_command(
        self, parent: typer.Typer, is_main: bool = False, cmd_defaults: Optional[dict[str, Any]] = None
    ) -> Callable[..., object]:
        shown = next(verb for verb in VERBS if verb.name == self.name)
        asked = self.fn

        class Command(api.EntrypointCommand):
            """The command that NeMo Run makes of a verb."""

            def format_help(self, ctx: Any, formatter: object) -> None:
                """Print what the verb takes."""
                tell(shown, asked, self.get_params(ctx))

        kwargs = {"help": escape(shown.does), "cls": Command}
        command: Callable[..., object] = self.run_ctx_cls.cli_command(
            parent, self.name, self.fn, type=self.type, command_kwargs=kwargs, is_main=is_main,
            cmd_defaults=cmd_defaults,
        )  # fmt: skip
        return command


def described(function: Callable[..., object]) -> dict[str, str]:
    """Return what the section ``Args:`` of a docstring says of every argument, as one line without marks of code.

    The arguments of a class may be told by its constructor, or by the class that it got the constructor from.
    """
    tellers = [part for one in getattr(function, "__mro__", (function,)) for part in (one, one.__init__)]
    section = next((t.partition("Args:\n")[2] for t in map(inspect.getdoc, tellers) if t and "Args:\n" in t), "")
    found, name = dict[str, str](), ""
    for line in section.splitlines():
        if entry := _ENTRY.fullmatch(line):
            name, text = entry.groups()
            found[name] = text
        elif line.startswith("      ") and name:
            found[name] += f" {line.strip()}"
        elif line:
            break
    return {name: text.replace("``", "") for name, text in found.items()}


def tell(verb: Verb, function: Callable[..., object], options: Sequence[Any]) -> None:
    """Print the help of a verb; ``options`` are NeMo Run's."""
    typer.echo(f"\nUsage: nemorun graft {verb.name} [FIELD=VALUE ...] [OPTIONS]\n\n{verb.does}")
    typer.echo(f"{verb.more}\n" if verb.more else "")
    typer.echo("\n".join(["Examples", *(f"  {example}" for example in verb.examples)]))
    console = Console(markup=False, highlight=False)
    for title, rows in _sections(verb, function, options):
        if rows:
            console.print(Text(f"\n{title}", style="bold"))
            console.print(_table(rows))


Row = tuple[str, str, str]
"""A name, what kind of value it takes, and what it means."""


def _sections(verb: Verb, function: Callable[..., object], options: Sequence[Any]) -> Iterator[tuple[str, list[Row]]]:
    own = _fields(function)
    if verb.trains and verb.name != "finetune":
        yield f"Fields of {verb.name}", list(own.values())
        own = _fields(resolve_name(VERBS[0].place))
    for title, names in GROUPS.items():
        if _ONLY_WITH.get(title, names[0]) in own or title not in _ONLY_WITH:
            yield title, [own[name] for name in names if name in own]
    if verb is VERBS[0]:
        yield from _nested()
    if verb.trains:
        yield "Names", list(_names())
    context = resolve_name(verb.context)
    takes = context.takes if verb.trains else ()
    yield "Options", [(name, "", OPTION_HELP[name]) for name in option_names(takes)]
    yield "Options of NeMo Run", [(", ".join(one.opts), "", one.help or "Show this message.") for one in options]


def _nested() -> Iterator[tuple[str, list[Row]]]:
    """Return what stands inside of the fields of a recipe; of another project's texts the first sentence."""
    for path, (place, shown) in NESTED.items():
        thing = resolve_name(place)
        rows = _fields(thing)
        title = f"{path}FIELD, of {thing.__name__}"
        yield title, [_first_sentence(rows[name]) if shown else rows[name] for name in shown or rows]


def _fields(function: Callable[..., object]) -> dict[str, Row]:
    texts, rows = described(function), dict[str, Row]()
    for name, parameter in inspect.signature(function).parameters.items():
        default = parameter.default
        shown = repr(default) if isinstance(default, str) and " " in default else default
        more = " (required)" if default is parameter.empty else "" if default is None else f" (default {shown})"
        rows[name] = name, kind(parameter.annotation), texts.get(name, "") + more
    return rows


def _first_sentence(row: Row) -> Row:
    name, what, text = row
    return name, what, text.partition(". ")[0].rstrip(".") + "."


def kind(annotation: Any) -> str:
    """Return a type as help tells it: ``list[str]`` for an optional list of texts."""
    if get_origin(annotation) in (Union, types.UnionType):
        return " | ".join(kind(one) for one in get_args(annotation) if one is not types.NoneType)
    if get_args(annotation):
        return f"{kind(get_origin(annotation))}[{', '.join(map(kind, get_args(annotation)))}]"
    return getattr(annotation, "__name__", str(annotation))


def _names() -> Iterator[Row]:
    from graftwork.executors import EXECUTORS
    from graftwork.peft import METHODS
    from graftwork.recipes import RECIPES

    yield "--factory", "", ", ".join(RECIPES)
    yield "peft=", "", ", ".join(method.short_name() for method in METHODS.values())
    yield "run.executor=", "", ", ".join(EXECUTORS)


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    for width in (2, None, None, None):
        table.add_column(no_wrap=width is not None, min_width=width, overflow="fold")
    for name, what, text in rows:
        table.add_row("", name, what, text)
    return table
