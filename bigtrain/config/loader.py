"""From a recipe's name or path and dotted overrides to a frozen Recipe, knowing where each value came from.

YAML 1.2 by ruamel: `1e-4` is a number and `no` is a string. Everything wrong with a recipe is reported at once.
"""

import difflib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from bigtrain.config.recipe import Recipe
from bigtrain.config.secrets import refuse_secrets
from bigtrain.errors import RecipeError

Where = dict[str, str]  # dotted key → "file:line" or "override …"
# What others call things, so that a newcomer's first guess finds ours.
_ELSEWHERE = """
    learning_rate optim.lr, optimizer optim.name, lr_scheduler_type optim.schedule, max_grad_norm optim.clip_norm,
    gradient_clipping optim.clip_norm, batch_size engine.global_batch, train_batch_size engine.global_batch,
    gradient_accumulation_steps engine.micro_batch, zero_stage engine.kind, mixed_precision engine.precision,
    gradient_checkpointing engine.activation_checkpointing, max_steps train.steps, epochs train.steps,
    save_steps train.checkpoint_every, eval_steps train.eval_every, max_length data.seq_len"""
SYNONYMS = {pair.split()[0]: pair.split()[1] for pair in _ELSEWHERE.split(",")}
RECIPES = Path(__file__).parent.parent / "recipes"


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and, for every leaf of it, who set it."""

    recipe: Recipe
    origins: dict[str, str]


def shipped_recipes() -> dict[str, Path]:
    """Name → file of every recipe that comes with bigtrain."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def recipe_path(ref: str) -> Path:
    """The file that `ref` (a path or a shipped recipe's name) stands for."""
    path = Path(ref)
    if path.is_file():
        return path
    if ref in shipped_recipes():
        return shipped_recipes()[ref]
    near = difflib.get_close_matches(ref, shipped_recipes(), n=1)
    raise RecipeError(
        f"no recipe {ref!r}: neither a file nor a shipped recipe",
        f"a YAML file, or one of: {', '.join(shipped_recipes())}",
        f"bigtrain train {near[0]}" if near else "bigtrain recipes",
    )


def load_recipe(ref: str, overrides: list[str] | None = None) -> LoadedRecipe:
    """Read, override and check a recipe.

    Raises RecipeError naming every unknown key, wrong type and duplicate, each with its file:line.
    """
    refuse_secrets(
        [
            ("the recipe's path", ref),
            *((f"override {each.partition('=')[0]!r}", each) for each in overrides or []),
        ]
    )
    path = recipe_path(ref)
    raw, where, errors = _read(path)
    refuse_secrets((f"key {key}", f"{key} {value}") for key, value in flatten(raw).items())
    for text in overrides or []:
        errors += _override(raw, where, text)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as problem:
        errors += list(_explain(problem, raw, where, path))
    if errors:
        many = f"{len(errors)} error{'s' * (len(errors) > 1)}"
        raise RecipeError("\n  ".join([f"{path}: {many}", *errors]))
    said = {key: at if at.startswith("override ") else f"recipe {at}" for key, at in where.items()}
    return LoadedRecipe(
        recipe, {key: said.get(key, "default") for key in flatten(recipe.model_dump())}
    )


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys; an empty dictionary is a leaf."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    above = f"{prefix}." if prefix else ""
    return {
        leaf: each
        for key, inner in value.items()
        for leaf, each in flatten(inner, f"{above}{key}").items()
    }


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML that loads back to the same recipe."""
    return dump(recipe.model_dump(mode="json"))


def dump(value: Any) -> str:
    """A value as YAML, keys in their order."""
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(value, stream)
    return stream.getvalue()


def _read(path: Path) -> tuple[dict[str, Any], Where, list[str]]:
    """The file's mapping, the line of each dotted key, and what is wrong with its form."""
    try:
        text = path.read_text(encoding="utf-8")
        yaml = YAML(typ="safe", pure=True)
        yaml.allow_duplicate_keys = True  # _walk reports them, all of them and with both lines
        node = yaml.compose(text)
        keys = list(_walk(node))  # before the mapping is made, which empties the nodes
        raw = yaml.constructor.construct_document(node) if node is not None else None
    except UnicodeDecodeError as problem:
        raise RecipeError(
            f"{path}: not UTF-8 text ({problem.reason} at byte {problem.start})", "a YAML file"
        ) from None
    except OSError as problem:
        raise RecipeError(f"{path}: cannot be read ({problem.strerror})", "a YAML file") from None
    except MarkedYAMLError as problem:
        line = problem.problem_mark.line + 1 if problem.problem_mark else 1
        raise RecipeError(
            f"{path}:{line}: not valid YAML: {problem.problem or problem.context}"
        ) from None
    except (YAMLError, ValueError, RecursionError) as problem:
        raise RecipeError(f"{path}: not valid YAML: {str(problem).splitlines()[0]}") from None
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{path}: found {_kind(raw)}",
            "a mapping with name, task, model, data, …",
            "bigtrain init NAME",
        )
    where = {
        key: f"{path}:{line}" for key, line, _ in reversed(keys)
    }  # the first place of a key that is there twice
    twice = [(key, line, first) for key, line, first in keys if first is not None]
    return (
        raw,
        where,
        [
            f"{path}:{line}: duplicate key {key} (first on line {first})"
            for key, line, first in twice
        ],
    )


