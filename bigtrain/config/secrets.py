"""What looks like a secret: refused in a recipe, redacted in whatever is written."""

import os
import re
from collections.abc import Iterable

from bigtrain.errors import RecipeError

# Keys of W&B, Hugging Face, GitHub, OpenAI and the like, AWS, Google and Slack, by their forms.
_SECRET = re.compile(
    r"\b([0-9a-f]{40}|wandb_v\d_\w{20,}|hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16}|AIza[A-Za-z0-9_-]{30,}|xox[abprs]-[A-Za-z0-9-]{10,})\b"
)
# Of NAME=VALUE; a number of tokens is no secret.
_SECRET_SETTING = re.compile(
    r"(?i)[^=]*(api_?key|token(?!s=\d+$)|secret|password|passwd|credential)s?="
)


def redact(text: str) -> str:
    """A text without what has the form of a key, and without those of this environment."""
    for value in (
        value
        for name, value in os.environ.items()
        if len(value) >= 8 and _SECRET_SETTING.match(f"{name}={value}")
    ):
        text = text.replace(value, "[redacted]")
    return _SECRET.sub("[redacted]", text)


def refuse_secrets(texts: Iterable[tuple[str, str]]) -> None:
    """Raises RecipeError naming the place of a text that looks like a key, and never the text: what a recipe holds goes
    into files, logs and uploads. `texts`: (place, text)."""
    if places := [place for place, text in texts if redact(text) != text]:
        found = ", ".join(
            "a key of the recipe" if redact(place) != place else place for place in places
        )
        raise RecipeError(
            f"{found} looks like a secret",
            "keys only in the environment (WANDB_API_KEY, HF_TOKEN) or in ~/.netrc: recipes are kept, logged and uploaded",
            "take it out, and make a new key if this one was stored anywhere",
        )
