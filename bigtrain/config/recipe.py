"""The recipe: every choice a user can make, with its type, its default and one line of meaning.

Frozen once loaded. A number derived from it belongs into the plan (engine/plan.py), never here.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from bigtrain.config.task_specs import TASK_SPECS, MetricName, TaskName

PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
# What a line for sbatch may contain: nothing that could end the line, the word or a quotation.
SlurmValue = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:;@%/+=&|*?~()\[\]-]+$")]


def _without_booleans(value: Any) -> Any:
    """Recipes of earlier versions have true and false."""
    if isinstance(value, bool):
        return "full" if value else "none"
    return value


def _number_of(value: Any) -> Any:
    """The keys of a mapping in a run's recipe.yaml are texts."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


Qat = Literal["int8", "int4"]
Checkpointing = Literal["none", "full", "selective"] | PositiveInt
Columns = dict[str, str | Annotated[list[str], Field(min_length=1)]]  # by field
StepNumber = Annotated[Count, BeforeValidator(_number_of)]


class Section(BaseModel):
    """A part of the recipe: frozen, strictly typed, closed to unknown keys.

    The one conversion is from an int to a float.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True
    )


class PruneConfig(Section):
    """Which pretrained weights are set to zero, and stay zero in training."""

    amount: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        description="the part of the weights of linear, convolutional and recurrent layers that"
        " becomes zero: the smallest"
    )
    scope: Literal["global", "layer"] = Field(
        default="global",
        description="the smallest of the whole model, or of each layer",
    )
    structure: Literal["weights", "channels"] = Field(
        default="weights",
        description="single weights, or whole output channels of convolutions (scope: layer)",
    )

    @model_validator(mode="after")
    def _channels_by_layer(self) -> "PruneConfig":
        if self.structure == "channels" and self.scope == "global":
            raise ValueError("structure: channels needs scope: layer")
        return self


class ModelConfig(Section):
    """What is trained."""

    name: str = Field(
        description="a key of MODELS, a transformers model type, or package.module:Class"
    )
    args: dict[str, Any] = Field(
        default={}, description="arguments of the model's configuration or constructor"
    )
    pretrained: str | None = Field(
        default=None, description="a local folder or hub id to start from (safetensors)"
    )
    dropout: Fraction | None = Field(
        default=None, description="sets every dropout of the model; null keeps the model's own"
    )
    prune: PruneConfig | None = Field(
        default=None, description="with pretrained: train with the smallest weights set to zero"
    )
    qat: Qat | None = Field(
        default=None,
        description="train with weights rounded as `bigtrain compress` rounds them to int8 or int4",
    )

    @model_validator(mode="after")
    def _prune_what_is_trained(self) -> "ModelConfig":
        if self.prune and not self.pretrained:
            raise ValueError("prune needs pretrained: of random weights the smallest say nothing")
        return self


class TokenizerConfig(Section):
    """A tokenizer trained on the training text."""

    train: Literal["bpe"] = Field(default="bpe", description="byte-level BPE")
    vocab_size: Annotated[int, Field(ge=258)] = Field(
        default=4096, description="entries, the 256 bytes included"
    )


class AugmentConfig(Section):
    """Random changes to training images, a function of the seed and the sample's position alone."""

    crop: Count = Field(
        default=0, description="pixels of padding before a random crop to the same size"
    )
    flip: bool = Field(default=False, description="horizontal flip with probability 1/2")


class ParallelText(Section):
    """Two sets of text files: line i of the one belongs to line i of the other."""

    source: str = Field(description="text files (glob), one source per line")
    target: str = Field(description="the same of the targets; seq2seq")


class DataConfig(Section):
    """What it is trained on."""

    train: str | ParallelText = Field(
        description="a built-in source, files (glob), an image folder, a hub id,"
        " or two sets of text files"
    )
    eval: str | ParallelText | None = Field(
        default=None, description="the same for evaluation; null holds out a part of train"
    )
    eval_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.1, description="the part held out when eval is null"
    )
    columns: Columns = Field(
        default={},
        description="field: column, e.g. {text: body, label: category}; of a table also features:"
        " a list of columns, instead of all that can be inputs",
    )
    missing: Literal["fill", "refuse"] = Field(
        default="fill",
        description="a table's missing values: `fill` (the training median and a flag, or a"
        " category of their own), or `refuse` the row",
    )
    tokenizer: Literal["auto", "bytes"] | TokenizerConfig | str = Field(
        default="auto",
        description="bytes, {train: bpe, …}, a folder or hub id;"
        " auto: the pretrained model's tokenizer, else bytes",
    )
    seq_len: PositiveInt = Field(
        default=256,
        description="tokens per sample: exactly (packed text), or at most (longer ones are cut)",
    )
    image_size: PositiveInt | None = Field(
        default=None, description="pixels per side; null keeps the images' own"
    )
    augment: AugmentConfig = AugmentConfig()
    max_unreadable: Count = Field(
        default=0, description="how many unreadable samples may be left out; one more ends the run"
    )
    workers: Count = Field(default=0, description="data loading processes per rank")


