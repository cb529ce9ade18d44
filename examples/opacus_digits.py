"""Differential privacy: fine-tune an exported model of bigtrain with Opacus, on one process.

pip install opacus
bigtrain train digits-cnn && python opacus_digits.py runs/digits-cnn/export
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from torch.utils.data import DataLoader

import bigtrain
from bigtrain.data.datasets import prepare
from bigtrain.tasks.registry import TASKS

TARGET_DELTA = 1e-4  # less than 1 / the number of training images


def main(folder: Path, epochs: int) -> None:
    torch.manual_seed(0)
    model = bigtrain.load_model(folder)
    recipe = bigtrain.load_recipe("digits-cnn").recipe
    data = prepare(recipe)
    task = TASKS[recipe.task](recipe.task, data)

    # What bigtrain has trained saw every image without noise; privacy needs fresh weights.
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    engine = PrivacyEngine()
    loader = DataLoader(data.train, batch_size=128, collate_fn=task.collate)
    private, optimizer, loader = engine.make_private(
        module=model.train(),
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=1.1,
        max_grad_norm=1.0,
    )
    held_out = task.collate([data.eval[index] for index in range(len(data.eval))])
    for epoch in range(1, epochs + 1):
        private.train()
        for batch in loader:
            optimizer.zero_grad()
            F.cross_entropy(private(batch["pixel_values"]), batch["labels"]).backward()
            optimizer.step()
        private.eval()
        with torch.no_grad():
            right = private(held_out["pixel_values"]).argmax(-1) == held_out["labels"]
        print(
            f"epoch {epoch}: held-out accuracy {right.float().mean():.3f},"
            f" epsilon {engine.get_epsilon(TARGET_DELTA):.2f} at delta {TARGET_DELTA:g}"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 10)