def _walk(node: Node, prefix: str = "") -> Iterator[tuple[str, int, int | None]]:
    """Each key below `node` as (dotted key, line, line of an earlier duplicate)."""
    if isinstance(node, SequenceNode):
        for item in node.value:
            yield from _walk(item, prefix + "[]")
    if not isinstance(node, MappingNode):
        return
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        name = str(key_node.value) if isinstance(key_node, ScalarNode) else "?"
        key, line = (f"{prefix}.{name}" if prefix else name), key_node.start_mark.line + 1
        yield key, line, seen.get(name)
        seen.setdefault(name, line)
        yield from _walk(value_node, key)


def _override(raw: dict[str, Any], where: Where, text: str) -> list[str]:
    """Apply one `key=value` to `raw`; returns what is wrong with it."""
    key, equals, value = text.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        return [f"override {text!r}: expected key=value, for example optim.lr=3e-4"]
    try:
        parsed = YAML(typ="safe", pure=True).load(value)  # typed as in a file
        leaves = flatten(parsed, key)
    except (YAMLError, ValueError, RecursionError):
        return [f"override {text!r}: the value is not valid YAML"]
    target = raw
    for depth, part in enumerate(parts[:-1]):
        inner = target.get(part)
        if inner is None or (
            isinstance(inner, str) and parts[: depth + 1] == ["data", "tokenizer"]
        ):
            inner = target[part] = {}
        if not isinstance(inner, dict):
            return [
                f"override {text!r}: {'.'.join(parts[: depth + 1])} is {_kind(inner)}, not a section"
            ]
        target = inner
    target[parts[-1]] = parsed
    for stale in [known for known in where if known.startswith(key + ".")]:
        del where[stale]
    where |= dict.fromkeys((key, *leaves), f"override {text}")
    return []


def _explain(
    problem: ValidationError, raw: dict[str, Any], where: Where, path: Path
) -> Iterator[str]:
    """One line per place that is wrong: where, what was found, what was expected, the nearest valid name."""
    places: dict[tuple[str, ...], list[Any]] = {}
    for error in problem.errors(include_url=False):
        places.setdefault(_place(error["loc"], raw), []).append(error)
    for loc, errors in places.items():
        key = ".".join(loc)
        at = next(
            (
                where[".".join(loc[:n])]
                for n in range(len(loc), 0, -1)
                if ".".join(loc[:n]) in where
            ),
            str(path),
        )
        kinds = {error["type"] for error in errors}
        if kinds == {"extra_forbidden"} or (
            kinds >= {"extra_forbidden"} and loc[:2] == ("data", "tokenizer")
        ):
            yield f"{at}: unknown key {key}{_nearest(loc)}"
        elif kinds == {"missing"}:
            yield f"{at}: missing key {key}"
        elif kinds == {"value_error"}:
            yield f"{at}: {key or 'recipe'}: {errors[0]['msg'].removeprefix('Value error, ')}"
        else:
            expected = " or ".join(dict.fromkeys(_expected(error) for error in errors))
            yield f"{at}: {key}: found {_kind(errors[0]['input'])}; expected {expected}"


def _place(loc: tuple[int | str, ...], raw: Any) -> tuple[str, ...]:
    """Pydantic's location without the tags it adds for members of a union."""
    place: list[str] = []
    value = raw
    for position, part in enumerate(loc):
        tag = isinstance(part, str) and (
            "[" in part or part in ("str", "int", "bool", "TokenizerConfig")
        )
        if isinstance(value, dict) and (part in value or (position == len(loc) - 1 and not tag)):
            place.append(str(part))
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            place.append(str(part))
            value = value[part] if part < len(value) else None
    return tuple(place)


def _nearest(loc: tuple[str, ...]) -> str:
    """`; did you mean …` among the keys of the section, or of the whole recipe, else the section's keys."""
    section: Any = Recipe
    for part in loc[:-1]:
        section = _section(section.model_fields[part])
    here = {name: ".".join([*loc[:-1], name]) for name in section.model_fields}
    sections = {key: _section(field) for key, field in Recipe.model_fields.items()}
    everywhere = SYNONYMS | {
        name: f"{key}.{name}"
        for key, each in sections.items()
        if each
        for name in each.model_fields
    }
    for known in (here, everywhere):
        if near := difflib.get_close_matches(loc[-1], known, n=1):
            return f"; did you mean {known[near[0]]}?"
    return f"; expected one of: {', '.join(here)}"


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, by itself or as one of several; None for a plain value."""
    options = [field.annotation, *get_args(field.annotation)]
    return next(
        (each for each in options if isinstance(each, type) and issubclass(each, BaseModel)), None
    )


def _expected(error: Any) -> str:
    if error["type"] == "string_pattern_mismatch":
        if error["loc"] == ("name",):
            return (
                "letters, digits, '.', '_' and '-', beginning with a letter or digit (100 at most)"
            )
        return f"text like {error['ctx']['pattern']} (no spaces, no quotes)"
    if error["type"] == "model_type":
        return "a mapping"
    message: str = error["msg"].removeprefix("Input should be ")
    kind = message.removeprefix("a valid ")
    return message if kind == message else f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _kind(value: Any) -> str:
    """A value as an error shows it: itself and its type."""
    names = {
        str: "text",
        bool: "true/false",
        int: "a whole number",
        float: "a number",
        dict: "a mapping",
        list: "a list",
    }
    if value is None:
        return "nothing (null)"
    shown = repr(value) if len(repr(value)) < 60 else repr(value)[:57] + "…"
    return f"{shown} ({names.get(type(value), type(value).__name__)})"
