"""How fast a model trains on dialogues: tokens a second of packed rows against padded ones, and the share of the peak.

Batches are made up: pictures of noise, dialogues of random words whose lengths are like those of the stage-2 sets, and
as in a run every batch is of one set. Both ways train on the same batches and take turns, so that a machine that does
other things moves both alike; a gain is taken within a turn. Tokens are positions of the language model with a word or
a feature in them, never padding.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from groma.data.prompts import IGNORE, join, opening_prompt
from groma.evaluation.flops import FORMULAS, gemm_peak, now
from groma.evaluation.random_weights import processor_of
from groma.model.configuration import GromaConfig
from groma.model.groma import GromaForConditionalGeneration
from groma.processor import GromaProcessor
from groma.structures import Prompt

SMALL: dict[str, Any] = {
    "encoder": {"model_type": "dinov2", "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2,
                "image_size": 448, "patch_size": 14},
    "proposer": {"width": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_heads": 4, "decoder_heads": 4,
                 "encoder_ffn": 128, "decoder_ffn": 128},
    "llm": {"model_type": "llama", "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6,
            "num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 4096},
    "image_size": 448, "base_vocab": 800, "region_width": 32, "region_rounds": 1, "region_groups": 4,
    "region_size": 4, "region_hidden": 64, "region_box_hidden": 32,
}  # fmt: skip
"""Settings of GromaConfig: the real numbers of image tokens and regions around a small language model, for a CPU."""


@dataclass(frozen=True)
class Lengths:
    """One set: its share of the records of an epoch, words of a question and median words of an answer, in tokens,
    and the spread of the answers (of the logarithm: 0.3 puts two thirds within a third of the median)."""

    name: str
    share: float
    question: int
    answer: float
    spread: float


STAGE2 = (
    Lengths("ShareGPT4V-PT", 0.26, 14, 190, 0.30),
    Lengths("GRIT", 0.43, 16, 36, 0.45),
    Lengths("Visual Genome", 0.15, 24, 9, 0.40),
    Lengths("RefCOCO/+/g", 0.07, 18, 5, 0.0),
    Lengths("Flickr30k", 0.04, 16, 44, 0.35),
    Lengths("COCO", 0.03, 40, 24, 0.60),
    Lengths("RefCOCOg captions", 0.02, 24, 12, 0.35),
)
"""Rounded, and assumed rather than counted: what the sets' own texts come to, with the marks of grounding."""


@dataclass(frozen=True)
class Pass:
    """One way through all batches: seconds, tokens, and positions of the language model, padding included."""

    seconds: float
    tokens: int
    positions: int


def small_model() -> tuple[GromaForConditionalGeneration, GromaProcessor]:
    """A random model of SMALL that keeps 100 regions of every picture; groma.evaluation.random_weights has others."""
    processor = processor_of(SMALL["base_vocab"], SMALL["image_size"])
    config = GromaConfig(
        **SMALL | {"llm": SMALL["llm"] | {"vocab_size": SMALL["base_vocab"]}}, score_threshold=0.0, nms_threshold=1.0,
        new_token_ids=dict(processor.tokenizer.get_vocab()),
    )  # fmt: skip
    return GromaForConditionalGeneration(config), processor


def batches(processor: GromaProcessor, count: int, size: int, seed: int = 0, sets: Sequence[Lengths] = STAGE2
            ) -> list[list[Prompt]]:  # fmt: skip
    """``count`` batches of ``size`` dialogues: a question and an answer of one of ``sets`` after the opening."""
    draw = random.Random(seed)
    opening, words = opening_prompt(processor), min(500, len(processor.tokenizer) // 2)
    rows = []
    for _ in range(count):
        [kind] = draw.choices(sets, [s.share for s in sets])
        rows.append([_dialogue(opening, kind, words, draw) for _ in range(size)])
    return rows


def _dialogue(opening: Prompt, kind: Lengths, words: int, draw: random.Random) -> Prompt:
    answer = max(2, round(math.exp(draw.gauss(math.log(kind.answer), kind.spread))))
    ids = torch.tensor([draw.randrange(3, words) for _ in range(kind.question + answer)])
    labels = ids.clone()
    labels[: kind.question] = IGNORE
    return join(opening, Prompt(ids, labels, torch.zeros(0, 4), torch.zeros(0, 4)))


def measure(model: GromaForConditionalGeneration, processor: GromaProcessor, rows: list[list[Prompt]], limit: int,
            repeat: int = 3, autocast: bool = False, count: bool = False, advance: Callable[[], None] = lambda: None
            ) -> dict[str, Any]:  # fmt: skip
    """Train on ``rows`` in ``repeat`` turns of both ways → the report, plain JSON values; see docs/benchmarks.md.

    The parts that learn are those that require gradients. limit: the longest packed row; autocast: compute in bfloat16;
    count: also count a model's operations and measure matrix products, for the share of peak. ``advance`` is called
    after every pass: 2 * (repeat + 1) + count times.
    """
    device = next(model.parameters()).device
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-6, fused=True)
    steps = [_inputs(model, processor, prompts, seed) for seed, prompts in enumerate(rows)]
    ways = {"padded": 0, "packed": limit}
    passes: dict[str, list[Pass]] = {name: [] for name in ways}
    for turn in range(repeat + 1):
        for name, pack in ways.items():
            done = _train(model, optimizer, steps, pack, autocast)
            if turn:  # the first is a warm-up
                passes[name].append(done)
            advance()
    gains = [p.seconds / q.seconds for p, q in zip(passes["padded"], passes["packed"], strict=True)]
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "batches": len(rows),
        "batch_size": len(rows[0]), "max_length": limit, "turns": repeat, "autocast": autocast,
        "parameters": sum(p.numel() for p in model.parameters()), "learning": sum(p.numel() for p in learning),
        "ways": {name: _way(some) for name, some in passes.items()},
        "gain": {k: round(f(gains), 3) for k, f in (("median", statistics.median), ("low", min), ("high", max))},
        "peak_memory_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 1) if device.type == "cuda" else None,
    }  # fmt: skip
    if count:
        work = _operations(model, processor, rows, autocast)
        optimizer.zero_grad(set_to_none=True)
        peak = gemm_peak(torch.bfloat16 if autocast else torch.float32, device)
        report |= {"tflop_an_epoch": round(work / 1e12, 3), "gemm_peak_tflops": round(peak / 1e12, 3)}
        for name, some in passes.items():
            rate = work / statistics.median([p.seconds for p in some])
            report["ways"][name] |= {"model_tflops": round(rate / 1e12, 3), "utilisation": round(rate / peak, 4)}
        advance()
    return report


