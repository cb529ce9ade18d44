"""Exported models with random weights, made in a moment, for tests of what uses them."""

from pathlib import Path
from typing import Any

from bigtrain.config.recipe import Recipe
from bigtrain.data.examples import PreparedData
from bigtrain.data.tokenizer import make_tokenizer, vocabulary_size
from bigtrain.models.build import build_model
from bigtrain.models.export import export_model

LLAMA = {
    "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
}


def export_of(folder: Path, task: str, model: str, args: dict[str, Any], **data: Any) -> Path:
    """A model that reads bytes, exported to `folder`."""
    tokenizer = make_tokenizer("bytes", [])
    recipe = Recipe.model_validate({
        "name": "exported", "task": task, "model": {"name": model, "args": args},
        "data": {"train": "none", "seq_len": 32, **data},
    })  # fmt: skip
    prepared = PreparedData(
        [], [], 32, seq_len=32, tokenizer=tokenizer, vocab_size=vocabulary_size(tokenizer),
        classes=["ham", "spam"] if task == "text_classification" else [],
    )  # fmt: skip
    # Larger weights than training starts with: what is written depends on the prompt.
    weights = {name: 4 * w for name, w in build_model(recipe, prepared).state_dict().items()}
    export_model(weights, recipe, prepared, folder, {"step": 1, "samples": 1})
    return folder
