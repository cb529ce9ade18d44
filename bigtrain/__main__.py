"""The `bigtrain` command, and `python -m bigtrain`."""

import atexit
import gc

# Looking for garbage during the imports, and again at the end, would cost 40 ms of 250.
gc.set_threshold(100_000)
atexit.register(gc.freeze)

from bigtrain.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
