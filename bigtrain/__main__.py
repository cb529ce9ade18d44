"""The `bigtrain` command, and `python -m bigtrain`."""

import gc

gc.set_threshold(100_000)  # looking for garbage among what is being imported would cost 10 ms of a quarter of a second

from bigtrain.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
