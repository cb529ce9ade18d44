"""Federated learning: three sites train one of bigtrain's models with Flower; no image leaves its
site. All three run on this machine here, each in its own process.

pip install flwr (in an environment of its own, see docs/protecting.md)
bigtrain train digits-mlp && python flower_digits.py runs/digits-mlp/export
"""

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import flwr
import torch
import torch.nn.functional as F
from flwr.server.strategy import FedAvg
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Subset

import bigtrain
from bigtrain.data.datasets import prepare
from bigtrain.tasks.registry import TASKS

ADDRESS = "127.0.0.1:8089"
SITES = 3
ROUNDS = 5


class Site(flwr.client.NumPyClient):
    """A hospital, say: every third image is here, and nowhere else."""

    def __init__(self, folder: Path, number: int) -> None:
        torch.manual_seed(number)
        self.model = bigtrain.load_model(folder)
        for module in self.model.modules():  # start from nothing, not from what has seen all
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        recipe = bigtrain.load_recipe("digits-mlp").recipe
        self.data = prepare(recipe)
        self.task = TASKS[recipe.task](recipe.task, self.data)
        self.own = Subset(self.data.train, range(number, len(self.data.train), SITES))

    def get_parameters(self, config: dict[str, Any]) -> list[NDArray[Any]]:
        return [tensor.numpy() for tensor in self.model.state_dict().values()]

    def set_parameters(self, parameters: list[NDArray[Any]]) -> None:
        names = self.model.state_dict().keys()
        weights = zip(names, map(torch.from_numpy, parameters), strict=True)
        self.model.load_state_dict(dict(weights))

    def fit(self, parameters: list[NDArray[Any]], config: dict[str, Any]) -> Any:
        self.set_parameters(parameters)
        self.model.train()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        for batch in DataLoader(self.own, 32, shuffle=True, collate_fn=self.task.collate):
            optimizer.zero_grad()
            F.cross_entropy(self.model(batch["pixel_values"]), batch["labels"]).backward()
            optimizer.step()
        return self.get_parameters(config), len(self.own), {}

    def evaluate(self, parameters: list[NDArray[Any]], config: dict[str, Any]) -> Any:
        self.set_parameters(parameters)
        self.model.eval()
        batch = self.task.collate([self.data.eval[index] for index in range(len(self.data.eval))])
        with torch.no_grad():
            logits = self.model(batch["pixel_values"])
        right = (logits.argmax(-1) == batch["labels"]).float().mean()
        loss = F.cross_entropy(logits, batch["labels"])
        return float(loss), len(batch["labels"]), {"accuracy": float(right)}


def mean_accuracy(results: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    total = sum(count for count, _ in results)
    return {"accuracy": sum(count * found["accuracy"] for count, found in results) / total}


def run_site(folder: Path, number: int) -> None:
    torch.set_num_threads(1)
    site = Site(folder, number).to_client()
    flwr.client.start_client(server_address=ADDRESS, client=site, insecure=True)


def main(folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    sites = [context.Process(target=run_site, args=(folder, number)) for number in range(SITES)]
    for site in sites:
        site.start()
    strategy = FedAvg(
        min_fit_clients=SITES,
        min_evaluate_clients=SITES,
        min_available_clients=SITES,
        evaluate_metrics_aggregation_fn=mean_accuracy,
    )
    config = flwr.server.ServerConfig(num_rounds=ROUNDS)
    history = flwr.server.start_server(server_address=ADDRESS, config=config, strategy=strategy)
    for site in sites:
        site.join()
    for number, accuracy in history.metrics_distributed["accuracy"]:
        print(f"round {number}: held-out accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