def _inputs(model: nn.Module, processor: GromaProcessor, prompts: Sequence[Prompt], seed: int) -> dict[str, Any]:
    """A training step's arguments: dialogues padded, and a picture of noise for each."""
    device = next(model.parameters()).device
    ids, mask = processor.pad([prompt.ids for prompt in prompts])
    labels = torch.nn.utils.rnn.pad_sequence([p.labels for p in prompts], batch_first=True, padding_value=IGNORE)
    side = processor.image_processor.size["height"]
    pixels = torch.randn(len(prompts), 3, side, side, generator=torch.Generator().manual_seed(seed))
    given = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: value.to(device) for name, value in given.items()} | {"seed": seed}


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Sequence[dict[str, Any]], pack: int,
           autocast: bool) -> Pass:  # fmt: skip
    """One step of the optimiser on every batch."""
    device = steps[0]["pixel_values"].device
    tokens = positions = 0
    start = now(device)
    for given in steps:
        with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
            out = model(**given, pack=pack)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens, positions = tokens + out.stats["tokens"], positions + out.stats["positions"]
    return Pass(now(device) - start, int(tokens), int(positions))


def _way(passes: Sequence[Pass]) -> dict[str, float]:
    speed = [p.tokens / p.seconds for p in passes]
    one = passes[0]
    return {
        "tokens_per_second": round(statistics.median(speed), 1), "low": round(min(speed), 1),
        "high": round(max(speed), 1), "tokens": one.tokens, "positions": one.positions,
        "padding_share": round(1 - one.tokens / one.positions, 4),
    }  # fmt: skip


def _operations(model: GromaForConditionalGeneration, processor: GromaProcessor, rows: list[list[Prompt]],
                autocast: bool) -> int:  # fmt: skip
    """Operations of training on every dialogue by itself: forward and backward, nothing padded or run twice."""
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if checkpointing:
        model.gradient_checkpointing_disable()
    total, seen = 0, {}
    for prompt in (prompt for prompts in rows for prompt in prompts):
        length = len(prompt.ids), int((prompt.labels != IGNORE).sum())
        if length not in seen:
            given = _inputs(model, processor, [prompt], 0)
            device = given["pixel_values"].device
            with FlopCounterMode(display=False, custom_mapping=FORMULAS | BACKWARD) as counted:
                with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
                    loss = model(**given).loss
                loss.backward()
            seen[length] = counted.get_total_flops()
        total += seen[length]
    if checkpointing:
        model.gradient_checkpointing_enable()
    return total


def _attention_backward(_grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Five products where the forward pass has two."""
    forward: Any = FORMULAS[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu]
    return int(forward(query, key, value) * 5 // 2)


BACKWARD = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward}


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    ways, gain, counted = report["ways"], report["gain"], "gemm_peak_tflops" in report
    lines = [
        f"{report['parameters'] / 1e6:,.0f} M parameters, {report['learning'] / 1e6:,.1f} M learn; {report['device']}, "
        f"{report['threads']} threads, torch {report['torch']}{', bfloat16' if report['autocast'] else ''}",
        f"{report['batches']} batches of {report['batch_size']} dialogues, rows of at most {report['max_length']}, "
        f"{report['turns']} turns",
        "",
        f"{'':<8} {'tokens/s':>10} {'range':>21} {'padding':>8} {'TFLOP/s':>9} {'of peak':>8}"[: 71 if counted else 51],
    ]  # fmt: skip
    for name, way in ways.items():
        span = f"{way['low']:,.0f}–{way['high']:,.0f}"
        line = f"{name:<8} {way['tokens_per_second']:>10,.0f} {span:>21} {way['padding_share']:>8.1%}"
        lines.append(line + (f" {way['model_tflops']:>9,.2f} {way['utilisation']:>8.1%}" if counted else ""))
    lines.append(f"packed over padded: {gain['median']:.2f}x ({gain['low']:.2f}–{gain['high']:.2f})")
    if report["peak_memory_gb"] is not None:
        lines.append(f"peak memory: {report['peak_memory_gb']} GB")
    return "\n".join(lines)
