"""`python -m bigtrain` and `torchrun … -m bigtrain` are the `bigtrain` command."""

from bigtrain.cli import main

main()
