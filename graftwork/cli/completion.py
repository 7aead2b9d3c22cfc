"""``nemorun graft completion bash|zsh``: a script that completes verbs, recipes and fields, and starts no Python.

What it offers is written into it when it is made: the registries of this version.
"""

import inspect
from collections.abc import Iterator, Mapping
from pkgutil import resolve_name

import fiddle as fdl
import nemo_run as run

from graftwork.cli.arguments import OPTIONS
from graftwork.cli.verbs import VERBS
from graftwork.errors import ConfigError, suggest
from graftwork.executors import EXECUTORS
from graftwork.peft import METHODS
from graftwork.recipes import AUTO, RECIPES
from graftwork.recipes.show import TOLD

WITH_RECIPE = ("finetune", "sweep")
"""Verbs that take ``--factory`` and any field of a recipe."""

NEMO_RUN_OPTIONS = (
    "--factory", "--dryrun", "--yes", "--yaml", "--to-yaml", "--to-toml", "--to-json", "--detach", "--direct", "--help",
)  # fmt: skip

SHELLS = ("bash", "zsh")


def completion(shell: str) -> None:
    """Print the completion script of a shell; the shell's start-up file evaluates it.

    Args:
        shell: ``bash`` or ``zsh``.
    """
    if shell not in SHELLS:
        raise ConfigError(f"there is no completion for {shell!r}; {suggest(shell, SHELLS)}")
    print(script(shell))


def script(shell: str) -> str:
    """Return the completion script of a shell."""
    verbs = {verb.name: verb.place for verb in VERBS}
    fields = {verb: sorted(_fields(verb, place)) for verb, place in verbs.items()}
    lists = {"verbs": list(verbs), "recipes": [*RECIPES, AUTO], "options": sorted({*NEMO_RUN_OPTIONS, *OPTIONS})}
    lists |= {f"fields_{verb}": found for verb, found in fields.items()}
    return "\n".join([*_lists(lists), _CANDIDATES, _ENDS[shell]])


def paths(config: fdl.Buildable, prefix: str = "") -> Iterator[str]:
    """Yield the path of every field that can be set in ``config``, set or not."""
    given = config.__arguments__
    for parameter in inspect.signature(config.__fn_or_cls__).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or parameter.name in TOLD:
            continue
        path = prefix + parameter.name
        yield path
        value = given.get(parameter.name)
        for place, child in enumerate(value) if isinstance(value, list) else [(-1, value)]:
            if isinstance(child, fdl.Buildable):
                yield from paths(child, f"{path}[{place}]." if place >= 0 else f"{path}.")


def _fields(verb: str, place: str) -> set[str]:
    """Return the words that set a field of a verb: ``path=``, or ``path=value`` where the values have names."""
    configs = [recipe.finetune_recipe() for recipe in RECIPES.values()] if verb in WITH_RECIPE else []
    found = {path for config in [*configs, run.Partial(resolve_name(place))] for path in paths(config)}
    named = {"peft": [method.short_name() for method in METHODS.values()]} if configs else {}
    named["run.executor"] = list(EXECUTORS)
    words = {f"{path}={value}" for path, values in named.items() for value in values}
    return (
        words | {f"{path}=" for path in found - set(named)} | {f"run.executor.{name}=" for name in _executor_fields()}
    )


def _executor_fields() -> set[str]:
    classes = [inspect.signature(make).return_annotation for make in EXECUTORS.values()]
    return {name for executor in classes for name in inspect.signature(executor).parameters}


def _lists(lists: Mapping[str, list[str]]) -> list[str]:
    return [f"_graftwork_{name}='" + "\n".join(words) + "'" for name, words in lists.items()]


_CANDIDATES = r"""
# Print what may follow: the verb, the word before, the word so far.
_graftwork_candidates() {
    local list one
    if [ -z "$1" ]; then list="$_graftwork_verbs"
    elif [ "$2" = --factory ]; then list="$_graftwork_recipes"
    else case "$3" in
        --factory=*) list="$(printf -- '--factory=%s\n' $(printf '%s ' "$_graftwork_recipes"))" ;;
        -*) list="$_graftwork_options" ;;
        *) eval "list=\"\$_graftwork_fields_$1\"" ;;
    esac; fi
    printf '%s\n' "$list" | while IFS= read -r one; do
        case "$one" in "$3"*) printf '%s\n' "$one" ;; esac
    done
}
"""

_ENDS = {
    "bash": r"""
_graftwork() {
    local line="${COMP_LINE:0:COMP_POINT}" words word before
    [ -n "$line" ] || line="${COMP_WORDS[*]:0:COMP_CWORD+1}"
    read -ra words <<< "$line"
    if [ "${words[1]}" != graft ] || { [ "${#words[@]}" -le 2 ] && [ "${line: -1}" != " " ]; }; then
        if declare -F _nemorun_completion > /dev/null; then _nemorun_completion "$@"
        else COMPREPLY=($(compgen -W "graft experiment devspace" -- "${COMP_WORDS[COMP_CWORD]}")); fi
        return
    fi
    word=""
    if [ "${line: -1}" != " " ]; then word="${words[${#words[@]}-1]}"; unset "words[${#words[@]}-1]"; fi
    before="${words[${#words[@]}-1]}"
    local IFS=$'\n' found
    found=($(_graftwork_candidates "${words[2]}" "$before" "$word"))
    COMPREPLY=()
    local one start=""
    case "$word" in *=*) start="${word%%=*}=" ;; esac   # bash completes what follows the sign only
    for one in "${found[@]}"; do COMPREPLY+=("${one#"$start"}"); done
    [ "${#COMPREPLY[@]}" -eq 1 ] && [ "${COMPREPLY[0]%=}" = "${COMPREPLY[0]}" ] && compopt +o nospace 2> /dev/null
    return 0
}
complete -o nospace -F _graftwork nemorun""",
    "zsh": r"""
_graftwork() {
    local -a found
    if (( CURRENT < 3 )) || [[ "${words[2]}" != graft ]]; then
        compadd graft experiment devspace
        return
    fi
    local verb=""
    (( CURRENT > 3 )) && verb="${words[3]}"
    found=("${(@f)$(_graftwork_candidates "$verb" "${words[CURRENT-1]}" "${words[CURRENT]}")}")
    compadd -Q -S '' -- ${(M)found:#*=}
    compadd -Q -- ${found:#*=}
}
(( ${+functions[compdef]} )) || { autoload -Uz compinit && compinit }
compdef _graftwork nemorun""",
}
