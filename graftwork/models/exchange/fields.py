"""Fields of a Hugging Face ``adapter_config.json``: those that are honoured, those that change nothing, all others."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from graftwork.errors import ArtifactError, quoted
from graftwork.peft.method import MOST

Config = Mapping[str, object]

_COMMON = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version"),
        "revision",
    }
)
"""Fields of every adapter that say where it comes from, or are read here."""
_PROMPT = frozenset(
    {
        *("num_virtual_tokens", "token_dim", "num_transformer_submodules"),
        *("num_attention_heads", "num_layers"),  # shape prefixes, which these are not
    }
)
KNOWN: Mapping[str, frozenset[str]] = {
    "LORA": _COMMON
    | {
        *("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
        *("lora_dropout", "layers_to_transform", "layers_pattern", "init_lora_weights", "bias"),
        *("exclude_modules", "target_parameters"),
        "fan_in_fan_out",  # follows from the module, as Hugging Face PEFT itself sets it
        "megatron_core",  # counts only with megatron_config
        "qalora_group_size",  # counts only with use_qalora
    },
    "IA3": _COMMON | {"target_modules", "exclude_modules", "feedforward_modules", "fan_in_fan_out", "init_ia3_weights"},
    "PROMPT_TUNING": _COMMON
    | _PROMPT
    # where training began
    | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"},
    "P_TUNING": _COMMON
    | _PROMPT
    # the encoder's, which is not in the file: its table is
    | {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"},
}
"""By ``peft_type``, the fields that are read here or change nothing; all others must be unset."""
UNSET: tuple[object, ...] = (None, False, "", [], {})
VALID: Mapping[str, tuple[object, ...]] = {
    "bias": (None, "none"),
    "task_type": (None, "CAUSAL_LM", "SEQ_2_SEQ_LM"),
    # the others (pissa, olora, loftq, ...) change the base's weights too
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal"),
}
"""Fields that have several valid values."""
_ANY = r".*\."
_NAME = re.compile(r"[\w.-]{1,300}")
MANY = 100_000


@dataclass(frozen=True)
class Fields:
    """The fields of one adapter, every one of which is honoured or changes nothing; ``where`` is its directory."""

    config: Config
    where: str

    def __post_init__(self) -> None:
        if self.kind not in KNOWN:
            self.refuse("peft_type", f"valid: {', '.join(KNOWN)}")
        for field, value in self.config.items():
            if field in VALID:
                if not any(value is valid or (isinstance(valid, str) and value == valid) for valid in VALID[field]):
                    self.refuse(field, f"valid: {', '.join(repr(v) for v in VALID[field] if v is not None)}")
            elif field not in KNOWN[self.kind] and value not in UNSET:
                self.refuse(field, "it would change what the adapter does, so it must be unset")

    @property
    def kind(self) -> str:
        """The ``peft_type``."""
        return str(self.config.get("peft_type"))

    def refuse(self, field: str, why: str) -> None:
        """Raise ArtifactError for the value of a field."""
        given = f"{quoted(field, bare=True)}={quoted(self.config.get(field))}"
        raise ArtifactError(f"{self.where} has {given}, which cannot be honoured; {why}.")

    def whole(self, field: str) -> int:
        """Return a whole number above zero."""
        value = self.config.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST:
            self.refuse(field, f"a whole number from 1 to {MOST:,} is needed")
        assert isinstance(value, int)
        return value

    def number(self, field: str, default: float) -> float:
        """Return a number, ``default`` where it is absent."""
        value = self.config.get(field, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.refuse(field, "a number is needed")
        assert isinstance(value, (int, float))
        return value

    def flag(self, field: str) -> bool:
        """Return true or false, false where it is absent."""
        value = self.config.get(field)
        if value not in (None, True, False) or (isinstance(value, int) and not isinstance(value, bool)):
            self.refuse(field, "true or false is needed")
        return bool(value)

    def names(self, field: str) -> list[str]:
        """Return a list of plain names; a regular expression, which is a string, is refused."""
        value = self.config.get(field)
        if not isinstance(value, list) or len(value) > MANY or not all(map(_plain, value)):
            self.refuse(field, "a list of module names is needed, such as those in the keys of its tensors")
        assert isinstance(value, list)
        return value

    def patterns(self, field: str) -> dict[str, float]:
        """Return a number by name; a name is the end of a module's, as Hugging Face PEFT reads it."""
        value = self.config.get(field) or {}
        if not isinstance(value, dict) or len(value) > MANY or not all(_plain(_end(key)) for key in value):
            self.refuse(field, "numbers by module names are needed, without signs of regular expressions")
        assert isinstance(value, dict)
        for number in value.values():
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number <= MOST:
                self.refuse(field, f"numbers above 0, at most {MOST:,}, are needed")
        return {key.removeprefix(_ANY): number for key, number in value.items()}

    def targeted_parameters(self, parameters: Collection[str]) -> set[str]:
        """Return those of the ``parameters`` whose name, or the end of it, target_parameters has."""
        targets = set(self.names("target_parameters"))
        return {name for name in parameters if not targets.isdisjoint(_ends(name))}

    def layers(self) -> set[int] | None:
        """Return ``layers_to_transform``, None for all."""
        value = self.config.get("layers_to_transform")
        if value in (None, []):
            return None
        found = value if isinstance(value, list) else [value]
        if not all(isinstance(one, int) and not isinstance(one, bool) for one in found):
            self.refuse("layers_to_transform", "whole numbers are needed")
        return set(found)

    def targeted(self, modules: Collection[str]) -> set[str]:
        """Return those of the ``modules`` that target_modules, exclude_modules and layers_to_transform choose."""
        targets, layers = set(self.names("target_modules")), self.layers()
        left = set(self.names("exclude_modules")) if self.config.get("exclude_modules") else set()
        patterns = self.config.get("layers_pattern") or None
        stacks = [patterns] if isinstance(patterns, str) else self.names("layers_pattern") if patterns else []
        ends = {m for m in modules if not targets.isdisjoint(_ends(m)) and left.isdisjoint(_ends(m))}
        if layers is None:
            return ends
        return {module for module in ends if module in targets or _layer(module, stacks) in layers}


def value_of(patterns: Mapping[str, float], module: str, default: float) -> float:
    """Return the value of the first pattern that names the module: the whole of it, or the end behind a dot."""
    return next((value for end, value in patterns.items() if end == module or module.endswith(f".{end}")), default)


def _end(key: object) -> object:
    """Return a pattern without the expression for any beginning, which PEFT writes itself and which says nothing."""
    return key.removeprefix(_ANY) if isinstance(key, str) else key


def _plain(name: object) -> bool:
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def _ends(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _layer(module: str, stacks: Collection[str]) -> int | None:
    """Return the index of the module's layer: the first number behind a name (one of ``stacks``, if there are any)."""
    parts = module.split(".")
    first = 1 if stacks else 2  # without a pattern Hugging Face PEFT wants something in front of the layers' name
    for place in range(first, len(parts) - 1):
        if parts[place].isdigit() and (not stacks or parts[place - 1] in stacks):
            return int(parts[place])
    return None
