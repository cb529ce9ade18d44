"""From a recipe's name or path and overrides to a frozen Recipe, with the origin of each value.

YAML 1.2 by ruamel: `1e-4` is a number and `no` is a string. All that is wrong with a recipe is
reported at once.
"""

import difflib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from bigtrain.config.recipe import Recipe
from bigtrain.config.recipe_errors import describe_value, explain
from bigtrain.config.renamed_keys import RENAMED_KEYS
from bigtrain.config.secrets import refuse_secrets
from bigtrain.errors import RecipeError, RequestError

RECIPES = Path(__file__).parent.parent / "recipes"
# Keys that hold either text or a section: an override of a key inside replaces the text.
_TEXT_OR_SECTION = ("data.tokenizer", "data.train", "data.eval")


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and who set each of its values."""

    recipe: Recipe
    # Dotted key → "recipe FILE:LINE", "override KEY=VALUE" or "default".
    origins: dict[str, str]


@dataclass
class _Draft:
    """A recipe before it is checked."""

    path: Path
    values: dict[str, Any]
    places: dict[str, str]  # dotted key → "file:line" or "override key=value"
    problems: list[str]


class _KeyLine(NamedTuple):
    """A key of a YAML file, dotted, and its line."""

    key: str
    line: int
    first_line: int | None  # of the same key, if this is a duplicate


def shipped_recipes() -> dict[str, Path]:
    """Name → file of every recipe that comes with bigtrain."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def recipe_path(ref: str) -> Path:
    """The file of `ref`, a path or a shipped recipe's name. Raises RecipeError if there is none."""
    path = Path(ref)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if ref in shipped:
        return shipped[ref]
    near = difflib.get_close_matches(ref, shipped, n=1)
    raise RecipeError(
        f"no recipe {ref!r}: neither a file nor a shipped recipe",
        f"a YAML file, or one of: {', '.join(shipped)}",
        f"bigtrain train {near[0]}" if near else "bigtrain recipes",
    )


def load_recipe(ref: str | Path, overrides: list[str] | None = None) -> LoadedRecipe:
    """Read, override and check a recipe.

    `ref` is a YAML file or a shipped recipe's name; `overrides` are "key=value" with dotted keys,
    typed as YAML types them. Old keys in a run's own recipe.yaml are translated.

    Raises RecipeError that names every unknown key, wrong type and duplicate with its file:line,
    and RequestError for overrides that are no list.
    """
    overrides = overrides or []
    if isinstance(overrides, str | dict):
        raise RequestError(
            f"overrides are {describe_value(overrides)}", "a list of key=value", '["optim.lr=1e-3"]'
        )
    named = [(f"override {text.partition('=')[0]!r}", text) for text in overrides]
    refuse_secrets([("the recipe's path", str(ref)), *named])
    draft = _read(recipe_path(str(ref)))
    refuse_secrets((f"key {key}", f"{key} {value}") for key, value in flatten(draft.values).items())
    if _belongs_to_run(draft.path):
        _translate_old_keys(draft)
    for text in overrides:
        _apply_override(draft, text)
    return _check(draft)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys; an empty dictionary is a leaf."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for key, inner in value.items():
        leaves |= flatten(inner, f"{prefix}.{key}" if prefix else f"{key}")
    return leaves


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


def _read(path: Path) -> _Draft:
    """The file's values, the line of each key, and what is wrong with its form."""
    try:
        yaml = YAML(typ="safe", pure=True)
        yaml.allow_duplicate_keys = True  # they are reported below, all of them with both lines
        node = yaml.compose(path.read_text(encoding="utf-8"))
        keys = list(_walk(node))  # first, because making the mapping empties the nodes
        values = yaml.constructor.construct_document(node) if node is not None else None
    except UnicodeDecodeError as problem:
        reason = f"{problem.reason} at byte {problem.start}"
        raise RecipeError(f"{path}: not UTF-8 text ({reason})", "a YAML file") from None
    except OSError as problem:
        raise RecipeError(f"{path}: cannot be read ({problem.strerror})", "a YAML file") from None
    except MarkedYAMLError as problem:
        line = problem.problem_mark.line + 1 if problem.problem_mark else 1
        reason = problem.problem or problem.context
        raise RecipeError(f"{path}:{line}: not valid YAML: {reason}") from None
    except (YAMLError, ValueError, RecursionError) as problem:
        raise RecipeError(f"{path}: not valid YAML: {str(problem).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise RecipeError(
            f"{path}: found {describe_value(values)}",
            "a mapping with name, task, model, data, …",
            "bigtrain init NAME",
        )
    draft = _Draft(path, values, places={}, problems=[])
    for key, line, first_line in keys:
        draft.places.setdefault(key, f"{path}:{line}")
        if first_line is not None:
            draft.problems.append(
                f"{path}:{line}: duplicate key {key} (first on line {first_line})"
            )
    return draft