class GroupConfig(Section):
    """Settings of the parameters that a pattern names."""

    frozen: bool = Field(default=False, description="keep them as they are at the start")
    lr_scale: Annotated[float, Field(ge=0.0)] = Field(
        default=1.0, description="their rate is the schedule's times this"
    )
    weight_decay: Annotated[float, Field(ge=0.0)] | None = Field(
        default=None, description="of all of them; null: optim's, by the usual rule"
    )


class OptimConfig(Section):
    """How the weights move."""

    name: Literal["sgd", "adam", "adamw", "rmsprop", "adagrad"] = Field(
        default="adamw", description="the optimizer"
    )
    lr: Annotated[float, Field(gt=0.0)] = Field(default=3e-4, description="peak learning rate")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0, description="L2; decoupled for adamw"
    )
    l1: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0, description="L1: l1 × sign(w) is added to the gradient after clipping"
    )
    decay_norms_and_biases: bool = Field(
        default=False, description="decay one-dimensional parameters too"
    )
    momentum: Fraction = Field(default=0.0, description="sgd and rmsprop")
    nesterov: bool = Field(default=False, description="sgd with momentum")
    betas: tuple[Fraction, Fraction] = Field(
        default=(0.9, 0.999), strict=False, description="adam and adamw"
    )
    eps: Annotated[float, Field(gt=0.0)] = Field(
        default=1e-8, description="adam, adamw, rmsprop, adagrad"
    )
    alpha: Fraction = Field(
        default=0.99, description="rmsprop: decay of the average of squared gradients"
    )
    groups: dict[str, GroupConfig] = Field(
        default={},
        description="settings by pattern of parameters' names, the first that fits:"
        ' {"*.embed*": {lr_scale: 0.1}, "backbone.*": {frozen: true}}',
    )
    schedule: Literal["constant", "linear", "cosine", "step", "exponential", "wsd", "plateau"] = (
        Field(
            default="constant",
            description="learning rate after warm-up; wsd: warm-up, stable, decay;"
            " plateau: lower after evaluations that are no better",
        )
    )
    warmup_steps: Count = Field(default=0, description="linear warm-up from 0, with any schedule")
    final_lr_ratio: float = Field(
        default=0.0, ge=0.0, le=1.0, description="linear, cosine, wsd: last rate ÷ peak rate"
    )
    decay_every: PositiveInt = Field(
        default=100,
        description="step, exponential: steps until the rate is multiplied by decay_factor",
    )
    decay_factor: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.5, description="step, exponential, plateau: what the rate is multiplied by"
    )
    decay_patience: PositiveInt = Field(
        default=3,
        description="plateau: evaluations in a row without a better train.keep_best (or loss)"
        " until the rate is multiplied by decay_factor",
    )
    decay_steps: Count | None = Field(
        default=None, description="wsd: length of the decay; null: a fifth of the run"
    )
    clip_norm: Annotated[float, Field(ge=0.0)] = Field(
        default=1.0, description="largest gradient norm; 0: no clipping"
    )

    @model_validator(mode="after")
    def _momentum_has_an_effect(self) -> "OptimConfig":
        if self.momentum and self.name not in ("sgd", "rmsprop"):
            raise ValueError(f"momentum is for sgd and rmsprop; {self.name} has betas or none")
        if self.nesterov and not (self.name == "sgd" and self.momentum > 0):
            raise ValueError("nesterov needs name: sgd and a momentum above 0")
        return self


