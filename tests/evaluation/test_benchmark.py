"""The benchmark: random models, both ways of answering, where the time goes, sums, and sides in their processes."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch

from groma.evaluation import benchmark, naive, quantise, side
from groma.evaluation.flops import counter
from groma.evaluation.random_weights import LOUD, SIZES, processor_of, random_groma
from groma.evaluation.side import Job, Loaded, Pass, Side, Worker, high_water, serve
from groma.evaluation.stopwatch import PARTS, Lap, Stopwatch
from groma.loading import EMBEDDED, pick_dtype
from groma.model.configuration import GromaConfig
from groma.predictor import Groma

pytestmark = pytest.mark.usefixtures("quiet_torch")
CPU = torch.device("cpu")
TABLE = str(EMBEDDED / "table.jpg")
TEXTS = benchmark.expressions(3)


@pytest.fixture(scope="module")
def groma() -> Groma:
    return random_groma("tiny", CPU, "float32")


# -- random models ----------------------------------------------------------------------------------------------------


def test_a_random_model_answers_as_a_trained_one(groma: Groma, pictures: Path) -> None:
    config = groma.model.config
    for image in (TABLE, pictures / "images" / "1.png", pictures / "images" / "2.png"):
        view = groma.look(image)
        assert len(view.proposals) == config.max_regions == 10
        for answer in groma.refer_many(view, TEXTS):
            assert answer.found and len(answer.regions) == 1
            assert answer.presence == pytest.approx(1, abs=1e-3)
    weights = dict(groma.model.named_parameters())
    assert all(p.isfinite().all() for p in weights.values())
    matrix = weights["llm.model.layers.1.mlp.down_proj.weight"]  # (64, 96): no row repeats, deviation 1/sqrt(96)
    assert len(matrix.unique(dim=0)) == 64
    assert matrix.std() == pytest.approx(96**-0.5, rel=0.1)
    assert weights["llm.model.embed_tokens.weight"].abs().max() == LOUD


def test_a_random_model_is_made_in_its_number_format(groma: Groma) -> None:
    half, other = (random_groma("tiny", CPU, "bfloat16", seed) for seed in (0, 1))
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert torch.equal(half.model.llm.model.rotary_emb.inv_freq, groma.model.llm.model.rotary_emb.inv_freq)
    for rounded, exact in zip(half.model.parameters(), groma.model.parameters(), strict=True):
        assert torch.allclose(rounded.float(), exact, rtol=2**-6)
    assert not torch.equal(half.model.llm.lm_head.weight, other.model.llm.lm_head.weight)


def test_a_processor_of_any_vocabulary() -> None:
    processor = processor_of(32000, 448)
    text = "Locate <p>the red cup</p> in the image: <roi><r99></roi>"
    assert processor.decode(processor.encode(text)) == text
    assert processor.word_id("<r99>") == len(processor.tokenizer) - 1 == 32000 + 117 - 4 - 1  # 4 it has already


def test_sizes_are_those_of_the_released_model() -> None:
    config = GromaConfig(**SIZES["mid"])
    assert (config.encoder.hidden_size, config.llm.num_hidden_layers, config.llm.hidden_size) == (768, 2, 4096)
    assert (config.proposer.width, config.proposer.queries, config.max_regions) == (256, 300, 100)
    with pytest.raises(ValueError, match="got 'huge', expected one of tiny, mid, 7b"):
        random_groma("huge", CPU)


@pytest.mark.parametrize("able, width, kind", [
    ({"avx512_bf16": True}, 4096, torch.bfloat16), ({"amx_bf16": True}, 1024, torch.bfloat16),
    ({"avx512_bf16": True}, 768, torch.float32), ({"avx512_f": True, "avx512_bf16": False}, 4096, torch.float32),
])  # fmt: skip
def test_auto_is_bfloat16_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, able: dict[str, bool], width: int, kind: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert pick_dtype("auto", CPU, width) == kind
    assert pick_dtype("float32", CPU, width) == torch.float32
    assert pick_dtype("auto", torch.device("cuda"), 64) == torch.bfloat16
    assert pick_dtype("auto", torch.device("mps"), 4096) == torch.float32
    with pytest.raises(ValueError, match="got 'int3', expected auto or one of float32"):
        pick_dtype("int3", CPU, width)


# -- two ways of answering --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_naive_way_gives_our_answers(seed: int) -> None:
    groma = random_groma("tiny", CPU, "float32", seed)
    ours = groma.refer_many(groma.look(TABLE), TEXTS)
    for text, answer in zip(TEXTS, ours, strict=True):
        [box] = naive.answer(groma, TABLE, text)
        assert box == pytest.approx(answer.boxes[0], abs=1e-3)


def test_the_naive_way_recomputes_everything(groma: Groma) -> None:
    rows: list[int] = []
    handle = groma.model.vocabulary.head.register_forward_hook(lambda m, given, out: rows.append(out.shape[1]))
    with Stopwatch(groma.model) as watch:
        for text in TEXTS:
            naive.answer(groma, TABLE, text)
    handle.remove()
    once = ["encoder", "proposer", "selection", "regions", "tokens", "prefill", "token", "token"]
    assert [lap.part for lap in watch.laps] == once * 3
    prefill = [lap.positions for lap in watch.laps if lap.part == "prefill"]
    assert rows == [n for length in prefill for n in (length, 1, 1)], "logits of every position of the prompt"


def test_ours_looks_once(groma: Groma) -> None:
    with torch.inference_mode(), counter() as counting, Stopwatch(groma.model, counting) as watch:
        groma.refer_many(groma.look(TABLE), TEXTS)
    assert [lap.part for lap in watch.laps] == list(PARTS)
    assert all(lap.seconds > 0 and (lap.flops > 0 or lap.part == "selection") for lap in watch.laps)
    with torch.inference_mode(), counter() as alone:
        groma.model.encoder(torch.zeros(1, 3, 64, 64))
    assert watch.laps[0].flops == alone.get_total_flops()
    assert sum(lap.flops for lap in watch.laps) == counting.get_total_flops()


def test_a_stopwatch_leaves_nothing_behind(groma: Groma) -> None:
    with pytest.raises(ValueError, match="empty expression"), Stopwatch(groma.model) as watch:
        groma.refer(groma.look(TABLE), " ")
    laps = len(watch.laps)
    groma.look(TABLE)
    assert len(watch.laps) == laps == 6
    assert "speak" not in vars(groma.model)


# -- sums and sides ---------------------------------------------------------------------------------------------------


class Scripted:
    """A worker whose passes are written here: ours 1 s and 2 s, the naive side 4 s a question and slower by turns."""

    def __init__(self, job: Job) -> None:
        self.job, self.turns, self.orders = job, 0, []  # type: ignore[var-annotated]
        made.append(self)

    def ask(self, order: str, *arguments: Any) -> Any:
        self.orders.append((order, *arguments))
        return getattr(self, order)(*arguments)

    def loaded(self) -> Loaded:
        return Loaded(0.5, 4 << 20 if self.job.naive else 2 << 20, self.job.dtype, "cpu", 2)

    def answer(self, count: int, counted: bool = False) -> Pass:
        box = (0.0, 0.0, 10.0, 10.0)
        if counted:
            laps = (Lap("encoder", 9.0, int(6e9)), Lap("prefill", 9.0, int(8e9), 519))
            return Pass(9.0, (), laps, (), 0)
        if self.job.naive:
            self.turns += 1
            each = (3.0 + self.turns, 4.0, 10.0)
            return Pass(sum(each), each, (Lap("encoder", 3.0, 0),) * 3, ((box,), (), (box,)), 0)
        laps = (Lap("encoder", 0.25, 0), Lap("prefill", 0.5, 0, 519))
        return Pass(1.0 if count == 1 else 2.0, (), laps, ((box,), (box,), ((1.0, 0.0, 10.0, 10.0),))[:count], 100)

    def peak(self) -> int:
        return 10 << 20 if self.job.naive else 6 << 20

    def gemm_peak(self) -> float:
        return 48e9

    def close(self) -> None:
        self.orders.append("close")


made: list[Scripted] = []


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Scripted]]:
    monkeypatch.setattr(benchmark, "Worker", Scripted)
    yield made
    made.clear()


def test_gains_are_taken_within_a_turn(scripted: list[Scripted]) -> None:
    advanced: list[int] = []
    report = benchmark.measure(Job(TABLE, TEXTS, config="mid", dtype="bfloat16"), 2, against_naive=True,
                               advance=lambda: advanced.append(1))  # fmt: skip
    # one expression: the median naive question, 4 s then 5 s, over 1 s; three: 18 s then 19 s over 2 s
    assert report["gain"] == {
        "one": {"median": 4.5, "low": 4.0, "high": 5.0}, "many": {"median": 9.25, "low": 9.0, "high": 9.5},
        "peak_share": 0.6, "same_answers": 2,
    }  # fmt: skip
    ours, other = report["sides"]["ours"], report["sides"]["naive"]
    assert (ours["weights_mib"], ours["peak_mib"], ours["load_ms"], ours["dtype"]) == (2, 6, 500, "bfloat16")
    assert ours["parts"]["prefill"] == {
        "runs": 1, "ms": {"median": 500, "low": 500, "high": 500}, "gflop": 8, "gflops": 16, "of_peak": 0.333,
    }  # fmt: skip
    assert ours["parts"]["rest"]["ms"]["median"] == 1250  # 2 s without 0.25 s and 0.5 s
    assert other["parts"]["encoder"]["runs"] == 1, "per question"
    assert other["parts"]["rest"]["ms"] == {"median": 3166.67, "low": 3000, "high": 3333.33}
    assert (report["regions"], report["prefix_tokens"], report["expressions"]) == (100, 519, 3)
    assert [worker.job.naive for worker in scripted] == [False, True]
    assert scripted[1].job.dtype == "float32"
    assert [worker.orders[-1] for worker in scripted] == ["close", "close"]
    assert len(advanced) == benchmark.steps(2, True, True)
    shown = benchmark.table(report)
    for line in ("one expression, ms", "1,000.0 (1,000.0–1,000.0)", "4.5x (4.0–5.0)", "0.60 of it",
                 "the same answers: 2 of 3", "mid, random weights; cpu"):  # fmt: skip
        assert line in shown


def test_ours_alone_without_parts(scripted: list[Scripted]) -> None:
    report = benchmark.measure(Job(TABLE, TEXTS[:1]), 2, parts=False)
    assert report["gain"] is None
    assert list(report["sides"]) == ["ours"]
    assert report["sides"]["ours"]["one_ms"] == report["sides"]["ours"]["many_ms"]
    assert ("gemm_peak",) not in scripted[0].orders
    assert ("answer", 1, False) in scripted[0].orders, "the warm-up does not count"
    assert "gain" not in benchmark.table(report)


B = (0.0, 0.0, 10.0, 10.0)


@pytest.mark.parametrize("one, other, expected", [
    ((), (), True), ((B,), (), False), ((B,), (B, B), False), ((B,), ((0.0, 0.0, 10.0, 6.0),), True),
    ((B,), ((0.0, 0.0, 10.0, 5.0),), False),  # an IoU of exactly one half is not above it
    ((B, (20.0, 0.0, 30.0, 10.0)), ((20.0, 0.0, 30.0, 10.0), B), True), ((B, (20.0, 0.0, 30.0, 10.0)), (B, B), False),
    ((B, B), (B, (20.0, 0.0, 30.0, 10.0)), False),
])  # fmt: skip
def test_same_answers(one: tuple[side.Box, ...], other: tuple[side.Box, ...], expected: bool) -> None:
    assert benchmark.same(one, other) is expected


def test_expressions_are_different_and_always_the_same() -> None:
    assert len(set(benchmark.expressions(72))) == 108 - 36
    assert benchmark.expressions(120)[108:] == benchmark.expressions(12)
    assert benchmark.expressions(2) == ("the red cup", "the large red cup")
    assert {len(text.split()) for text in benchmark.expressions(108)} == set(range(3, 9))


def test_a_side_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    class Here(Side):
        def ask(self, order: str, *arguments: Any) -> Any:
            return getattr(self, order)(*arguments)

        def gemm_peak(self) -> float:
            return 1e12

        def close(self) -> None:
            pass

    monkeypatch.setattr(benchmark, "Worker", Here)
    job = Job(TABLE, TEXTS, config="tiny", dtype="float32", device="cpu")
    report = json.loads(json.dumps(benchmark.measure(job, 1, against_naive=True)))
    assert report["gain"]["same_answers"] == 3
    assert list(report["sides"]["ours"]["parts"]) == [*PARTS, "rest"]
    assert {"encoder", "prefill", "token"} <= set(report["sides"]["naive"]["parts"])
    for figures in report["sides"].values():
        assert figures["weights_mib"] == pytest.approx(567_217 * 4 / 2**20, rel=0.02)
        assert figures["peak_mib"] > 50
        assert all(math.isfinite(row["gflop"]) for row in figures["parts"].values())
    assert report["prefix_tokens"] > 64 / 8 * 64 / 8 / 4 + 2 * report["regions"]


def test_the_high_water_mark() -> None:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert 50 << 20 < high_water() <= most * 1.01


def test_a_side_tells_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side.signal, "signal", lambda *_: None)  # this process still minds Ctrl-C
    here, there = Pipe()
    serve(Job(TABLE, TEXTS, config="huge"), there)
    assert here.poll(1)
    error = here.recv()
    assert isinstance(error, ValueError)
    assert "got 'huge'" in str(error)


def test_a_side_that_dies_is_told() -> None:
    worker = Worker(Job(TABLE, TEXTS, config="tiny"))
    worker._process.kill()
    with pytest.raises(ChildProcessError, match="the measured side was killed, perhaps for want of memory"):
        worker.ask("loaded")
    worker.close()


# -- quantisation -----------------------------------------------------------------------------------------------------


def test_only_the_language_models_matrices_are_quantised(groma: Groma) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    linear = [n for n, m in groma.model.named_modules() if isinstance(m, torch.nn.Linear)]
    converted = {name for name in linear if should_convert_module(name, list(quantise.KEPT))}
    assert converted == {name for name in linear if name.startswith("llm.model.layers.")}
    assert len(converted) == 2 * 7
    assert len(linear) > 60


def test_a_quantiser_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, groma: Groma) -> None:
    monkeypatch.setattr(quantise, "find_spec", lambda name: None)
    wanted = r"4-bit weights need bitsandbytes: pip install 'groma\[quantise\]'"
    with pytest.raises(ValueError, match=wanted):
        quantise.load_quantised(EMBEDDED, 4, CPU, "float32")


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_where_a_quantiser_is_installed(
    bits: int, tmp_path: Path, make: Callable[..., Any], tiny_processor: Any
) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'groma[quantise]'")
    # four bits come in blocks of 64
    model = make(1, found_threshold=0.0, llm={"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    model.save_pretrained(tmp_path)
    tiny_processor.save_pretrained(tmp_path)
    small = quantise.load_quantised(tmp_path, bits, CPU, "float32")
    kinds = {name: p.dtype for name, p in small.model.named_parameters()}
    whole = {name for name, kind in kinds.items() if kind.is_floating_point}
    assert {n for n in kinds if n.startswith("llm.model.layers.") and "norm" not in n}.isdisjoint(whole)
    assert {n for n in kinds if not n.startswith("llm.model.layers.")} <= whole
    exact = Groma(model, tiny_processor, "exact")
    told, wanted = (g.refer(g.look(TABLE), "the red cup") for g in (small, exact))
    assert told.found
    assert told.presence == pytest.approx(wanted.presence, abs=0.1)
