"""Knowledge distillation: a trained model whose outputs another one learns to imitate.

Hinton, Vinyals & Dean 2015, arXiv 1503.02531.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.config.recipe import DistillConfig
from bigtrain.config.task_specs import TaskName
from bigtrain.data.examples import PreparedData
from bigtrain.errors import RequestError
from bigtrain.models.output_loss import IGNORED
from bigtrain.runs.directory import find_run


class Teacher:
    """A trained model, frozen and whole on every rank; it is no part of checkpoints."""

    def __init__(self, settings: DistillConfig, model: nn.Module) -> None:
        self.settings = settings
        self.model = model.eval().requires_grad_(False)
        self.in_bf16 = False

    def move(self, device: torch.device, in_bf16: bool) -> None:
        """To where the run computes. Its weights stay fp32; `in_bf16`: its products are in bf16."""
        self.model.to(device)
        self.in_bf16 = in_bf16

    def autocast(self) -> torch.autocast:
        """Surrounds the teacher's forward pass."""
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.in_bf16)

    def blend(self, loss: Tensor, logits: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
        """(1 - alpha) × `loss` + alpha × T² × KL(teacher ‖ student), summed over the targets.

        `loss`: of the labels, a sum. `logits` of the student and `taught` of the teacher
        [..., classes], fp32; `labels` [...], where IGNORED counts nothing. Raises RequestError if
        the two models have another number of outputs.
        """
        if taught.shape != logits.shape:
            raise RequestError(
                f"the teacher has {taught.shape[-1]} outputs, the model {logits.shape[-1]}",
                "models with the same outputs",
                "the same vocab_size in model.args",
            )
        alpha, temperature = self.settings.alpha, self.settings.temperature
        divergence = F.kl_div(
            F.log_softmax(logits / temperature, -1),
            F.log_softmax(taught.detach() / temperature, -1),
            reduction="none",
            log_target=True,
        )
        # Not a product with 0: that would keep a NaN.
        counted = divergence.sum(-1).masked_fill(labels == IGNORED, 0.0)
        return (1 - alpha) * loss + alpha * temperature**2 * counted.sum()


def teacher_folder(name: str) -> Path:
    """Where the teacher's export is. Raises RequestError if `name` is no run or has none."""
    folder = Path(name)
    if not (folder / "bigtrain.json").is_file():
        folder = find_run(name).export
    if not (folder / "bigtrain.json").is_file():
        raise RequestError(
            f"train.distill.teacher: {name} has no export",
            "a finished run, or a folder that bigtrain export wrote",
            f"bigtrain train {folder.parent / 'recipe.yaml'}",
        )
    return folder


def load_teacher(settings: DistillConfig, task: TaskName, data: PreparedData) -> Teacher:
    """The teacher, on the CPU in fp32.

    Raises RequestError for one of another task, of other classes or another tokenizer, or whose
    inputs are prepared in another way than `data`.
    """
    from bigtrain.models.export import load_exported

    folder = teacher_folder(settings.teacher)
    about = json.loads((folder / "bigtrain.json").read_text())
    own = {"task": task, "classes": data.classes, "image": data.image} | data.preprocessing
    for key, value in json.loads(json.dumps(own)).items():
        if about.get(key) != value:
            raise _unlike(folder, f"{key} {_shown(about.get(key))}", f"{key} {_shown(value)}")
    if data.tokenizer is not None and not _same_tokenizer(data.tokenizer, folder):
        raise RequestError(
            f"train.distill.teacher: {folder} has another tokenizer than this recipe's data",
            "the same tokenizer, so that both models give probabilities to the same tokens",
            f"data.tokenizer={folder}",
        )
    return Teacher(settings, load_exported(folder, task))


def _same_tokenizer(tokenizer: Any, folder: Path) -> bool:
    """Whether the export's tokenizer.json makes the same tokens of every text."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return False
    return _of_tokens(json.loads(path.read_text(encoding="utf-8"))) == _of_tokens(
        json.loads(tokenizer.backend_tokenizer.to_str())
    )


def _of_tokens(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """What decides which tokens a text has; not how long a text may be."""
    decides = ("added_tokens", "normalizer", "pre_tokenizer", "model")
    return {key: tokenizer.get(key) for key in decides}


def _unlike(folder: Path, found: str, expected: str) -> RequestError:
    return RequestError(
        f"train.distill.teacher: {folder} was trained with {found}",
        f"what this recipe has: {expected}",
        "the same data and image size, or another teacher",
    )


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 200 else f"{text[:200]}…"
