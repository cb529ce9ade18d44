"""Repeated layers: which they are, what their activations cost, and what must not move twice."""

import copy
import weakref
from collections import Counter
from functools import partialmethod
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import bigtrain
from distributed_cases import Stack
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from bigtrain.engine.plan import Plan
from bigtrain.engine.repeated_layers import checkpoint_layers, compile_layers, repeated_layers
from bigtrain.engine.runtime import apply_compute_options
from bigtrain.models.cnn import CNN
from bigtrain.models.rnn import RNN

SMALL: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
SMALL["vocab_size"] = 61


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=3, n_embd=32, n_head=2, vocab_size=61, n_positions=64, use_cache=False
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(num_hidden_layers=2, num_key_value_heads=1, **SMALL)
    return transformers.LlamaForCausalLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        num_layers=2, num_decoder_layers=3, d_model=16, d_kv=8, d_ff=32, num_heads=2, vocab_size=61
    )
    return transformers.T5ForConditionalGeneration(config)


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(num_hidden_layers=2, **SMALL))


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic"
    )
    return transformers.ResNetForImageClassification(config)


class Lists(nn.Module):
    """A user's model: layers that differ in width, in a list, beside a head that is no layer."""

    def __init__(self) -> None:
        super().__init__()
        widths = [8, 16, 32]
        blocks = []
        for before, after in pairwise(widths):
            blocks.append(nn.Sequential(nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()))
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, features: Tensor) -> Tensor:
        """[batch, 8] → [batch, 2]."""
        for block in self.blocks:
            features = block(features)
        return self.head(features)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (gpt2, {"GPT2Block": 3}),
        (llama, {"LlamaDecoderLayer": 2}),
        (t5, {"T5Block": 5}),
        (bert, {"BertLayer": 2}),
        (resnet, {"ResNetBasicLayer": 4}),
        (lambda: Stack(61), {"Block": 3}),
        (Lists, {"Sequential": 2}),
        (lambda: CNN(1, 10, depth=3), {}),
        (lambda: RNN(61, vocab_size=61, layers=3), {}),
    ],
    ids=["gpt2", "llama", "t5", "bert", "resnet", "stack", "lists", "cnn", "rnn"],
)
def test_the_layers_of_every_sort_of_model(make: Any, expected: dict[str, int]) -> None:
    with torch.device("meta"):
        layers = repeated_layers(make())
    assert Counter(type(layer).__name__ for layer in layers) == expected


class KeptBytes(TorchDispatchMode):
    """Counts the memory of tensors that were made within it and are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = torch.multiprocessing.reductions.StorageWeakRef(storage)
                self.storages[storage._cdata] = (reference, storage.nbytes())
        return made

    def total(self) -> int:
        """Bytes of them all."""
        return sum(size for kept, size in self.storages.values() if not kept.expired())


def kept_bytes(model: nn.Module, which: Any, *inputs: Tensor) -> int:
    """Bytes between a forward pass and its backward pass, beyond parameters and inputs."""
    if which != "none":
        checkpoint_layers(model, which)
    model.train()
    with KeptBytes() as kept:
        outputs = model(*inputs)
    loss = getattr(outputs, "logits", outputs).float().sum()
    del outputs
    bytes_kept = kept.total()
    loss.backward()
    return bytes_kept


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (gpt2, torch.zeros(4, 64, dtype=torch.long)),
        (lambda: Stack(61), torch.zeros(4, 64, dtype=torch.long)),
        (resnet, torch.rand(4, 3, 64, 64)),
        (lambda: CNN(1, 10, depth=3), torch.rand(4, 1, 32, 32)),
    ],
    ids=["gpt2", "stack", "resnet", "cnn"],
)
def test_less_memory_is_kept_the_more_is_computed_again(make: Any, inputs: Tensor) -> None:
    kept = {which: kept_bytes(make(), which, inputs) for which in ("none", 2, "selective", "full")}
    print({which: f"{size / 2**20:.2f} MiB" for which, size in kept.items()})
    assert kept["none"] > kept["selective"] > kept["full"]
    assert kept["none"] > kept[2] > kept["full"]


def trained(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """The outputs of a training pass, all gradients and all buffers, by name."""
    model.train()
    torch.manual_seed(1)
    outputs = model(*inputs)
    outputs = getattr(outputs, "logits", outputs)
    outputs.square().sum().backward()
    found = {"outputs": outputs.detach(), **dict(model.named_buffers())}
    return found | {f"gradient of {name}": p.grad for name, p in model.named_parameters()}


def cnn() -> nn.Module:
    return CNN(3, 10, depth=2, dropout=0.2)


AGAIN = [
    *product([Lists, resnet, cnn], ["full", 2, "selective"], [False]),
    (Lists, "full", True),
    (Lists, "selective", True),
    (cnn, "selective", True),
]


@pytest.mark.parametrize(("make", "which", "is_compiled"), AGAIN)
def test_what_is_computed_again_changes_nothing(
    make: Any, which: Any, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_compiled:
        # The same graphs as by default, without a minute of C++.
        eager = partialmethod(nn.Module.compile, backend="aot_eager")
        monkeypatch.setattr(nn.Module, "compile", eager)
    torch.manual_seed(0)
    plain = make()
    other = copy.deepcopy(plain)
    inputs = torch.rand(4, 8) if make is Lists else torch.rand(4, 3, 32, 32)
    expected = trained(plain, inputs)
    plan = Plan("ddp", "none", "fp32", 1, 4, 4, which, is_compiled)
    apply_compute_options(other, plan)
    assert list(other.state_dict()) == list(plain.state_dict())
    found = trained(other, inputs)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(inputs), plain.eval()(inputs))


def test_every_layer_but_the_first_uses_its_code_and_dropout_draws_the_same() -> None:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    plain = Stack(61, width=8)
    compiled = copy.deepcopy(plain)
    tokens = torch.arange(32).view(2, 16)
    expected = trained(plain, tokens)
    compile_layers(compiled)  # by torch's own compiler: about ten seconds of C++
    assert compiled._compiled_call_impl is None
    assert all(block._compiled_call_impl for block in compiled.blocks)
    found = trained(compiled, tokens)
    assert counters["stats"]["unique_graphs"] == 1
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_a_model_without_repeated_layers_is_compiled_whole() -> None:
    model = RNN(61, vocab_size=61)
    compile_layers(model)
    assert model._compiled_call_impl is not None
    assert not any(child._compiled_call_impl for child in model.children())


def test_no_layer_keeps_keys_and_values_for_generation() -> None:
    model: Any = t5()
    apply_compute_options(model, Plan("ddp", "none", "fp32", 1, 4, 4, "full", False))
    assert not model.config.use_cache and not model.decoder.config.use_cache


def test_a_model_without_repeated_layers_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    overrides = ("engine.activation_checkpointing=selective", "track.wandb=off")
    done = bigtrain("train", "digits-rnn", *overrides, cwd=tmp_path)
    assert done.returncode == 2
    assert "activation_checkpointing is selective, but RNN has no repeated layers" in done.stderr
    assert "try:      engine.activation_checkpointing=none" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
