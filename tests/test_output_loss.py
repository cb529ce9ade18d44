"""The loss of an output layer without logits: the same loss, the same gradients, less memory."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from bigtrain.config.recipe import Recipe
from bigtrain.data.examples import PreparedData
from bigtrain.models.build import build_model, output_layer
from bigtrain.models.output_loss import IGNORED, OutputLoss
from bigtrain.tasks.language import CausalLM, Seq2Seq

ROOT = Path(__file__).parent.parent
VOCABULARY = 700
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1}


def network(bias: bool = False) -> nn.Sequential:
    """An embedding, a layer and an output layer that shares its weight with the embedding."""
    torch.manual_seed(0)
    embedding = nn.Embedding(VOCABULARY, 48)
    head = nn.Linear(48, VOCABULARY, bias=bias)
    nn.init.normal_(embedding.weight, std=0.3)
    head.weight = embedding.weight
    return nn.Sequential(embedding, nn.Linear(48, 48), head)


def token_batch() -> dict[str, Tensor]:
    """More rows than one part or one block of gradients has, and some that do not count."""
    torch.manual_seed(1)
    labels = torch.randint(VOCABULARY, (3, 301))
    labels[0, :100] = IGNORED
    return {"input_ids": torch.randint(VOCABULARY, (3, 301)), "labels": labels}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bf16", [False, True])
def test_loss_and_gradients_are_those_of_the_logits(
    bias: bool, smoothing: float, bf16: bool
) -> None:
    batch = token_batch()
    found = []
    for without_logits in (False, True):
        model = network(bias)
        run = partial(model, batch["input_ids"])
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if without_logits:
                loss = OutputLoss(model[2]).loss_sum(run, batch["labels"], smoothing)
            else:
                loss = F.cross_entropy(
                    run().float().flatten(0, 1),
                    batch["labels"].flatten(),
                    reduction="sum",
                    label_smoothing=smoothing,
                )
        assert loss.dtype == torch.float32
        (loss / 800).backward()
        found.append((float(loss.detach()), [parameter.grad for parameter in model.parameters()]))
    (expected_loss, expected), (loss_found, gradients) = found
    assert loss_found == pytest.approx(expected_loss, rel=1e-4 if bf16 else 1e-6)
    for gradient, plain in zip(gradients, expected, strict=True):
        assert gradient is not None and plain is not None
        assert float((gradient - plain).norm() / plain.norm()) < (2e-2 if bf16 else 1e-5)


def test_evaluation_gets_the_likeliest_tokens_and_no_gradients() -> None:
    model, batch = network(), token_batch()
    run = partial(model, batch["input_ids"])
    likeliest = torch.empty_like(batch["labels"])
    with torch.no_grad():
        OutputLoss(model[2]).loss_sum(run, batch["labels"], likeliest=likeliest)
        assert (likeliest == run().argmax(-1)).all()
    model[0].weight.requires_grad_(False)
    loss = OutputLoss(model[2]).loss_sum(run, batch["labels"])
    loss.backward()
    assert model[0].weight.grad is None
    assert model[1].weight.grad is not None


def test_what_is_not_finite_stays_so() -> None:
    """The loop leaves such a step out; a clean gradient would hide it."""
    model, batch = network(), token_batch()
    with torch.no_grad():
        model[1].bias[0] = torch.nan
    loss = OutputLoss(model[2]).loss_sum(partial(model, batch["input_ids"]), batch["labels"])
    loss.backward()
    assert loss.isnan()
    assert model[0].weight.grad is not None and model[0].weight.grad.isnan().any()


def prepared() -> PreparedData:
    return PreparedData([], [], 16, vocab_size=VOCABULARY, eval_bytes=1000)


CAUSAL: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 1, "n_head": 2},
    "llama": SMALL | {"intermediate_size": 64, "num_attention_heads": 2},
    "qwen3": SMALL
    | {
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}


@torch.no_grad()
@pytest.mark.parametrize("name", CAUSAL)
def test_models_of_transformers_can_do_without_logits(name: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **CAUSAL[name]))
    task, batch = CausalLM("causal_lm", prepared(), 0.1), token_batch()
    plain = task.loss_sum(model.eval(), batch)
    layer = output_layer(model)
    assert layer is not None
    assert task.use_output_layer(layer, model, batch)
    assert float(task.loss_sum(model, batch)) == pytest.approx(float(plain), rel=1e-6)
    assert model(input_ids=batch["input_ids"]).logits.shape == (3, 301, VOCABULARY)


@torch.no_grad()
def test_an_encoder_decoder_can_do_without_logits() -> None:
    config = AutoConfig.for_model(
        "t5", vocab_size=VOCABULARY, d_model=32, d_ff=64, num_layers=1, num_heads=2, d_kv=16
    )
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    batch = token_batch()
    batch["decoder_input_ids"] = batch["input_ids"]
    task = Seq2Seq("seq2seq", prepared())
    plain = task.loss_sum(model, batch)
    layer = output_layer(model)
    assert layer is not None
    assert task.use_output_layer(layer, model, batch)
    assert float(task.loss_sum(model, batch)) == pytest.approx(float(plain), rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("gemma2", {"head_dim": 16, "final_logit_softcapping": 30.0, "num_key_value_heads": 2}),
        ("cohere", {"logit_scale": 0.25, "num_key_value_heads": 2}),
    ],
)
def test_a_model_that_changes_its_logits_keeps_them(name: str, arguments: dict[str, Any]) -> None:
    """Softcapping and scaling would be applied to the loss instead."""
    config = AutoConfig.for_model(
        name, **SMALL, intermediate_size=64, num_attention_heads=2, **arguments
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    task, batch = CausalLM("causal_lm", prepared()), token_batch()
    plain = task.loss_sum(model, batch)
    layer = output_layer(model)
    assert layer is not None
    assert not task.use_output_layer(layer, model, batch)
    assert float(task.loss_sum(model, batch)) == pytest.approx(float(plain), rel=1e-6)


def test_memory_at_a_vocabulary_of_32k_is_an_eighth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    sys.modules.pop("output_loss", None)
    from output_loss import both_ways, peak_memory  # type: ignore[import-not-found]

    from_logits, without_logits = both_ways(32_768)
    assert peak_memory(without_logits) <= peak_memory(from_logits) / 8


def test_gelu_written_out_becomes_one_kernel(tmp_path: Path) -> None:
    """Weights that were trained with the other keep it."""
    recipe = {
        "name": "gelu",
        "task": "causal_lm",
        "model": {"name": "gpt2", "args": CAUSAL["gpt2"] | {"n_positions": 16}},
        "data": {"train": "none", "seq_len": 16},
        "train": {"steps": 1},
    }
    model = build_model(Recipe.model_validate(recipe), prepared())
    activation = model.transformer.h[0].mlp.act  # type: ignore[union-attr, index]
    assert isinstance(activation, nn.GELU) and activation.approximate == "tanh"
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    assert json.loads((tmp_path / "config.json").read_text())["activation_function"] == "gelu_new"
    recipe["model"] = {"name": "gpt2", "pretrained": str(tmp_path)}
    again = build_model(Recipe.model_validate(recipe), prepared())
    kept = again.transformer.h[0].mlp.act  # type: ignore[union-attr, index]
    assert type(kept).__name__ == "NewGELUActivation"
    ids = torch.arange(16)[None]
    found, expected = (m.eval()(input_ids=ids).logits for m in (model, again))
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
