"""The README's table of keys is the recipe's own description: `python tests/test_readme.py` writes it anew."""

import json
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from bigtrain.config.recipe import Recipe

README = Path(__file__).parent.parent / "README.md"


def rows(model: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str]]:
    found = []
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += rows(kind, f"{prefix}{name}.")
        else:
            default = (
                "required"
                if field.default is PydanticUndefined
                else f"`{json.dumps(field.default)}`"
            )
            found.append((f"`{prefix}{name}`", default, field.description or ""))
    return found


def table() -> str:
    lines = ["| key | default | meaning |", "|---|---|---|"]
    return "\n".join(
        lines + [f"| {key} | {default} | {text} |" for key, default, text in rows(Recipe)]
    )


def test_the_readme_lists_every_key() -> None:
    assert table() in README.read_text(), "run: python tests/test_readme.py"
    assert all(text for *_, text in rows(Recipe)), "a key without a meaning"


if __name__ == "__main__":
    text = README.read_text()
    text = re.sub(
        r"(?s)(<!-- keys -->|\| key \| default.*?\n(?=\n))", lambda _: table() + "\n", text, count=1
    )
    README.write_text(text)
