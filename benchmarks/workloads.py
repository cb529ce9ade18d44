"""What `make bench` trains: three small models, the data that all arms read, and their weights.

`python benchmarks/workloads.py NAME FOLDER STEPS` writes FOLDER/NAME.pt for the other toolkits: the
starting weights and the batches that bigtrain has for the same recipe. So all arms train one model
on one order of samples, and the other toolkits do not even pay for reading it.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

SEED = 0
RATE = 1e-3  # of AdamW, constant; its other settings are torch's defaults
CLIP = 1.0  # largest gradient norm
CLASSES, IMAGES = 10, 640  # of the CNN's training set: ten steps
VOCABULARY = 8192


@dataclass(frozen=True)
class Workload:
    """A model, and the recipe that trains it in bigtrain."""

    title: str
    unit: str  # what a step's rate is counted in
    global_batch: int  # samples per step, over all ranks
    units_per_sample: int
    steps: int
    warm: int  # steps that are not counted: the first ones; of the CNN its first epoch
    recipe: str  # YAML without the sections that all workloads share
    gpu_model: str = ""  # transformers' model type, for the workloads of gpu.py
    gpu_arguments: dict[str, Any] = field(default_factory=dict)


TRANSFORMER_RECIPE = """
task: causal_lm
model:
  name: gpt2
  args: {n_layer: 6, n_embd: 256, n_head: 4, n_positions: 256}
  dropout: 0.0
data:
  train: python-stdlib
  eval: FOLDER/held-out.txt
  tokenizer: {train: bpe, vocab_size: 8192}
"""
LSTM_RECIPE = """
task: causal_lm
model: {name: rnn, args: {cell: lstm, embed: 256, hidden: 256, layers: 1}}
data:
  train: python-stdlib
  eval: FOLDER/held-out.txt
  tokenizer: {train: bpe, vocab_size: 8192}
"""
CNN_RECIPE = """
task: image_classification
model: {name: cnn, args: {channels: [64, 128, 256], depth: 2}}
data: {train: FOLDER/images, eval: FOLDER/images-held-out}
"""
SHARED_RECIPE = """
name: bench
seed: 0
optim: {lr: 1.0e-3}
engine: {global_batch: GLOBAL_BATCH}
track: {wandb: "off"}
"""

WORKLOADS = {
    "transformer": Workload(
        "Transformer (GPT-2, 6 × 256)", "tokens", 8, 256, 24, 6, TRANSFORMER_RECIPE
    ),
    "cnn": Workload("CNN (64-128-256, two convolutions each)", "images", 64, 1, 42, 12, CNN_RECIPE),
    "lstm": Workload("LSTM language model (256)", "tokens", 8, 256, 60, 12, LSTM_RECIPE),
}


ON_GPU = """
task: causal_lm
model: {name: MODEL, args: ARGUMENTS}
data:
  train: python-stdlib
  eval: FOLDER/held-out.txt
  seq_len: 1024
  tokenizer: {train: bpe, vocab_size: 8192}
