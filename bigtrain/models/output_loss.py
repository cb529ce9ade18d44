"""The loss of a language model's output layer without its logits.

The logits of all tokens, tokens × vocabulary, and what cross entropy makes of them are the largest
tensors of a step. Here a few rows at a time are turned into their losses and gradients, while they
are still in the processor's cache.

torch's own `linear_cross_entropy` (2.13) is not used: in bf16 it returns the sum of the loss in
bf16, which has three digits, and it knows no label smoothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # the label of a position that does not count, as torch's cross_entropy has it

# Logits that exist at one time. On a CPU they should stay in a core's cache; a GPU wants large
# products.
_LOGITS_ON_CPU = 1 << 20
_LOGITS_ON_GPU = 1 << 27
# Rows whose gradients are kept for one product with their inputs: each product reads and writes
# the whole gradient of the weight.
_ROWS_PER_PRODUCT = 256


class _Request(NamedTuple):
    """What the output layer is to compute in its next forward pass instead of logits."""

    labels: Tensor  # [rows]
    smoothing: float
    likeliest: Tensor | None  # [rows], filled with the likeliest token of each; None: not wanted
    losses: Tensor | None  # [rows], filled with the loss of each, 0 where ignored; likewise
    with_gradients: bool


class OutputLoss:
    """Makes a linear output layer return the summed loss where it is asked to, else logits.

    The loss is computed in the layer's own forward pass, because engines that shard the weight have
    it there and nowhere else.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer
        self._request: _Request | None = None
        # Of each token [batch, length], from the last call that asked for the likeliest tokens.
        self.token_losses: Tensor | None = None
        self.likeliest: Tensor | None = None
        layer.forward = self._forward  # type: ignore[assignment, method-assign]

    def loss_sum(
        self,
        run_model: Callable[[], Tensor],
        labels: Tensor,
        smoothing: float = 0.0,
        likeliest: Tensor | None = None,
    ) -> Tensor:
        """The loss summed over `labels` [batch, length]: a scalar, fp32.

        `run_model` runs the model's forward pass, and returns what the model makes of its output
        layer's result. `likeliest` [batch, length] is filled with the likeliest tokens; then
        `token_losses` and `likeliest` of this object say what became of each token.
        """
        losses = None
        if likeliest is not None:
            self.token_losses = torch.zeros(labels.shape, device=labels.device)
            self.likeliest = likeliest
            losses = self.token_losses.view(-1)
        self._request = _Request(
            labels=labels.flatten(),
            smoothing=smoothing,
            likeliest=None if likeliest is None else likeliest.view(-1),
            losses=losses,
            with_gradients=torch.is_grad_enabled(),
        )
        try:
            return run_model()
        finally:
            self._request = None

    def _forward(self, hidden: Tensor) -> Tensor:
        """`hidden` [batch, length, width] → logits, or the loss if it is asked for."""
        weight, bias, request = self._layer.weight, self._layer.bias, self._request
        if request is None:
            return F.linear(hidden, weight, bias)
        rows = hidden.flatten(0, -2)
        result: Tensor = _LinearCrossEntropy.apply(rows, weight, bias, request)
        return result


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross entropy of softmax(hidden · weightᵀ + bias), summed over the rows.

    The gradient of a sum is known as soon as the row's logits are, so the forward pass computes it,
    and the backward pass only multiplies it by the gradient of the sum.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, request: _Request
    ) -> Tensor:
        """`hidden` [rows, width], `weight` [vocabulary, width] → a scalar, fp32."""
        kind = hidden.device.type
        dtype = hidden.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        parts = _Parts(hidden.to(dtype), weight.to(dtype), bias, request, ctx.needs_input_grad)
        losses = parts.run()
        if request.losses is not None:
            request.losses.copy_(losses)
        ctx.save_for_backward(parts.hidden_grad, parts.weight_grad, parts.bias_grad)
        ctx.dtypes = hidden.dtype, weight.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradients of the forward pass, times the gradient of the sum."""
        hidden_grad, weight_grad, bias_grad = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        scale = grads[0]
        # In place: the weight's is as large as the weight.
        if hidden_grad is not None:
            hidden_grad = hidden_grad.mul_(scale).to(hidden_dtype)
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(scale).to(weight_dtype)
        if bias_grad is not None:
            bias_grad = bias_grad.mul_(scale).to(weight_dtype)
        return hidden_grad, weight_grad, bias_grad, None


class _Parts:
    """Goes through the rows part by part, and adds up the gradients that are needed."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        request: _Request,
        needs_grad: tuple[bool, ...],
    ) -> None:
        self.hidden = hidden
        self.weight = weight
        self.bias = None if bias is None else bias.to(weight.dtype)
        self.counts = request.labels != IGNORED
        self.labels = request.labels.clamp(min=0)
        self.smoothing = request.smoothing
        self.likeliest = request.likeliest
        # Of what requires gradients; they may be switched off all the same.
        needs_hidden, needs_weight, needs_bias = (
            needed and request.with_gradients for needed in needs_grad[:3]
        )
        self.hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        self.weight_grad: Tensor | None = None
        self.bias_grad: Tensor | None = None
        if needs_weight:
            self.weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        if needs_bias:
            self.bias_grad = torch.zeros(len(weight), dtype=torch.float32, device=weight.device)
        self.needs_grad = needs_hidden or needs_weight or needs_bias

    def run(self) -> Tensor:
        """The loss of each row, fp32."""
        losses = torch.empty(len(self.hidden), device=self.hidden.device)
        rows = max(16, _LOGITS_ON_CPU // len(self.weight))
        block = _ROWS_PER_PRODUCT
        if self.hidden.device.type != "cpu":
            rows = block = max(block, _LOGITS_ON_GPU // len(self.weight))
        # Of the logits of a block; the next block overwrites it.
        grads = self.hidden.new_empty(block if self.needs_grad else 0, len(self.weight))
        for start in range(0, len(self.hidden), block):
            stop = min(start + block, len(self.hidden))
            for first in range(start, stop, rows):
                part = slice(first, min(first + rows, stop))
                losses[part] = self._part(part, grads[first - start : part.stop - start])
            if self.needs_grad:
                self._add_gradients(grads[: stop - start], slice(start, stop))
        return losses

    def _part(self, part: slice, grad: Tensor) -> Tensor:
        """The losses of some rows, fp32; fills the gradient of their logits, where any is needed.

        `grad` [rows, vocabulary] or empty.
        """
        logits = F.linear(self.hidden[part], self.weight, self.bias)
        if self.likeliest is not None:
            self.likeliest[part] = logits.argmax(-1)
        label = self.labels[part].unsqueeze(1)
        counts = self.counts[part].unsqueeze(1)
        log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        losses = -log_probs.gather(1, label)
        if self.smoothing:
            mean = -log_probs.mean(1, keepdim=True)
            losses = (1.0 - self.smoothing) * losses + self.smoothing * mean
        if self.needs_grad:
            self._fill_gradient(grad, log_probs, label, counts)
        # Not a product with 0: that would keep a NaN.
        return losses.masked_fill(~counts, 0.0).squeeze(1)

    def _fill_gradient(
        self, grad: Tensor, log_probs: Tensor, label: Tensor, counts: Tensor
    ) -> None:
        """Probabilities less the target's distribution; may overwrite `log_probs`."""
        is_fp32 = grad.dtype == torch.float32
        exact = torch.exp(log_probs, out=grad if is_fp32 else log_probs)
        if self.smoothing:
            exact.sub_(self.smoothing / len(self.weight))
        own = torch.full_like(label, self.smoothing - 1.0, dtype=torch.float32)
        exact.scatter_add_(1, label, own)
        exact.masked_fill_(~counts, 0.0)
        if not is_fp32:
            grad.copy_(exact)

    def _add_gradients(self, grad: Tensor, part: slice) -> None:
        """`grad` [rows, vocabulary]: of the logits of `part`."""
        if self.hidden_grad is not None:
            torch.mm(grad, self.weight, out=self.hidden_grad[part])
        if self.bias_grad is not None:
            self.bias_grad += grad.sum(0, dtype=torch.float32)
        if self.weight_grad is None:
            return
        if grad.dtype == torch.float32:
            self.weight_grad.addmm_(grad.T, self.hidden[part])
        else:
            self.weight_grad += grad.T @ self.hidden[part]