class EngineConfig(Section):
    """What runs it."""

    kind: Literal["auto", "ddp", "zero1", "zero2", "zero3"] = Field(
        default="auto",
        description="auto: what the launcher asks for, else what offload needs"
        " (optimizer: zero2, params: zero3), else ddp",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: cuda if there is a GPU, else cpu"
    )
    offload: Literal["none", "optimizer", "params"] = Field(
        default="none",
        description="keep in host memory: optimizer (zero1-3), params and optimizer (zero3)",
    )
    precision: Literal["auto", "fp32", "tf32", "bf16"] = Field(
        default="auto",
        description="auto: what the launcher asks for, else bf16 where it is fast, else fp32;"
        " tf32: fp32 with shorter products, on GPUs that have them",
    )
    global_batch: PositiveInt | Literal["all"] | dict[StepNumber, PositiveInt] = Field(
        default=64,
        description="samples per optimizer step on all ranks together; all: the whole training"
        " set; {0: 64, 2000: 128}: 128 from step 2000 on, and schedules go by samples",
    )
    micro_batch: PositiveInt | Literal["auto"] = Field(
        default="auto",
        description="samples per rank and forward pass; auto: about 16k tokens, or on a GPU 256"
        " images of 224 × 224",
    )
    activation_checkpointing: Annotated[
        Checkpointing | Literal["auto"], BeforeValidator(_without_booleans)
    ] = Field(
        default="auto",
        description="compute activations again in the backward pass: of each repeated layer"
        " (`full`), of every N-th, or of each but for its products (`selective`); auto: none",
    )
    compile: bool | Literal["auto"] = Field(
        default="auto", description="torch.compile, of each repeated layer; auto: off"
    )
    reduce_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="in which ranks send each other gradients under ddp; bf16: half the traffic,"
        " and sums with 8 significant bits",
    )

    @model_validator(mode="after")
    def _ramp_begins_at_0(self) -> "EngineConfig":
        batch = self.global_batch
        if isinstance(batch, dict) and (0 not in batch or list(batch) != sorted(batch)):
            raise ValueError(
                f"global_batch is {batch}: expected the size from step 0 on, then later steps in"
                " ascending order, e.g. {0: 64, 2000: 128}"
            )
        return self

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> "EngineConfig":
        if self.offload != "none" and self.kind == "ddp":
            raise ValueError(
                "offload needs kind: zero1, zero2 or zero3 (ddp keeps everything on the device)"
            )
        if self.offload == "params" and self.kind in ("zero1", "zero2"):
            raise ValueError("offload: params needs kind: zero3 (only it shards the parameters)")
        return self


class DistillConfig(Section):
    """Learning from a trained model's outputs too (Hinton et al. 2015, arXiv 1503.02531)."""

    teacher: str = Field(description="a finished run, or the folder of an exported model")
    temperature: Annotated[float, Field(gt=0.0)] = Field(
        default=2.0, description="both models' logits are divided by it before they are compared"
    )
    alpha: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.5,
        description="loss = (1 - alpha) × loss of the labels"
        " + alpha × temperature² × KL(teacher, student)",
    )


class TrainConfig(Section):
    """How long it trains, and what happens on the way."""

    steps: PositiveInt | None = Field(
        default=None, description="optimizer steps; null: what epochs says, else 300"
    )
    epochs: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None, description="passes over the training set, instead of steps"
    )
    patience: PositiveInt | None = Field(
        default=None,
        description="evaluations in a row without a better keep_best (or loss) after which the run"
        " ends; null: it trains to its last step",
    )
    eval_every: PositiveInt = Field(
        default=50, description="steps between evaluations (and one at the end)"
    )
    checkpoint_every: PositiveInt = Field(
        default=50, description="steps between checkpoints (and one at the end)"
    )
    keep_last: PositiveInt = Field(
        default=2, description="how many of the newest checkpoints are kept"
    )
    keep_best: MetricName | None = Field(
        default=None,
        description="keep the checkpoint with the best value of this metric too, and export it",
    )
    async_save: bool = Field(
        default=True, description="write checkpoints in the background, from a copy in host memory"
    )
    log_every: PositiveInt = Field(default=1, description="steps between lines in metrics.jsonl")
    hang_timeout: Annotated[float, Field(gt=0.0)] | Literal["auto"] = Field(
        default="auto",
        description="seconds without progress after which the run ends with code 76;"
        " auto: 600, or the time of 50 steps if that is more",
    )
    max_skipped_steps: PositiveInt = Field(
        default=10,
        description="steps skipped in a row (loss or gradient not finite) that end the run",
    )
    on_spike: Literal["warn", "skip", "rewind"] = Field(
        default="warn",
        description="on a loss far above the last ones: `warn`; `skip` the step; `rewind` to the"
        " last checkpoint and skip the data that caused it",
    )
    profile_steps: list[PositiveInt] = Field(
        default=[],
        description="steps at which a profile of three steps begins, unless one is under way;"
        " a file runs/NAME/PROFILE asks for one too",
    )
    label_smoothing: Fraction = Field(
        default=0.0, description="for losses over classes or tokens, in training only"
    )
    distill: DistillConfig | None = Field(
        default=None, description="for losses over classes or tokens: learn from a teacher too"
    )

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"steps is {self.steps} and epochs is {self.epochs:g}: expected one of them;"
                " train.steps=null leaves it to epochs"
            )
        return self


