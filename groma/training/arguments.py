"""The Trainer's arguments that a run configuration stands for."""

from __future__ import annotations

import json
import os
from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from groma.config import SHIPPED
from groma.settings import RunConfig
from groma.training.parts import TrainingError

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def arguments(run: RunConfig, device: str) -> TrainingArguments:
    """Made before the model: under ZeRO-3 they are what tells from_pretrained to share out the weights as it reads.

    Raises TrainingError for a DeepSpeed file that is missing or does not go with the run.
    """
    optim = run.optim
    if device == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda: no CUDA device here")
    deepspeed = _deepspeed(run) if optim.deepspeed else None
    made = TrainingArguments(
        output_dir=run.output,
        seed=run.seed,
        per_device_train_batch_size=optim.batch_size,
        gradient_accumulation_steps=optim.accumulate,
        num_train_epochs=optim.epochs,
        max_steps=optim.max_steps or -1,
        learning_rate=optim.lr,
        weight_decay=optim.weight_decay,
        lr_scheduler_type=_SCHEDULES[optim.schedule],
        warmup_steps=optim.warmup_steps or optim.warmup_ratio,
        max_grad_norm=optim.clip,
        bf16=optim.dtype == "bfloat16" and deepspeed is not None,
        deepspeed=deepspeed,
        logging_strategy="steps",
        logging_steps=run.log.every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=run.save.every or 10**9,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        # A batch of one data source leaves the other source's head without gradient.
        ddp_find_unused_parameters=True,
        use_cpu=device == "cpu",
    )
    _ = made.device  # asking for it is what joins the processes: from_pretrained must know how many there are
    if deepspeed is not None:
        # It takes over the processes joined; on a CPU nobody has told it of them yet.
        import_module("deepspeed.comm").init_distributed()
    return made


def _deepspeed(run: RunConfig) -> dict[str, Any]:
    """The DeepSpeed configuration that ``optim.deepspeed`` names: a path, or a name in groma/configs/."""
    name = str(run.optim.deepspeed)
    if find_spec("deepspeed") is None:
        raise TrainingError(f"optim.deepspeed is {name}, which needs deepspeed: pip install deepspeed")
    file = next((path for path in (Path(name), SHIPPED / name) if path.is_file()), None)
    if file is None:
        shipped = ", ".join(sorted(path.name for path in SHIPPED.glob("zero*.json")))
        raise TrainingError(f"optim.deepspeed: no file {name}; shipped ones: {shipped}")
    if "RANK" not in os.environ:
        raise TrainingError(
            f"optim.deepspeed is {name}, which needs a launcher, also for one process: torchrun --nproc_per_node 1 …"
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        stage = settings.get("zero_optimization", {}).get("stage", 0)
    except (json.JSONDecodeError, AttributeError) as error:
        raise TrainingError(f"{file}: not a DeepSpeed configuration ({error})") from error
    whole = ("model.encoder", "model.llm", "data.proposal_cache")
    if stage == 3 and (given := [key for key in whole if attrgetter(key)(run)]):
        raise TrainingError(
            f"optim.deepspeed is {name}: {', '.join(given)} needs whole weights, but ZeRO-3 leaves each process a "
            "share of them (parts: tools/make_model.py puts them in beforehand; else take zero2.json)"
        )
    if stage == 3 and run.stage == "detection" and len({source.source for source in run.data.sources}) > 1:
        raise TrainingError(
            f"optim.deepspeed is {name}: ZeRO-3 needs every process to run the same modules, but the sources of this "
            "run train different objectness heads; take zero2.json"
        )
    return dict(settings)
