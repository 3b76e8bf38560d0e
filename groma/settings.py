"""The sections of a run configuration and what their values may be; groma.config reads them from YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

STAGES = ("detection", "alignment", "instruct")
PARTS = ("encoder", "proposer", "regions", "bridge", "vocabulary", "llm", "words_head")
FORMATS = (
    "detection", "regions", "openimages", "sa1b",  # boxes
    "rec", "refer", "refer_captions", "grounded_captions", "flickr30k", "region_captions", "vg", "grit",
    "detection_words",  # grounding
    "llava", "groma_instruct", "jsonl",  # dialogues
)  # fmt: skip
"""What groma.data.formats reads; its module says which reader each is."""
BOX_FORMATS = FORMATS[:4]
"""Those without words: they train the proposer, each on the objectness head that its ``source`` names."""
SPLIT_FORMATS = ("refer", "refer_captions", "flickr30k")
"""Those whose files hold training, validation and test records together, so that ``split`` must be given."""
HEADS = ("coco", "sa1b")
CHOICES = {
    "stage": STAGES,
    "data.crop": ("slight", "published"),
    "data.prompt_stage": ("", "align", "instruct"),
    "optim.schedule": ("cosine", "linear", "constant"),
    "optim.dtype": ("float32", "bfloat16"),
    "optim.matmul_precision": ("highest", "high", "medium"),
    "model.frozen_dtype": ("float32", "bfloat16"),
    "model.quantise": ("", "8bit", "4bit"),
}

POSITIVE = (
    "optim.lr optim.batch_size optim.accumulate optim.epochs log.every save.keep data.max_length data.prefetch "
    "model.lora.alpha evaluate.batch_size"
)
NOT_NEGATIVE = (
    "optim.max_steps optim.weight_decay optim.clip optim.warmup_steps optim.max_nonfinite seed save.every data.workers "
    "model.lora.rank evaluate.every evaluate.limit"
)
SHARES = "data.max_skipped optim.warmup_ratio model.lora.dropout"


@dataclass
class LoraConfig:
    """Low-rank adapters on the language model (LoRA, arXiv 2106.09685): its own weights stay frozen.

    ``rank`` 0 means none; the adapters' product is scaled by ``alpha`` / rank, with ``dropout`` before it. ``targets``:
    names of the linear layers that get one ([]: all of them). ``merge``: fold the adapters into the final model's
    weights; otherwise ``final`` holds them unmerged beside it.
    """

    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.05
    targets: list[str] = field(default_factory=list)
    merge: bool = True


@dataclass
class ModelConfig:
    """Where the model starts and which parts learn.

    ``init``: a saved model; ``config``: a directory with a configuration and a processor, for random weights. Exactly
    one is given. ``train``: the parts that learn; all others are frozen and, with ``eval_mode_frozen``, in eval mode.
    ``lr_scale``: a factor on the learning rate of a part. ``frozen_dtype``: the number format that frozen parts are
    kept and run in. ``lora``: adapters in place of the language model's own weights (name the part "llm" in ``train``);
    ``quantise``: store those weights in 8 or 4 bits (QLoRA, arXiv 2305.14314). ``encoder``, ``llm``: a saved model (a
    directory or hub id) whose weights replace those of a part before training starts.
    """

    init: str | None = None
    config: str | None = None
    train: list[str] = field(default_factory=list)
    lr_scale: dict[str, float] = field(default_factory=dict)
    eval_mode_frozen: bool = True
    frozen_dtype: str = "float32"
    lora: LoraConfig = field(default_factory=LoraConfig)
    quantise: str = ""
    encoder: str | None = None
    llm: str | None = None


@dataclass
class SourceConfig:
    """One data set: its ``name`` in messages, its ``format`` (reader), annotations ``ann`` and image folder ``images``.

    ``ratio``: the share of its records drawn in every epoch; ``cap``: at most so many of them (0: no limit); ``turns``:
    at most so many question-answer pairs of one image in a dialogue (0: the reader's default); ``source``: the
    objectness head its boxes train; ``split``: the part of the set, where its files hold several ("train");
    ``negatives``: the share of samples that get an expression for something that is not in the image; ``section``: the
    heading of datasets/README.md that tells how to get the set.
    """

    name: str = "???"
    format: str = "???"
    ann: str = "???"
    images: str = "???"
    ratio: float = 1.0
    cap: int = 0
    turns: int = 0
    source: str = "coco"
    split: str = ""
    negatives: float = 0.0
    section: str = ""


@dataclass
class DataConfig:
    """What is read, from ``sources``, by ``workers`` of each process (0: by itself), each ``prefetch`` batches ahead.

    ``words``: the region-words vocabulary, a list or a text file; ``max_length``: tokens of a dialogue, whose last
    turns are left out beyond it; ``answers_only``: loss on answers; ``augment``: flip and crop detection images;
    ``crop``: which of the two ways of groma.data.augment, "slight" or "published".
    ``prompt_stage``: "align" or "instruct", the two published turn separators ("" follows the stage). ``pack``: several
    dialogues in one row of the language model, instead of padding. ``max_skipped``: the share of records that may be
    unusable before the run stops. ``proposal_cache``: a folder in which the proposals of a frozen encoder and proposer
    are kept from one epoch to the next ("": none).
    """

    words: Any = None
    sources: list[SourceConfig] = field(default_factory=list)
    workers: int = 1
    prefetch: int = 4
    max_length: int = 2048
    answers_only: bool = True
    augment: bool = True
    crop: str = "slight"
    prompt_stage: str = ""
    pack: bool = False
    max_skipped: float = 0.01
    proposal_cache: str = ""


@dataclass
class OptimConfig:
    """AdamW at the rate ``lr``, with ``weight_decay`` on matrices and gradients of a norm up to ``clip`` (0: any).

    A step is ``accumulate`` batches of ``batch_size`` records in every process. ``max_steps`` 0 means ``epochs``. The
    rate rises for ``warmup_steps`` (0: for ``warmup_ratio`` of all), then follows ``schedule``. ``loss_weights``: a
    factor on a named loss (1 where a name is absent). ``dtype`` bfloat16 computes under autocast with float32 weights;
    ``matmul_precision`` is torch.set_float32_matmul_precision. ``gradient_checkpointing``: compute activations twice
    instead of keeping them. ``deepspeed``: a DeepSpeed JSON, by path or by its name in groma/configs ("zero3.json").
    ``max_nonfinite``: steps with a NaN or infinite loss that are left out, each reported, before the run stops.
    """

    lr: float = 1e-4
    batch_size: int = 16
    accumulate: int = 1
    epochs: float = 1.0
    max_steps: int = 0
    weight_decay: float = 0.0
    warmup_ratio: float = 0.0
    warmup_steps: int = 0
    schedule: str = "cosine"
    clip: float = 1.0
    dtype: str = "float32"
    matmul_precision: str = "highest"
    gradient_checkpointing: bool = False
    loss_weights: dict[str, float] = field(default_factory=dict)
    deepspeed: str | None = None
    max_nonfinite: int = 0


@dataclass
class LogConfig:
    """A line of metrics.jsonl (and, with ``tensorboard``, its files) ``every`` so many steps."""

    every: int = 20
    tensorboard: bool = True


@dataclass
class SaveConfig:
    """A resumable checkpoint ``every`` so many steps (0: only at the end); the last ``keep`` stay."""

    every: int = 500
    keep: int = 2


@dataclass
class EvalSet:
    """An annotation file ``ann`` and its image folder ``images``."""

    ann: str = "???"
    images: str = "???"


@dataclass
class EvaluateConfig:
    """Scores on a small validation set ``every`` so many steps (0: never), in batches of ``batch_size``.

    ``proposals``: boxes for AR50@100 (COCO layout); ``rec``: referring expressions (format rec); ``limit``: records of
    each (0: all).
    """

    every: int = 0
    proposals: EvalSet | None = None
    rec: EvalSet | None = None
    limit: int = 200
    batch_size: int = 16


@dataclass
class RunConfig:
    """One training run of a ``stage``: its ``model``, ``data`` and ``optim``, what it says (``log``), keeps (``save``)
    and scores (``evaluate``) meanwhile.

    ``output`` receives checkpoints, metrics.jsonl, TensorBoard files and ``final``. ``data_root``: for configurations
    to build paths from. ``seed``: of weights, order and draws.
    """

    stage: str = "???"
    output: str = "???"
    data_root: str = ""
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    log: LogConfig = field(default_factory=LogConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    @property
    def prompt_stage(self) -> str:
        """ "align" or "instruct": the turn separators in use."""
        return self.data.prompt_stage or ("align" if self.stage == "alignment" else "instruct")
