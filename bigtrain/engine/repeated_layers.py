"""The layers that a model is a stack of: found, computed again in backward passes, compiled."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from bigtrain.config.recipe import Checkpointing
from bigtrain.errors import RequestError

Context = AbstractContextManager[Any]
# What `selective` keeps: much work for its memory. The rest of a layer is cheap to compute again.
_PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_grouped_mm",
    "linear",
    "convolution",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that `model` is a stack of, outermost ones, in order; empty if there are none.

    They are of a class that a ModuleList or Sequential holds several times. If some of one class
    are alike in all shapes, only such classes count: a ResNet's stages differ, its blocks do not.
    """
    classes = _repeated_classes(model, alike=True) or _repeated_classes(model, alike=False)
    return list(_outermost(model, classes))


def _repeated_classes(model: nn.Module, alike: bool) -> set[type[nn.Module]]:
    """Classes that one list holds twice; with `alike`, twice with parameters of the same shapes."""
    classes = set()
    for container in model.modules():
        seen = set()
        for layer in _elements(container):
            kind = (type(layer), _shapes(layer) if alike else ())
            if kind in seen:
                classes.add(type(layer))
            seen.add(kind)
    return classes


def _outermost(container: nn.Module, classes: set[type[nn.Module]]) -> Iterator[nn.Module]:
    layers = [layer for layer in _elements(container) if type(layer) in classes]
    yield from layers
    for child in container.children():
        if child not in layers:
            yield from _outermost(child, classes)


def _elements(container: nn.Module) -> Iterator[nn.Module]:
    """What a list holds that has parts and parameters: a bare nn.Linear keeps only its input."""
    if isinstance(container, nn.ModuleList | nn.Sequential):
        for child in container.children():
            has_parts = any(True for _ in child.children())
            if has_parts and any(True for _ in child.parameters()):
                yield child


def _shapes(layer: nn.Module) -> tuple[tuple[int, ...], ...]:
    # ZeRO-3 leaves an empty tensor where a parameter was, and notes its shape.
    return tuple(tuple(getattr(p, "ds_shape", p.shape)) for p in layer.parameters())


def _cut_sequences(model: nn.Module) -> list[nn.Module]:
    """Parts of each Sequential of bare layers: a convolution or nn.Linear, and what follows it.

    The Sequential runs its parts from now on; its children stay what they were, and so do names.
    """
    parts: list[nn.Module] = []
    for sequence in model.modules():
        if type(sequence) is not nn.Sequential:
            continue
        starts = [i for i, child in enumerate(sequence) if isinstance(child, nn.Linear | _ConvNd)]
        if len(starts) > 1:
            starts[0] = 0
            own = [sequence[start:end] for start, end in pairwise([*starts, len(sequence)])]
            sequence.forward = nn.Sequential(*own).forward  # type: ignore[method-assign]
            parts += own
    return parts


def checkpoint_layers(model: nn.Module, which: Checkpointing) -> None:
    """Let layers keep their inputs alone, and compute the rest again when gradients need it.

    All of them, every N-th, or all of them but for their products (`selective`). Only `forward` of
    each is replaced, so names stay. transformers could do it too (`GradientCheckpointingLayer`),
    but for fewer models and without choice; what it wraps stays off.
    Raises RequestError for a model without repeated layers.
    """
    layers = repeated_layers(model) or _cut_sequences(model)
    if not layers:
        raise RequestError(
            f"engine.activation_checkpointing is {which}, but {type(model).__name__} has no"
            " repeated layers",
            "layers of one class in an nn.ModuleList or nn.Sequential",
            "engine.activation_checkpointing=none",
        )
    kept = []
    if which == "selective":
        kept = [getattr(torch.ops.aten, name).default for name in _PRODUCTS]
        module: Any
        for module in model.modules():
            if hasattr(module, "inplace"):
                module.inplace = False  # it would overwrite a product that is kept
    forward = partial(_run_twice, kept)
    every = which if isinstance(which, int) else 1
    for layer in layers[::every]:
        layer.forward = MethodType(forward, layer)


def _run_twice(kept: list[Any], layer: nn.Module, *inputs: Any, **named: Any) -> Any:
    """The layer's own forward pass. Dropout draws the same in the second one."""
    forward = partial(type(layer).forward, layer, **named)
    if not torch.is_grad_enabled():
        return forward(*inputs)
    contexts: Any = partial(_contexts, layer, kept)
    if torch.compiler.is_compiling():
        # It copies operations within a graph: buffers move once, and only this context is known.
        contexts = partial(create_selective_checkpoint_contexts, kept)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts)


def _contexts(layer: nn.Module, kept: list[Any]) -> tuple[Context, Context]:
    """For the first pass, and for the second."""
    if not kept:
        return nullcontext(), _with_copied_buffers(layer, nullcontext())
    first, second = create_selective_checkpoint_contexts(kept)
    return first, _with_copied_buffers(layer, second)


@contextmanager
def _with_copied_buffers(layer: nn.Module, inner: Context) -> Iterator[None]:
    """BatchNorm moves its statistics in the first pass; in the second, copies of them."""
    originals = []
    for module in layer.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                originals.append((module, name, buffer))
                module._buffers[name] = buffer.clone()
    try:
        with inner:
            yield
    finally:
        for module, name, buffer in originals:
            module._buffers[name] = buffer


def compile_layers(model: nn.Module) -> None:
    """Compile each repeated layer, so that compiling takes the time of one; else the whole model.

    `compile()` of a module changes neither its class nor its parameters' names.
    """
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    # Dropout draws as without compiling: whoever resumes with it continues the same curve.
    inductor.fallback_random = True
    # DDP adds gradients between layers. To cut graphs for it fails where one is computed again.
    dynamo.optimize_ddp = False
    # Each kind of layer, in training and in evaluation, and for each shape of batch.
    dynamo.recompile_limit = 64
    for module in repeated_layers(model) or [model]:
        module.compile()
