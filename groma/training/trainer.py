"""transformers' Trainer for Groma: named losses, frozen parts, exact resume.

Everything a Trainer does stays (accumulation, DDP under torchrun, DeepSpeed); what changes is how a batch reaches the
model, what is logged, how the optimiser is grouped, and how a checkpoint is written and read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from groma.settings import RunConfig
from groma.structures import Batch
from groma.training import checkpoints
from groma.training.callbacks import EvaluateEvery, MetricsFile, ProgressBar, TensorBoard
from groma.training.parts import TrainingError, freeze_all_but, parameter_groups

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
_PROGRESS = "progress.pt"


class BatchSampler(Protocol):
    """Lists of record keys, one list a batch; the same epoch always gives the same lists."""

    def __iter__(self) -> Iterator[list[Any]]: ...
    def __len__(self) -> int: ...
    def set_epoch(self, epoch: int) -> None: ...


class RankShare(Sampler[list[Any]]):
    """The batches of one process: every ``world``-th of ``batches``, the same number for each process."""

    def __init__(self, batches: BatchSampler, rank: int, world: int) -> None:
        self.batches, self.rank, self.world = batches, rank, world

    def __len__(self) -> int:
        return len(self.batches) // self.world

    def __iter__(self) -> Iterator[list[Any]]:
        for index, batch in enumerate(self.batches):
            if index // self.world < len(self) and index % self.world == self.rank:
                yield batch

    def set_epoch(self, epoch: int) -> None:
        self.batches.set_epoch(epoch)


class EpochLoader(DataLoader[Any]):
    """A data loader whose batch sampler hears about the epoch, as the Trainer announces it."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class GromaTrainer(Trainer):
    """Trains a GromaForConditionalGeneration as a RunConfig says.

    ``samples`` are the batch keys of ``dataset``; ``collate`` makes a Batch of a list of examples; ``inputs`` turns a
    Batch into the model's keyword arguments; ``evaluate_with`` scores the model and returns named numbers.
    """

    optimizer: Any
    control: Any

    def __init__(
        self,
        model: nn.Module,
        run: RunConfig,
        dataset: Dataset[Any],
        samples: BatchSampler,
        collate: Callable[[list[Any]], Batch],
        inputs: Callable[[Batch], dict[str, Any]],
        evaluate_with: Callable[[nn.Module], dict[str, float]] | None = None,
        device: str = "auto",
    ) -> None:
        self.run = run
        self.samples, self.inputs_of, self.evaluate_with = samples, inputs, evaluate_with
        self._frozen = freeze_all_but(model, run.model.train)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._images = 0
        self._micro = (-1, 0)
        self._clock = time.perf_counter()
        super().__init__(
            model=model,
            args=_arguments(run, device),
            train_dataset=_Fetch(dataset),
            data_collator=_Collate(collate),
        )
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
        workers = self.run.data.workers
        return EpochLoader(
            self.train_dataset,
            batch_sampler=RankShare(self.samples, self.args.process_index, self.args.world_size),
            collate_fn=self.data_collator,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=self.run.data.prefetch if workers else None,
            # Its own generator: drawing the workers' seeds must not move the global random state.
            generator=torch.Generator().manual_seed(self.run.seed),
        )

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
        """The weighted sum of the named losses; raises TrainingError when it is not finite."""
        if self.run.model.eval_mode_frozen:
            for part in self._frozen:  # model.train() has just been called: dropout in a frozen proposer moves boxes
                part.eval()
        batch: Batch = inputs["batch"]
        with self._autocast():
            outputs = model(**self.inputs_of(batch), seed=self._seed())
        losses: dict[str, Tensor] = outputs.losses
        weights = self.run.optim.loss_weights
        unknown = set(weights) - set(losses) - set(self._sums)
        if unknown and not self._sums:
            raise TrainingError(f"optim.loss_weights names {sorted(unknown)}; this stage has {sorted(losses)}")
        loss = torch.stack([value.float() * weights.get(name, 1.0) for name, value in losses.items()]).sum()
        if not bool(torch.isfinite(loss)):
            values = ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
            records = ", ".join(batch.records[:8]) or "unnamed records"
            raise TrainingError(f"step {self.state.global_step + 1}: the loss is not finite ({values}) on {records}")
        self._note({"loss": loss, **losses}, len(batch.pixels))
        return (loss, outputs) if return_outputs else loss

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

    def _note(self, losses: dict[str, Tensor], images: int) -> None:
        """Add to the running means, without waiting for the device."""
        for name, value in losses.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if self._counts.get(name) else value
            self._counts[name] = self._counts.get(name, 0) + 1
        self._images += images

    # ---- optimiser

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the parameters that learn; see ``groma.training.parts.parameter_groups``."""
        if self.optimizer is None:
            optim = self.run.optim
            groups = parameter_groups(self.model, optim.lr, optim.weight_decay, self.run.model.lr_scale)
            self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, fused=True)
        return self.optimizer

    # ---- logs and scores

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Named losses, each the mean over the batches since the last log that had it; images a second."""
        if "loss" in logs:
            logs.pop("loss")
            means, images, seconds = self._drain()
            logs = {**means, **logs, "images_per_second": images / seconds, "seconds": seconds}
        super().log(logs, start_time)

    def _drain(self) -> tuple[dict[str, float], int, float]:
        now = time.perf_counter()
        mine = ({name: (self._sums[name].item(), count) for name, count in self._counts.items() if count}, self._images)
        gathered: list[Any] = [mine]
        if self.args.world_size > 1:
            gathered = [None] * self.args.world_size
            dist.all_gather_object(gathered, mine)
        means = {}
        for name in sorted({name for sums, _ in gathered for name in sums}, key=lambda name: (name != "loss", name)):
            parts = [sums[name] for sums, _ in gathered if name in sums]
            means[name] = sum(total for total, _ in parts) / sum(count for _, count in parts)
        seconds = now - self._clock
        self._counts, self._images, self._clock = dict.fromkeys(self._counts, 0), 0, now
        return means, sum(images for _, images in gathered), seconds

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score the model with ``evaluate_with``, on the first process, leaving the random state as it was."""
        scores: dict[str, float] = {}
        started = time.perf_counter()
        if self.evaluate_with is not None and self.is_world_process_zero():
            cuda = [self.args.device] if self.args.device.type == "cuda" else []
            self.model.eval()
            with torch.random.fork_rng(devices=cuda), torch.no_grad(), self._autocast():
                scores = self.evaluate_with(self.model)
        if self.args.world_size > 1:
            dist.barrier()
        spent = time.perf_counter() - started
        self._clock += spent  # images a second are of training alone
        self.log({**scores, "seconds": spent})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, scores)
        return scores

    # ---- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.run.output) / f".checkpoint-{self.state.global_step}"
        if self.args.should_save:
            folder = checkpoints.begin(Path(self.run.output), self.state.global_step)
        self._wait()
        if self.args.should_save and not self.is_deepspeed_enabled:
            checkpoints.save_weights(self.model, folder)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        progress = {"sums": self._sums, "counts": self._counts, "images": self._images}
        torch.save(progress, folder / f"{self.args.process_index}-{_PROGRESS}")
        self._wait()
        if self.args.should_save:
            self.state.stateful_callbacks["TrainerControl"] = self.control.state()
            self.state.save_to_json(str(folder / "trainer_state.json"))
            checkpoints.commit(folder, self.run.save.keep)
        self._wait()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoints.load_weights(self.model, Path(resume_from_checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        file = Path(checkpoint) / f"{self.args.process_index}-{_PROGRESS}"
        if file.is_file():
            progress = torch.load(file, map_location="cpu", weights_only=True)
            self._sums = {name: value.to(self.args.device) for name, value in progress["sums"].items()}
            self._counts, self._images = progress["counts"], progress["images"]

    def _wait(self) -> None:
        if self.args.world_size > 1:
            dist.barrier()


class _Fetch(Dataset[Any]):
    """A dataset whose bad records come as values: an error raised in a worker process would arrive as a traceback."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except ValueError as error:
            return error


class _Collate:
    """Collates to a mapping, which the Trainer passes on as it is: {"batch": Batch}, or {"error": one line}."""

    def __init__(self, collate: Callable[[list[Any]], Batch]) -> None:
        self.collate = collate

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        for example in examples:
            if isinstance(example, ValueError):
                return {"error": str(example)}
        try:
            return {"batch": self.collate(examples)}
        except ValueError as error:
            return {"error": str(error)}


def _arguments(run: RunConfig, device: str) -> TrainingArguments:
    """The Trainer's arguments that a RunConfig stands for."""
    optim = run.optim
    return TrainingArguments(
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
        bf16=optim.dtype == "bfloat16" and optim.deepspeed is not None,
        deepspeed=optim.deepspeed,
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
