"""transformers' Trainer for Groma: named losses, frozen parts, exact resume.

Everything a Trainer does stays (accumulation, DDP under torchrun, DeepSpeed); what changes is how a batch reaches the
model, what is logged, how the optimiser is grouped, and how a checkpoint is written and read.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from groma.settings import RunConfig
from groma.structures import Batch
from groma.training import checkpoints, feed, resume
from groma.training.callbacks import EvaluateEvery, MetricsFile, ProgressBar, TensorBoard, tell
from groma.training.feed import BatchSampler
from groma.training.guard import Guard
from groma.training.meter import Meter
from groma.training.parts import TrainingError, freeze_all_but, parameter_groups
from groma.training.preparing import finish
from groma.training.proposal_cache import open_cache

_PROGRESS = "progress.pt"


class GromaTrainer(Trainer):
    """Trains a GromaForConditionalGeneration as a RunConfig says.

    ``args`` are ``groma.training.arguments.arguments(run, device)``, made before the model. ``samples`` are the batch
    keys of ``dataset``; ``collate`` makes a Batch of a list of examples; ``inputs`` turns a Batch into the model's
    keyword arguments; ``evaluate_with`` scores the model and returns named numbers.

    A model may report ``outputs.stats``: "tokens", the positions of the language model in use (words and features),
    and the "padding_share" of all its positions. Without it the text tokens of the batch are counted.
    """

    optimizer: Any
    control: Any

    def __init__(
        self,
        model: nn.Module,
        run: RunConfig,
        args: TrainingArguments,
        dataset: Dataset[Any],
        samples: BatchSampler,
        collate: Callable[[list[Any]], Batch],
        inputs: Callable[[Batch], dict[str, Any]],
        evaluate_with: Callable[[nn.Module], dict[str, float]] | None = None,
    ) -> None:
        self.run = run
        self.samples, self.inputs_of, self.evaluate_with = samples, inputs, evaluate_with
        self._frozen = freeze_all_but(model, run.model.train)
        self.proposals = open_cache(model, run)  # type: ignore[arg-type]
        # The library recomputes in layers in train mode alone; what lies in them keeps its own mode, dropout too.
        language = getattr(model, "llm", model) if run.optim.gradient_checkpointing else nn.Module()
        self._recomputed = [layer for layer in language.modules() if isinstance(layer, GradientCheckpointingLayer)]
        self._micro = (-1, 0)
        self.meter = Meter()
        self.guard = Guard(run.optim.max_nonfinite, args.device)
        super().__init__(model=model, args=args, train_dataset=dataset, data_collator=collate)
        self.model_accepts_loss_kwargs = False  # every loss is a mean of its batch: divide by the accumulation
        self._add_callbacks()

    def _add_callbacks(self) -> None:
        output = Path(self.run.output)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if self.evaluate_with is not None and self.run.evaluate.every:
            self.add_callback(EvaluateEvery(self.run.evaluate.every))
        self.add_callback(MetricsFile(output / "metrics.jsonl"))
        if self.run.log.tensorboard:
            self.add_callback(TensorBoard(output / "tensorboard"))
        self.bar = ProgressBar()
        self.add_callback(self.bar)

    # ---- data

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Not through accelerate: the batch sampler knows its processes, and the Trainer moves the batch itself."""
        rank, world = self.args.process_index, self.args.world_size
        return feed.loader(self.run, self.train_dataset, self.samples, self.data_collator, rank, world)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if "error" in inputs:
            raise TrainingError(f"step {self.state.global_step + 1}: {inputs['error']}")
        return {"batch": inputs["batch"].to(self.args.device)}

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated: the library's guess counts text tokens only."""
        return 0

    def steps(self) -> int:
        """How many optimiser steps the whole run has."""
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1] or 0)

    # ---- loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted sum of the named losses; one that is not finite is noted, and its step will be left out."""
        if self.run.model.eval_mode_frozen:
            for part in self._frozen:  # model.train() has just been called: dropout in a frozen proposer moves boxes
                part.eval()
            for layer in self._recomputed:
                layer.training = True
        batch: Batch = inputs["batch"]
        images = batch.images if self.proposals is not None and batch.ids is not None else ()
        cache = self.proposals if images else None
        extra: dict[str, Any] = {} if cache is None else {"candidates": cache.find(images)}
        if self.run.data.pack and batch.ids is not None:
            extra["pack"] = self.run.data.max_length
        with self._autocast():
            outputs = model(**self.inputs_of(batch), **extra, seed=self._seed())
        if cache is not None:
            cache.add(images, outputs.candidates)
        losses: dict[str, Tensor] = outputs.losses
        weights = self.run.optim.loss_weights
        unknown = set(weights) - set(losses) - set(self.meter.sums)
        if unknown and not self.meter.sums and len(self.run.data.sources) < 2:  # another source may have it
            raise TrainingError(f"optim.loss_weights names {sorted(unknown)}; this stage has {sorted(losses)}")
        loss = torch.stack([value.float() * weights.get(name, 1.0) for name, value in losses.items()]).sum()
        if bool(torch.isfinite(loss)):
            self.guard.saw(batch.records)
            self.meter.add({"loss": loss, **losses}, images=len(batch.pixels), **_work(outputs, batch))
        else:
            values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
            self.guard.saw(batch.records, f"the loss is not finite ({values})")
            loss = loss * torch.nan  # of an infinite loss some gradients are finite: none of them may count
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward; the library's own running loss is spared what is not finite."""
        return torch.nan_to_num(super().training_step(*args, **kwargs), 0.0, 0.0, 0.0)

    def _seed(self) -> int:
        """The seed of this batch's region order and box jitter: a function of run, step, process and micro-batch."""
        step = self.state.global_step
        self._micro = (step, self._micro[1] + 1 if self._micro[0] == step else 0)
        place = (step * self.args.gradient_accumulation_steps + self._micro[1]) * self.args.world_size
        return (self.run.seed * 1_000_003 + place + self.args.process_index) % 2**63

    def _autocast(self) -> Any:
        if self.run.optim.dtype == "bfloat16" and not self.is_deepspeed_enabled:
            return torch.autocast(self.args.device.type, dtype=torch.bfloat16)
        return nullcontext()

    # ---- optimiser

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the parameters that learn; see ``groma.training.parts.parameter_groups``."""
        if self.optimizer is None:
            optim = self.run.optim
            groups = parameter_groups(self.model, optim.lr, optim.weight_decay, self.run.model.lr_scale)
            self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, fused=True)
        return self.optimizer

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called before every update, on every process: where the step is to be left out, no gradient is left.

        DeepSpeed has updated by now; it leaves out by itself what has a gradient that is not finite.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        skipped = self.is_deepspeed_enabled and self.accelerator.optimizer_step_was_skipped
        finite = not skipped and (norm is None or bool(torch.isfinite(torch.as_tensor(norm))))
        step = self.state.global_step + 1
        trouble = self.guard.settle(step, finite)
        if trouble:
            model.zero_grad()  # AdamW passes over a parameter without gradient: no decay, no momentum
            if skipped:
                self.optimizer.optimizer.overflow = False  # or the library would hold back the schedule
            if self.is_world_process_zero():
                tell(f"step {step} left out ({self.guard.left_out} so far): {trouble}")
            self.log({"left_out": self.guard.left_out, "step": step, "reason": trouble})  # type: ignore[dict-item]
            norm = None
        if self.guard.stopping:
            self.control.should_save = self.control.should_training_stop = True
        return norm

    # ---- logs and scores

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Named losses, each the mean over the batches since the last log that had it, and the speed of the steps."""
        if "loss" in logs:
            logs.pop("loss")
            figures = self.meter.drain(self.args.device)
            logs = {"loss": figures.pop("loss", float("nan")), **figures, **logs}
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the model with ``evaluate_with``, leaving the random state as it was: on the first process, or on all
        of them, each the same, where each holds a share of the weights alone (ZeRO-3).
        """
        scores: dict[str, float] = {}
        started = time.perf_counter()
        if self.evaluate_with is not None and (self.is_world_process_zero() or self.shares_weights):
            cuda = [self.args.device] if self.args.device.type == "cuda" else []
            self.model.eval()
            with torch.random.fork_rng(devices=cuda), torch.no_grad(), self._autocast():
                scores = self.evaluate_with(self.model)
        self._wait()
        spent = time.perf_counter() - started
        self.meter.pause(spent)
        self.log({**scores, "seconds": spent})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, scores)
        return scores

    # ---- checkpoints

    @property
    def shares_weights(self) -> bool:
        """Whether a process holds a part of every weight only: ZeRO-3."""
        settings = self.args.hf_deepspeed_config.config if self.is_deepspeed_enabled else {}
        return bool(settings.get("zero_optimization", {}).get("stage") == 3)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output, step = Path(self.run.output), self.state.global_step
        folder = output / f".checkpoint-{step}"

        def write() -> None:
            if self.args.should_save:
                resume.record(self.run, len(self.samples), self.args.world_size, folder)
                if not self.is_deepspeed_enabled:
                    checkpoints.save_weights(self.model, folder, learnt_only=self.run.model.lora.rank > 0)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            skipped = [list(key) for key in getattr(self.train_dataset, "skipped", ())]
            progress = {"meter": self.meter.state(), "left_out": self.guard.left_out, "skipped": skipped}
            torch.save(progress, folder / f"{self.args.process_index}-{_PROGRESS}")

        def commit() -> None:
            for rank in range(self.args.world_size):
                if not (folder / f"{rank}-{_PROGRESS}").is_file():
                    raise OSError(f"nothing came from process {rank}: is output where all machines see it?")
            self.state.stateful_callbacks["TrainerControl"] = self.control.state()
            self.state.save_to_json(str(folder / "trainer_state.json"))
            checkpoints.commit(folder, self.run.save.keep)

        if self.args.should_save:
            self._to_disk(lambda: checkpoints.begin(output, step), folder)
        else:
            self._to_disk(lambda: None, folder)
        self._to_disk(write, folder)
        self._to_disk(commit if self.args.should_save else lambda: None, folder)

    def _to_disk(self, work: Callable[[], Any], folder: Path) -> None:
        """Run ``work`` on every process and wait for all; TrainingError on all of them where one could not write.

        torch reports a full disk as a RuntimeError, safetensors as its own. What was written of ``folder`` is removed,
        to make room.
        """
        why: str | None = None
        try:
            work()
        except (OSError, RuntimeError, SafetensorError) as error:
            why = " ".join(str(error).split())[:200]
        troubles: list[str | None] = [why]
        # DeepSpeed waits for all processes while it writes: one that failed there must end, and be missed by the rest.
        if self.args.world_size > 1 and not (why and self.is_deepspeed_enabled):
            troubles = [None] * self.args.world_size
            dist.all_gather_object(troubles, why)
        if any(troubles):
            shutil.rmtree(folder, ignore_errors=True)
            free = shutil.disk_usage(folder.parent).free / 1e9
            told = next(filter(None, troubles))
            raise TrainingError(f"{folder.parent}: {folder.name[1:]} could not be written ({told}; {free:.1f} GB free)")

    def restore(self, checkpoint: Path) -> None:
        """Put the weights of ``checkpoint`` into the model, of a run that has no step left."""
        if self.is_deepspeed_enabled:  # its engine alone can read its files
            self._prepare_for_training(self.steps(), self.get_train_dataloader(), str(checkpoint))
        else:
            checkpoints.load_weights(self.model, checkpoint)

    def save_final(self, folder: Path, beside: Callable[[Path], Any]) -> None:
        """Write the model so that ``from_pretrained`` reads it, and what ``beside`` writes; whole or not at all.

        Every process must call it.
        """
        state = self.accelerator.get_state_dict(self.model_wrapped) if self.is_deepspeed_enabled else None

        def write() -> None:
            self.model.eval()
            with checkpoints.whole(folder) as hidden:
                plain = self.accelerator.unwrap_model(self.model)
                plain.save_pretrained(hidden, state_dict=finish(plain, self.run, hidden, state))
                beside(hidden)

        self._to_disk(write if self.is_world_process_zero() else lambda: None, folder.with_name(f".{folder.name}"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoints.load_weights(self.model, Path(resume_from_checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        file = Path(checkpoint) / f"{self.args.process_index}-{_PROGRESS}"
        if file.is_file():
            progress = torch.load(file, map_location="cpu", weights_only=True)
            self.meter.restore(progress["meter"], self.args.device)
            self.guard.left_out = progress["left_out"]
            if remember := getattr(self.train_dataset, "remember", None):
                remember(progress["skipped"])

    def _wait(self) -> None:
        if self.args.world_size > 1:
            dist.barrier()


def _work(outputs: Any, batch: Batch) -> dict[str, Any]:
    """Tokens and positions of a batch in the language model, as it tells itself or as its text says."""
    stats = getattr(outputs, "stats", None)
    if stats:
        return {"tokens": stats["tokens"], "positions": stats["tokens"] / (1 - stats["padding_share"])}
    if batch.mask is None:
        return {}
    return {"tokens": batch.mask.sum(), "positions": batch.mask.numel()}
