"""What is wrong with a recipe, in words: where, what was found and expected, which name is near."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from bigtrain.config.recipe import Recipe
from bigtrain.config.renamed_keys import RENAMED_KEYS

# Names that other tools use, so that a newcomer's first guess is answered with ours.
SYNONYMS = {
    "learning_rate": "optim.lr",
    "optimizer": "optim.name",
    "lr_scheduler_type": "optim.schedule",
    "max_grad_norm": "optim.clip_norm",
    "gradient_clipping": "optim.clip_norm",
    "batch_size": "engine.global_batch",
    "train_batch_size": "engine.global_batch",
    "gradient_accumulation_steps": "engine.micro_batch",
    "zero_stage": "engine.kind",
    "mixed_precision": "engine.precision",
    "gradient_checkpointing": "engine.activation_checkpointing",
    "max_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "early_stopping_patience": "train.patience",
    "save_steps": "train.checkpoint_every",
    "eval_steps": "train.eval_every",
    "max_length": "data.seq_len",
}
KeyPath = tuple[str, ...]  # a dotted key in parts
_KIND_NAMES = {
    str: "text",
    bool: "true/false",
    int: "a whole number",
    float: "a number",
    dict: "a mapping",
    list: "a list",
}
_SHOWN_CHARACTERS = 60  # of a value, in an error


def explain(
    error: ValidationError, values: dict[str, Any], places: dict[str, str], path: Path
) -> Iterator[str]:
    """One line per key that is wrong.

    `values` is what was validated. `places` says for each dotted key which line of the file at
    `path`, or which override, has set it.
    """
    by_key: dict[KeyPath, list[Any]] = {}
    for problem in error.errors(include_url=False):
        by_key.setdefault(_key_path(problem, values), []).append(problem)
    for key, problems in by_key.items():
        if not any(_lies_below(other, key) for other in by_key):
            place = _nearest_place(_named_key(key, problems), places, path)
            yield f"{place}: {_describe(key, problems)}"


def describe_value(value: Any) -> str:
    """A value as an error shows it: itself and its type."""
    if value is None:
        return "nothing (null)"
    shown = repr(value)
    if len(shown) >= _SHOWN_CHARACTERS:
        shown = shown[: _SHOWN_CHARACTERS - 3] + "…"
    return f"{shown} ({_KIND_NAMES.get(type(value), type(value).__name__)})"


def _key_path(problem: Any, values: dict[str, Any]) -> KeyPath:
    """The key that pydantic's location names, without the tags it adds for members of a union."""
    location = problem["loc"]
    path: list[str] = []
    value: Any = values
    for part in location:
        is_key = isinstance(value, dict) and part in value
        is_index = isinstance(value, list) and isinstance(part, int) and part < len(value)
        if is_key or is_index:
            value = value[part]
            path.append(str(part))
    if problem["type"] == "missing":
        path.append(str(location[-1]))
    return tuple(path)


def _lies_below(key: KeyPath, section: KeyPath) -> bool:
    """Whether `key` is inside of `section`.

    Where text or a section is allowed, pydantic reports a wrong key of the section, and also that
    the section is no text: only the first one helps.
    """
    return len(key) > len(section) > 0 and key[: len(section)] == section


def _named_key(key: KeyPath, problems: list[Any]) -> KeyPath:
    """The key to look for: of a rule about several keys the one that its message begins with."""
    if problems[0]["type"] != "value_error":
        return key
    first_word = _rule(problems[0]).split()[0].rstrip(":")
    return (*key, *first_word.split("."))


def _rule(problem: Any) -> str:
    """What a validator of the recipe says."""
    return str(problem["msg"]).removeprefix("Value error, ")


def _nearest_place(key: KeyPath, places: dict[str, str], path: Path) -> str:
    """Where the key or one inside of it was set, or else the section around it, or else the file.

    An override of `modle.name` sets `modle` without a place of its own.
    """
    for length in range(len(key), 0, -1):
        dotted = ".".join(key[:length])
        if dotted in places:
            return places[dotted]
        for other, place in places.items():
            if other.startswith(dotted + "."):
                return place
    return str(path)


def _describe(key: KeyPath, problems: list[Any]) -> str:
    """What pydantic says of one key, in our words."""
    dotted = ".".join(key)
    kinds = {problem["type"] for problem in problems}
    if "extra_forbidden" in kinds:
        return f"unknown key {dotted}{_hint(key)}"
    if kinds == {"missing"}:
        return f"missing key {dotted}"
    if kinds == {"value_error"}:
        return f"{dotted}: {_rule(problems[0])}" if key else _rule(problems[0])
    expected = " or ".join(dict.fromkeys(_expected(problem) for problem in problems))
    return f"{dotted}: found {describe_value(problems[0]['input'])}; expected {expected}"


def _hint(key: KeyPath) -> str:
    """The new name of a renamed key, or the nearest name in its section or in the whole recipe."""
    dotted = ".".join(key)
    if dotted in RENAMED_KEYS:
        return f"; it is called {RENAMED_KEYS[dotted]} now"
    section: Any = Recipe
    for part in key[:-1]:
        field = section.model_fields.get(part)
        if field is not None:  # a name that the user has chosen otherwise, as in optim.groups
            section = _section_of(field)
    in_section = {name: ".".join([*key[:-1], name]) for name in section.model_fields}
    for known in (in_section, _all_names()):
        near = difflib.get_close_matches(key[-1], known, n=1)
        if near:
            return f"; did you mean {known[near[0]]}?"
    return f"; expected one of: {', '.join(in_section)}"


def _all_names() -> dict[str, str]:
    """Every name that somebody may try → the dotted key that has this meaning."""
    names = dict(SYNONYMS)
    for section_name, field in Recipe.model_fields.items():
        section = _section_of(field)
        if section is not None:
            names |= {name: f"{section_name}.{name}" for name in section.model_fields}
    return names


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds: alone, as one of several kinds, or by names; else None."""
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _expected(problem: Any) -> str:
    """What pydantic would have taken, as the end of "expected …"."""
    if problem["type"] == "model_type":
        return "a mapping"
    if problem["type"] == "string_pattern_mismatch":
        if problem["loc"] == ("name",):
            return (
                "letters, digits, '.', '_' and '-', beginning with a letter or digit (100 at most)"
            )
        return f"text like {problem['ctx']['pattern']} (no spaces, no quotes)"
    message: str = problem["msg"].removeprefix("Input should be ")
    kind = message.removeprefix("a valid ")
    if kind == message:
        return message
    article = "an" if kind[0] in "aeiou" else "a"
    return f"{article} {kind}"
