"""Our models in transformers' Auto classes: `import bigtrain.models.auto`, then from_pretrained.

    import bigtrain.models.auto
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained("out")

No remote code: the classes are these, and a folder names them (`model_type: bigtrain_cnn`).
"""

from typing import Any

from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

from bigtrain.models.export import OWN_TYPE
from bigtrain.models.own import MODELS

# Which Auto classes there are beside AutoModel for what our models predict.
_AUTO_CLASSES: dict[str, tuple[Any, ...]] = {
    "cnn": (AutoModelForImageClassification,),
    "rnn": (
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
    ),
    "mlp": (AutoModelForImageClassification,),
    "linear": (AutoModelForImageClassification,),
}


class BigtrainConfig(PreTrainedConfig):
    """An export's config.json: the architecture, and its arguments."""

    def __init__(self, architecture: str = "", args: dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.architecture = architecture
        self.args = args or {}


class BigtrainModel(PreTrainedModel):
    """One of our models; its arguments are the module's own, and the output has `logits`."""

    config_class = BigtrainConfig
    base_model_prefix = "model"  # a file's names are those of the module within

    def __init__(self, config: BigtrainConfig) -> None:
        super().__init__(config)
        self.model = MODELS[config.architecture].model_class(**config.args)
        if config.architecture == "rnn" and config.args.get("per_position"):
            tied = self.model.head.weight is self.model.embedding.weight
            self._tied_weights_keys = (
                {"model.head.weight": "model.embedding.weight"} if tied else {}
            )
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """They come from a file."""

    def forward(self, **inputs: Tensor) -> CausalLMOutput:
        return CausalLMOutput(logits=self.model(**inputs))


def _register() -> None:
    for name, auto_classes in _AUTO_CLASSES.items():
        model_type = OWN_TYPE + name
        config = type(f"{name}Config", (BigtrainConfig,), {"model_type": model_type})
        model = type(f"Bigtrain_{name}", (BigtrainModel,), {"config_class": config})
        AutoConfig.register(model_type, config, exist_ok=True)
        for auto in (AutoModel, *auto_classes):
            auto.register(config, model, exist_ok=True)


_register()