"""
LLAMA_1B = {
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
    "vocab_size": 128_256,
    "tie_word_embeddings": True,
}
LLAMA_7B = {"max_position_embeddings": 1024, "vocab_size": 32_000}
GPT2 = {"vocab_size": 50_257, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def _on_gpu(title: str, model: str, arguments: dict[str, Any], global_batch: int) -> Workload:
    recipe = ON_GPU.replace("MODEL", model).replace("ARGUMENTS", json.dumps(arguments))
    return Workload(title, "tokens", global_batch, 1024, 60, 20, recipe, model, arguments)


WORKLOADS |= {
    "gpt2-124m": _on_gpu("GPT-2 124M", "gpt2", GPT2, 16),
    "llama-1b": _on_gpu("Llama 1B", "llama", LLAMA_1B, 8),
    "llama-7b": _on_gpu("Llama 7B", "llama", LLAMA_7B, 4),
}


def write_recipe(name: str, folder: Path) -> Path:
    """The recipe of a workload as FOLDER/NAME.yaml, and what it reads."""
    workload = WORKLOADS[name]
    held_out = folder / "held-out.txt"
    if name == "cnn":
        write_images(folder)
    elif not held_out.exists():
        held_out.write_text("def main() -> None:\n    print('not what is measured')\n" * 8)
    text = workload.recipe + SHARED_RECIPE.replace("GLOBAL_BATCH", str(workload.global_batch))
    path = folder / f"{name}.yaml"
    path.write_text(text.replace("FOLDER", str(folder.resolve())), encoding="utf-8")
    return path


def write_images(folder: Path) -> None:
    """Images of 3 × 32 × 32: noise around a colour that depends on the class."""
    draw = np.random.default_rng(SEED)
    colours = draw.integers(64, 192, (CLASSES, 3))
    for part, number in (("images", IMAGES), ("images-held-out", 2 * CLASSES)):
        if (folder / part).exists():
            continue
        for index in range(number):
            label = index % CLASSES
            noise = draw.normal(0, 60, (32, 32, 3))
            pixels = (colours[label] + noise).clip(0, 255).astype(np.uint8)
            path = folder / part / f"class-{label}" / f"{index:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


def write_batches(name: str, folder: Path, steps: int) -> None:
    """FOLDER/NAME.pt: `weights` by name, and `batches` [steps, global batch, …] by argument."""
    from bigtrain.config.loader import load_recipe
    from bigtrain.data.datasets import prepare
    from bigtrain.data.order import samples_at
    from bigtrain.models.build import build_model
    from bigtrain.tasks.registry import TASKS

    recipe = load_recipe(str(write_recipe(name, folder)), []).recipe
    prepared = prepare(recipe)
    task = TASKS[recipe.task](recipe.task, prepared)
    per_step = WORKLOADS[name].global_batch
    indices = samples_at(range(steps * per_step), len(prepared.train), SEED)
    samples = task.collate([prepared.train[index] for index in indices])
    batches = {key: value.view(steps, per_step, *value.shape[1:]) for key, value in samples.items()}
    weights = build_model(recipe, prepared).state_dict()
    torch.save({"weights": weights, "batches": batches}, folder / f"{name}.pt")


class WithLoss(nn.Module):
    """A model that takes labels and returns its mean loss, as those of transformers do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, labels: Tensor, input_ids: Tensor | None = None, pixel_values: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Labels [batch, …] and tokens or images → `loss`, a scalar in fp32."""
        # HF Trainer would hand a forward that takes any keyword arguments of its own.
        logits = self.model(pixel_values if input_ids is None else input_ids).float()
        loss = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
        return {"loss": loss}


class ChunkedLoss(nn.Module):
    """A language model whose loss is computed from its last hidden states, 512 tokens at a time."""

    def __init__(self, model: Any, states: Callable[[Tensor], Tensor], head: nn.Linear) -> None:
        super().__init__()
        self.model = model
        self.states = states
        self.head = head

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Tensor) -> dict[str, Tensor]:
        """Tokens and labels [batch, length] → `loss`, a scalar in fp32."""
        hidden = self.states(input_ids).flatten(0, 1)
        dtype = torch.float32
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.bfloat16
        options = nn.LinearCrossEntropyOptions(
            acc_policy="balanced", chunking_method=None, batch_chunk_size=512
        )
        bias = self.head.bias
        with torch.autocast("cpu", enabled=False):
            loss = nn.functional.linear_cross_entropy(
                hidden.to(dtype),
                self.head.weight.to(dtype),
                labels.flatten(),
                linear_bias=None if bias is None else bias.to(dtype),
                options=options,
            )
        return {"loss": loss.float()}


def without_logits(name: str, model: Any) -> nn.Module:
    """A workload's plain model with a loss that needs no logits, where it is a language model."""
    if WORKLOADS[name].gpu_model == "llama":
        return ChunkedLoss(model, lambda ids: model.model(ids)[0], model.lm_head)
    if name == "transformer" or WORKLOADS[name].gpu_model:
        return ChunkedLoss(model, lambda ids: model.transformer(ids)[0], model.lm_head)
    if name == "lstm":
        rnn = model.model
        return ChunkedLoss(model, lambda ids: rnn.rnn(rnn.embedding(ids))[0], rnn.head)
    return model


def build_plain(name: str, weights: dict[str, Tensor], tanh_gelu: bool) -> nn.Module:
    """The workload's model as a user of another toolkit has it; returns a mapping with `loss`.

    `tanh_gelu`: the Transformer's activation as torch's own operation, not as transformers' eight.
    It is the same function. The CNN's activation is another function, so it stays.
    """
    model: Any
    if WORKLOADS[name].gpu_model:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(WORKLOADS[name].gpu_model, **WORKLOADS[name].gpu_arguments)
        config.use_cache = False
        if tanh_gelu and name == "gpt2-124m":
            config.activation_function = "gelu_pytorch_tanh"
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(weights)
        return model
    if name == "transformer":
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(n_layer=6, n_embd=256, n_head=4, n_positions=256)
        config.vocab_size = VOCABULARY
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        config.use_cache = False
        config.activation_function = "gelu_pytorch_tanh" if tanh_gelu else "gelu_new"
        model = GPT2LMHeadModel(config)
        model.load_state_dict(weights)
        return model
    if name == "cnn":
        from bigtrain.models.cnn import CNN

        model = CNN(3, CLASSES, channels=(64, 128, 256), depth=2)
    else:
        from bigtrain.models.rnn import RNN

        model = RNN(VOCABULARY, VOCABULARY, per_position=True, embed=256, hidden=256)
    model.load_state_dict(weights)
    return WithLoss(model)


if __name__ == "__main__":
    write_batches(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