class TrackConfig(Section):
    """Where metrics are sent, beside the run directory."""

    wandb: Literal["auto", "online", "offline", "off"] = Field(
        default="auto", description="auto: online when logged in, else offline"
    )
    extra: list[Literal["tensorboard", "trackio"]] = Field(
        default=[], description="further trackers; each is an optional dependency"
    )
    project: str = Field(
        default="bigtrain", pattern=r"^[^/\\#?%:]{1,128}$", description="W&B (and Trackio) project"
    )
    group: str | None = Field(default=None, description="W&B group; null: the recipe's name")
    tags: list[str] = Field(default=[], description="W&B tags")
    notes: str | None = Field(default=None, description="W&B notes: what this run is for")


class SlurmConfig(Section):
    """What `submit` asks Slurm for."""

    nodes: PositiveInt = Field(default=1, description="machines")
    gpus_per_node: Count = Field(
        default=8, description="GPUs, and ranks, per machine; 0: one rank on each machine's CPUs"
    )
    cpus_per_gpu: PositiveInt | None = Field(
        default=None, description="processor cores per rank; null: the cluster's default"
    )
    time: PositiveInt | Annotated[str, Field(pattern=r"^[0-9]+(-[0-9]+)?(:[0-9]+){0,2}$")] = Field(
        default="24:00:00",
        description="wall time limit: minutes, hours:minutes:seconds or days-hours",
    )
    grace_seconds: PositiveInt = Field(
        default=120, description="how long before the time limit the ranks get the signal to save"
    )
    partition: SlurmValue | None = Field(default=None, description="null: the cluster's default")
    account: SlurmValue | None = Field(default=None, description="the account that pays")
    qos: SlurmValue | None = Field(default=None, description="quality of service")
    constraint: SlurmValue | None = Field(
        default=None, description="features of the machines, e.g. h200&ib"
    )
    dependency: SlurmValue | None = Field(default=None, description="e.g. afterok:1234")
    array: Annotated[str, Field(pattern=r"^[0-9][0-9,:%-]*$")] | None = Field(
        default=None,
        description="numbers of a job array, e.g. 0-4%2; task N trains NAME-N with seed N",
    )
    container: str | None = Field(
        default=None, description="image that the ranks run in (srun --container-image, pyxis)"
    )
    setup: str | None = Field(
        default=None,
        description="a file that every rank sources first: a venv, modules, NCCL variables",
    )
    env: list[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]] | None = Field(
        default=None,
        description="names of the environment variables that the job gets; null: all of them",
    )


class Recipe(Section):
    """One training run, complete."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="the run directory's name below runs/",
    )
    seed: Count = Field(
        default=0, description="decides weights, data order, augmentation and dropout"
    )
    task: TaskName = Field(description="what the model learns to do")
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    train: TrainConfig = TrainConfig()
    track: TrackConfig = TrackConfig()
    slurm: SlurmConfig = SlurmConfig()

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> "Recipe":
        spec = TASK_SPECS[self.task]
        if spec.data != "table" and self.data.missing != "fill":
            raise ValueError("data.missing is for tables")
        if spec.data != "image" and self.data.augment != AugmentConfig():
            raise ValueError("data.augment is for image_classification")
        for part in (self.data.train, self.data.eval):
            if isinstance(part, ParallelText) and spec.predicts != "text":
                raise ValueError("data of a source and a target is for seq2seq")
        keep_best = self.train.keep_best
        metrics = ("loss", *spec.metrics)
        if keep_best is not None and keep_best not in metrics:
            raise ValueError(
                f"train.keep_best is {keep_best}; task {self.task} has {', '.join(metrics)}"
            )
        for key in ("label_smoothing", "distill"):
            if spec.predicts == "number" and getattr(self.train, key):
                raise ValueError(f"train.{key} is for losses over classes or tokens")
        return self
