"""What looks like a secret: refused in a recipe, redacted in whatever is written."""

import os
import re
from collections.abc import Iterable

from bigtrain.errors import RecipeError

# Keys of W&B, Hugging Face, GitHub, OpenAI and the like, AWS, Google and Slack, by their forms.
_FORMS = (
    r"[0-9a-f]{40}",
    r"wandb_v\d_\w{20,}",
    r"hf_[A-Za-z0-9]{20,}",
    r"gh[pousr]_[A-Za-z0-9]{20,}",
    r"github_pat_\w{20,}",
    r"sk-[A-Za-z0-9_-]{20,}",
    r"AKIA[0-9A-Z]{16}",
    r"AIza[A-Za-z0-9_-]{30,}",
    r"xox[abprs]-[A-Za-z0-9-]{10,}",
)
_SECRET = re.compile(rf"\b({'|'.join(_FORMS)})\b")
# A NAME=VALUE whose name promises a secret; but a number of tokens is none.
_SECRET_SETTING = re.compile(
    r"(?i)[^=]*(api_?key|token(?!s=\d+$)|secret|password|passwd|credential)s?="
)
_SHORTEST_SECRET = 8  # characters; shorter values of the environment occur in any text


def redact(text: str) -> str:
    """A text without what has the form of a key, and without the secrets of this environment."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST_SECRET and _SECRET_SETTING.match(f"{name}={value}"):
            text = text.replace(value, "[redacted]")
    return _SECRET.sub("[redacted]", text)


def refuse_secrets(texts: Iterable[tuple[str, str]]) -> None:
    """Refuse what looks like a key, because recipes go into files, logs and uploads.

    `texts` are pairs of a place and the text there. Raises RecipeError that names the places, and
    never the texts.
    """
    places = [place for place, text in texts if redact(text) != text]
    if not places:
        return
    shown = [place if redact(place) == place else "a key of the recipe" for place in places]
    raise RecipeError(
        f"{', '.join(shown)} looks like a secret",
        "keys only in the environment (WANDB_API_KEY, HF_TOKEN) or in ~/.netrc: recipes are kept,"
        " logged and uploaded",
        "take it out, and make a new key if this one was stored anywhere",
    )
