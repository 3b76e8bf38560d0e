#!/usr/bin/env python
"""Measure how fast a Groma trains: tokens a second, packed rows against padded ones, in one run.

examples:
  tools/benchmark_training.py
  tools/benchmark_training.py --config small --batches 8 --batch-size 16 --count
  tools/benchmark_training.py --config 7b --count                                # stage 2, on a GPU
  tools/benchmark_training.py --config 7b --stage 3 --lora 64 --checkpointing --count
  tools/benchmark_training.py --config 7b --stage 3 --checkpointing --batch-size 4 --count

Weights are random, and so are pictures and words; how long questions and answers are is like in the stage-2 sets.
"small" is a language model for a CPU with the real numbers of image tokens and regions; "mid" and "7b" are those of
tools/benchmark.py. Stage 2 trains the token MLP, the region encoder and the new words, stage 3 those and the language
model, or adapters on it with --lora. --count also counts operations, for the share of what matrix products reach.
docs/benchmarks.md explains every figure. Exit status: 0 done, 2 a mistake in the call.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from groma import cli

STAGE2 = ["regions", "bridge", "vocabulary"]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; leaves with status 2 and one line if it is wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--config", choices=("small", "mid", "7b"), default="small", help="default: %(default)s")
    parser.add_argument("--stage", type=int, choices=(2, 3), default=2, help="default: %(default)s")
    parser.add_argument("--lora", metavar="RANK", type=cli.at_least_one, help="stage 3: adapters of this rank")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--batches", metavar="N", type=cli.at_least_one, default=8, help="default: %(default)s")
    parser.add_argument("--batch-size", metavar="B", type=cli.at_least_one, default=16, help="default: %(default)s")
    parser.add_argument("--max-length", metavar="L", type=cli.at_least_one, default=2048,
                        help="of a packed row (default: %(default)s)")  # fmt: skip
    parser.add_argument("--repeat", metavar="R", type=cli.at_least_one, default=3, help="turns (default: %(default)s)")
    parser.add_argument("--count", action="store_true", help="also the share of peak")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="of the arithmetic (default: bfloat16 on a GPU)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    args = parser.parse_args(arguments)
    if args.lora and args.stage == 2:
        parser.error("--lora puts adapters on a language model that learns: give --stage 3")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Measure once; returns the exit status."""
    args = parse(arguments)
    with cli.user_errors():
        from tqdm import tqdm

        from groma.evaluation import training_speed

        model, processor, autocast = prepared(args)
        rows = training_speed.batches(processor, args.batches, args.batch_size)
        with tqdm(total=2 * (args.repeat + 1) + args.count, desc="training", disable=args.quiet) as bar:
            report = training_speed.measure(
                model, processor, rows, args.max_length, args.repeat, autocast, args.count, bar.update
            )
    report = {"config": args.config, "stage": args.stage, "lora": args.lora or 0} | report
    print(json.dumps(report) if args.json else training_speed.table(report))
    return cli.FOUND


def prepared(args: argparse.Namespace) -> tuple[Any, Any, bool]:
    """The model as a run would train it, its processor, and whether arithmetic is in bfloat16."""
    from groma.evaluation.random_weights import random_groma
    from groma.evaluation.training_speed import small_model
    from groma.loading import pick_device
    from groma.settings import LoraConfig, ModelConfig, RunConfig
    from groma.training.parts import freeze_all_but
    from groma.training.preparing import prepare

    device = pick_device(args.device)
    autocast = args.dtype == "bfloat16" or (args.dtype == "auto" and device.type == "cuda")
    if args.config == "small":
        model, processor = small_model()
        model.to(device)
    else:
        groma = random_groma(args.config, device, "bfloat16" if autocast else "float32")
        model, processor = groma.model, groma.processor
    train = STAGE2 + (["llm"] if args.stage == 3 else [])
    for name in train:
        part = getattr(model, name).requires_grad_(True)
        if not (name == "llm" and args.lora):
            part.float()
    run = RunConfig(stage="alignment", output="", model=ModelConfig(
        train=train, frozen_dtype="bfloat16" if autocast else "float32", lora=LoraConfig(rank=args.lora or 0)
    ))  # fmt: skip
    prepare(model, run)
    model.train()
    for part in freeze_all_but(model, train):
        part.eval()
    if args.checkpointing:
        model.gradient_checkpointing_enable()
    return model, processor, autocast


if __name__ == "__main__":
    sys.exit(main())
