"""What a model costs in floating-point operations, counted; and how many the device could do."""

import math
import re
import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

# Dense bf16 FLOP/s, from the vendors' data sheets, by whole words of torch's name for the device.
# The first that fits counts, so a longer name comes before a shorter one that it contains.
PEAKS = {
    "GB300": 2500e12,
    "B300": 2250e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 836e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI355X": 2500e12,
    "MI325X": 1307e12,
    "MI300X": 1307e12,
    "MI250X": 191.5e12,  # of one die, which torch sees as a device
}


def peak_flops(device: torch.device, bf16_is_fast: bool = True) -> float:
    """Dense bf16 FLOP/s of this rank's device: from the table, else measured (as on CPUs)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        # Of a MIG slice only a measurement tells how large it is.
        entries = {} if "MIG" in name else PEAKS
        for words, peak in entries.items():
            if re.search(rf"\b{words}\b", name):
                return peak
    return product_rate(device, torch.bfloat16 if bf16_is_fast else torch.float32)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of eight products of two square matrices."""
    cuda = device.type == "cuda"
    size = 8192 if cuda else 768
    a = torch.randn(size, size, dtype=dtype, device=device)
    b = torch.randn(size, size, dtype=dtype, device=device)
    best_seconds = float("inf")
    for _ in range(8):
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        a @ b
        if cuda:
            torch.cuda.synchronize()
        best_seconds = min(best_seconds, time.perf_counter() - began)
    return float(2 * size**3 / best_seconds)


def flop_counter() -> FlopCounterMode:
    """A context that counts the floating-point operations of any module.

    It counts products, convolutions, attention and recurrent layers. Multiplications and additions
    count one each; attention counts whole, causal or not (PaLM, arXiv 2204.02311, appendix B).
    """
    aten = torch.ops.aten
    # Operations that torch's own counter does not know.
    formulas: dict[Any, Any] = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten.mkldnn_rnn_layer: _mkldnn_rnn,
        aten._cudnn_rnn: _cudnn_rnn,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _mkldnn_rnn(inputs: Any, to_gates: Any, between: Any, *_: Any, **__: Any) -> int:
    """One layer: each input element, and each hidden one, times its gates' weights."""
    weights = to_gates[0] * to_gates[1] + between[0] * between[1]
    return int(2 * inputs[0] * inputs[1] * weights)


def _cudnn_rnn(inputs: Any, weights: Any, *_: Any, **__: Any) -> int:
    """All layers at once; among `weights`, the shapes of two dimensions are matrices."""
    matrices = [shape for shape in weights if len(shape) == 2]
    elements = sum(rows * columns for rows, columns in matrices)
    # [batch, length, width]; with packed sequences [tokens, width]
    return int(2 * math.prod(inputs[:-1]) * elements)
