"""From the recipe's data section to two sets of examples and everything a model must know about them."""

from bigtrain.data.examples import Corpus, prepare
from bigtrain.data.stream import eval_batches, train_batches

__all__ = ["Corpus", "eval_batches", "prepare", "train_batches"]
