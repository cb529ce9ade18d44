"""From the recipe to a module, and to an exported folder."""

import logging

# transformers imports torchao where it is installed, which then warns of extensions for GPUs that
# this machine cannot load, and makes torch warn of torchao.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
