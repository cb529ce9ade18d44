"""README and docs: every link leads somewhere, every key and command is real and mentioned."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bigtrain.cli import app
from bigtrain.config.recipe import Recipe

ROOT = Path(__file__).parent.parent
TOP_PAGES = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
PAGES = [ROOT / name for name in TOP_PAGES] + sorted((ROOT / "docs").glob("*.md"))
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
SECTIONS = "(?:seed|task|model|data|optim|engine|train|track|slurm)"
# `section.key`, `section.key: value`, and section.key=value on a command line
KEY = re.compile(rf"(?<=`){SECTIONS}\.[a-z0-9_.]+(?=[`:])|(?<![\w./]){SECTIONS}\.[a-z0-9_.]+(?==)")
NO_KEYS = ("model.safetensors", "model.onnx", "optim.groups_in_force")  # files, and a fact
FREE_KEYS = ("model.args.", "data.columns.")  # below them a user names what he likes


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text_of(page: Path) -> str:
    """A page without its fenced blocks, in which nothing is a link or a heading."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


@cache
def anchors(page: Path) -> set[str]:
    """The names that a forge gives to a page's headings."""
    names = set()
    for heading in re.findall(r"^#+ +(.*)$", text_of(page), flags=re.M):
        plain = re.sub(r"[^\w\- ]", "", heading.lower())
        names.add(plain.replace(" ", "-"))
    return names


@cache
def recipe_keys() -> set[str]:
    """Every key of the recipe's schema by its full name, sections included."""
    schema = Recipe.model_json_schema()
    names: set[str] = set()

    def add(properties: dict[str, Any], prefix: str) -> None:
        for name, field in properties.items():
            names.add(prefix + name)
            for choice in [field, *field.get("anyOf", [])]:
                if "$ref" in choice:
                    section = schema["$defs"][choice["$ref"].rpartition("/")[2]]
                    add(section["properties"], f"{prefix}{name}.")

    add(schema["properties"], "")
    return names


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(text_of(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{name_of(page)}: {link}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=name_of)
def test_the_site_needs_nothing_outside_of_docs(page: Path) -> None:
    outside = [link for link in LINK.findall(text_of(page)) if link.startswith("..")]
    assert not outside, f"{name_of(page)}: {outside}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_recipe_key_that_is_named_exists(page: Path) -> None:
    if page.name == "CHANGELOG.md":  # it names the old ones too
        return
    for found in KEY.findall(page.read_text(encoding="utf-8")):
        if found not in NO_KEYS and not found.startswith(FREE_KEYS):
            assert found in recipe_keys(), f"{name_of(page)}: {found}"


def test_the_reference_of_keys_is_the_schema() -> None:
    command = [sys.executable, str(ROOT / "tools" / "recipe_reference.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_key_is_in_the_reference_with_a_meaning() -> None:
    text = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    described = set(re.findall(r"^\| `([a-z0-9_.]+)` \|.*\| \S.* \|$", text, flags=re.M))
    sections = {key for key in recipe_keys() if f"{key}." in " ".join(recipe_keys())}
    assert recipe_keys() - sections <= described


def test_every_command_is_mentioned() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for command in app.registered_commands:
        name = command.name or str(getattr(command.callback, "__name__", ""))
        assert f"bigtrain {name}" in text, f"bigtrain {name} is not in the documentation"


def test_the_readme_is_short_and_its_pictures_are_small() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.stat().st_size <= 200_000, picture.name


def test_pictures_load_nothing_from_the_network() -> None:
    for picture in (ROOT / "docs" / "images").glob("*.svg"):
        text = picture.read_text(encoding="utf-8").replace("http://www.w3.org/", "")
        assert "http" not in re.sub(r"<!--.*?-->", "", text, flags=re.S), picture.name
