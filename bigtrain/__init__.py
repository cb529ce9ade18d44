"""bigtrain: a thin toolkit for distributed training of large models."""

__version__ = "0.1.0"
