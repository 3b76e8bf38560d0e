"""A training run from its configuration: model, data, trainer, final model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from groma.config import save_config
from groma.settings import RunConfig
from groma.training import checkpoints
from groma.training.callbacks import tell
from groma.training.guard import hears_sigterm
from groma.training.parts import Interrupted, TrainingError
from groma.training.resume import compare as same_data

if TYPE_CHECKING:
    from groma.model.groma import GromaForConditionalGeneration
    from groma.processor import GromaProcessor
    from groma.training.trainer import GromaTrainer


def train(run: RunConfig, resume: bool = False, device: str = "auto") -> Path:
    """Train as ``run`` says and return the folder of the final model, ``output/final``.

    ``resume``: go on from the newest complete checkpoint in ``output``, or start if there is none. Under torchrun or
    another launcher every process calls it. Raises TrainingError (or the ConfigError, DataError, ImageError of what it
    reads), always one line; Interrupted after SIGTERM, when the step under way is done and saved.
    """
    from groma.training.data import left_out

    for package in ("accelerate", "tensorboard") if run.log.tensorboard else ("accelerate",):
        if find_spec(package) is None:
            raise TrainingError(f"training needs {package}: pip install 'groma[train]'")
    output = Path(run.output)
    found = checkpoints.checkpoints(output)
    if found and not resume:
        raise TrainingError(f"{output} holds {found[-1].name} of an earlier run: resume it, or choose another output")
    trainer, processor = build(run, device)
    changes = same_data(run, len(trainer.samples), trainer.args.world_size, found[-1]) if found else []
    if trainer.is_world_process_zero():
        if changes:
            tell(f"{found[-1].name} was reached with other settings: {'; '.join(changes)}")
        output.mkdir(parents=True, exist_ok=True)
        save_config(run, output / "config.yaml")
    if found and checkpoints.step_of(found[-1]) >= trainer.steps():
        trainer.restore(found[-1])
    else:
        with hears_sigterm(trainer.guard):
            try:
                trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
            finally:
                trainer.bar.close()
        step = trainer.state.global_step
        if trainer.guard.stopping and step < trainer.state.max_steps:
            raise Interrupted(f"ended by SIGTERM after step {step}, saved as {output}/checkpoint-{step}: resume it")
    for line in left_out(trainer.train_dataset):
        if trainer.is_world_process_zero():
            tell(line)
    final = output / "final"
    trainer.save_final(final, processor.save_pretrained)
    return final


def build(run: RunConfig, device: str = "auto") -> tuple[GromaTrainer, GromaProcessor]:
    """The trainer of a run, its data read and its model made, and the processor that belongs to the model."""
    from groma.data.loader import collate
    from groma.training.arguments import arguments
    from groma.training.data import examples, model_inputs, read_words
    from groma.training.preparing import prepare
    from groma.training.trainer import GromaTrainer
    from groma.training.validation import Validation

    torch.set_float32_matmul_precision(run.optim.matmul_precision)
    args = arguments(run, device)
    model, processor = load_model(run, args.device)
    prepare(model, run)
    if run.optim.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    words = len(read_words(run.data.words))
    if "words_head" in run.model.train and words != model.config.words:
        raise TrainingError(f"data.words has {words} words, but the model's head predicts {model.config.words}")
    mixture, dataset = examples(run, processor)
    scored = run.evaluate.every > 0 and (run.evaluate.proposals or run.evaluate.rec)
    trainer = GromaTrainer(
        model,
        run,
        args,
        dataset=dataset,
        samples=mixture,
        collate=collate,
        inputs=model_inputs,
        evaluate_with=Validation(run, processor) if scored else None,
    )
    return trainer, processor


def load_model(
    run: RunConfig, device: torch.device | str = "cpu"
) -> tuple[GromaForConditionalGeneration, GromaProcessor]:
    """The model a run starts from, saved (``model.init``) or random (``model.config``), and its processor.

    In float32, whatever it was saved in: what learns needs the precision. Quantised weights are made on ``device``.
    """
    from groma.model.configuration import GromaConfig
    from groma.model.groma import GromaForConditionalGeneration
    from groma.processor import GromaProcessor
    from groma.training.adapters import load_options

    key = "init" if run.model.init else "config"
    folder = Path(run.model.init or run.model.config or "")
    if not (folder / "config.json").is_file():
        raise TrainingError(f"model.{key}: no config.json in {folder}")
    processor = GromaProcessor.from_pretrained(str(folder))
    torch.manual_seed(run.seed)
    if key == "init":
        model = GromaForConditionalGeneration.from_pretrained(
            str(folder), dtype=torch.float32, **load_options(run, device)
        )
    else:
        model = GromaForConditionalGeneration(GromaConfig.from_pretrained(str(folder)))
    return model, processor