def _walk(node: Node, prefix: str = "") -> Iterator[_KeyLine]:
    """Every key below `node`, in the order of the file."""
    if isinstance(node, SequenceNode):
        for item in node.value:
            yield from _walk(item, prefix + "[]")
    if not isinstance(node, MappingNode):
        return
    first_lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        name = str(key_node.value) if isinstance(key_node, ScalarNode) else "?"
        key = f"{prefix}.{name}" if prefix else name
        line = key_node.start_mark.line + 1
        yield _KeyLine(key, line, first_lines.get(name))
        first_lines.setdefault(name, line)
        yield from _walk(value_node, key)


def _belongs_to_run(path: Path) -> bool:
    """Whether the file is a run's own recipe.yaml, which bigtrain wrote beside effective.json."""
    return path.name == "recipe.yaml" and (path.parent / "effective.json").is_file()


def _translate_old_keys(draft: _Draft) -> None:
    """Give keys that earlier versions wrote their present names."""
    for old, new in RENAMED_KEYS.items():
        section_name, _, old_name = old.partition(".")
        new_name = new.partition(".")[2]
        section = draft.values.get(section_name)
        if isinstance(section, dict) and old_name in section and new_name not in section:
            section[new_name] = section.pop(old_name)
            draft.places[new] = draft.places.pop(old, str(draft.path))


def _apply_override(draft: _Draft, text: str) -> None:
    """Set what one `key=value` says, or note what is wrong with it."""
    key, equals, value_text = text.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        draft.problems.append(f"override {text!r}: expected key=value, for example optim.lr=3e-4")
        return
    try:
        value = YAML(typ="safe", pure=True).load(value_text)  # typed as in a file
        leaves = flatten(value, key)
    except (YAMLError, ValueError, RecursionError):
        draft.problems.append(f"override {text!r}: the value is not valid YAML")
        return
    section = draft.values
    for depth, part in enumerate(parts[:-1], 1):
        inner = section.get(part)
        above = ".".join(parts[:depth])
        if inner is None or (isinstance(inner, str) and above in _TEXT_OR_SECTION):
            inner = section[part] = {}
        if not isinstance(inner, dict):
            draft.problems.append(
                f"override {text!r}: {above} is {describe_value(inner)}, not a section"
            )
            return
        section = inner
    section[parts[-1]] = value
    for known in list(draft.places):
        if known.startswith(key + "."):  # replaced with the section around it
            del draft.places[known]
    draft.places |= dict.fromkeys((key, *leaves), f"override {text}")


def _check(draft: _Draft) -> LoadedRecipe:
    """The frozen recipe with its origins. Raises RecipeError with all problems."""
    problems = list(draft.problems)
    try:
        recipe = Recipe.model_validate(draft.values)
    except ValidationError as error:
        problems += explain(error, draft.values, draft.places, draft.path)
    if problems:
        count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
        only_overrides = all(problem.startswith("override ") for problem in problems)
        blamed = "overrides" if only_overrides else draft.path
        raise RecipeError("\n  ".join([f"{blamed}: {count}", *problems]))
    return LoadedRecipe(
        recipe, {key: _origin(draft.places.get(key)) for key in flatten(recipe.model_dump())}
    )


def _origin(place: str | None) -> str:
    """Who set a value, as effective.json has it."""
    if place is None:
        return "default"
    return place if place.startswith("override ") else f"recipe {place}"
