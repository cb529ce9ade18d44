"""The packages whose versions a run depends on; needs none of them to be imported."""

from importlib.metadata import distributions

PACKAGES = (
    "bigtrain",
    "torch",
    "accelerate",
    "deepspeed",
    "transformers",
    "datasets",
    "wandb",
    "numpy",
)


def installed_versions() -> dict[str, str]:
    """The version of each of them; `missing` for one that is not installed."""
    versions = {}
    for package in PACKAGES:
        installed = next(iter(distributions(name=package)), None)
        versions[package] = installed.version if installed else "missing"
    return versions
