"""The `bigtrain` command, and `python -m bigtrain`."""

import atexit
import gc

# To look for garbage among what is imported, and once more at the end, would cost 40 ms of a quarter of a second.
gc.set_threshold(100_000)
atexit.register(gc.freeze)

from bigtrain.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
