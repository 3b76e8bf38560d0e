"""The grammar by hand, under sampling and with beams; contexts of rows of different lengths; what a stream may show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.generation import LogitsProcessorList

from groma.data.prompts import build_prompt
from groma.decoding import Context, Grammar, presence, settled
from groma.model.configuration import GromaConfig
from groma.predictor import Groma
from groma.structures import Prompt, Turn, View

pytestmark = pytest.mark.usefixtures("quiet_torch")


# -- the grammar by hand ----------------------------------------------------------------------------------------------


def writable(
    config: GromaConfig, written: Sequence[str], regions: int = 3, room: int = 9, empty: bool = True
) -> set[str]:
    """The special words that may follow ``written``, and "text"; in it any other string stands for a word of text."""
    end, text = config.token_id("</s>"), 300
    ids = [config.new_token_ids.get(word, text) for word in written]  # type: ignore[union-attr]
    grammar = Grammar(config, [regions], (end,), [len(ids) + room], empty)
    scores = grammar(torch.tensor([ids], dtype=torch.long).reshape(1, -1), torch.zeros(1, config.vocab_size))[0]
    words = {word for word, i in config.new_token_ids.items() if scores[i] == 0}  # type: ignore[union-attr]
    return words | ({"text"} if scores[text] == 0 else set())


START = {"text", "<p>", "<roi>", "</s>"}


@pytest.mark.parametrize("written, may_follow", [
    ([], START),
    (["a"], START),
    (["<p>"], {"text"}),
    (["<p>", "a"], {"text", "</p>"}),
    (["<p>", "a", "</p>"], START),
    (["<roi>"], {"<r0>", "<r1>", "<r2>", "</roi>"}),
    (["<roi>", "<r1>"], {"<r0>", "<r2>", "</roi>"}),
    (["<roi>", "<r1>", "<r0>", "<r2>"], {"</roi>"}),
    (["<roi>", "</roi>"], START),
    (["<roi>", "<r1>", "</roi>"], START),
    (["<roi>", "<r1>", "</roi>", "<roi>"], {"<r0>", "<r1>", "<r2>", "</roi>"}),
    (["<p>", "a", "</p>", "<roi>", "<r0>", "</roi>", "and", "<p>", "b"], {"text", "</p>"}),
])  # fmt: skip
def test_what_may_follow(groma: Groma, written: list[str], may_follow: set[str]) -> None:
    assert writable(groma.model.config, written) == may_follow


@pytest.mark.parametrize("written, room, may_follow", [
    ([], 3, START),
    ([], 2, {"text", "</s>"}),  # no group and no phrase fits any more
    (["<p>", "a"], 2, {"text", "</p>"}),
    (["<p>", "a"], 1, {"</p>"}),
    (["<roi>", "<r0>"], 2, {"<r1>", "<r2>", "</roi>"}),
    (["<roi>", "<r0>"], 1, {"</roi>"}),
])  # fmt: skip
def test_the_last_tokens_close_what_is_open(groma: Groma, written: list[str], room: int, may_follow: set[str]) -> None:
    assert writable(groma.model.config, written, room=room) == may_follow


def test_a_view_without_regions_and_a_group_that_must_not_be_empty(groma: Groma) -> None:
    config = groma.model.config
    assert writable(config, [], regions=0) == START - {"<roi>"}
    assert writable(config, ["<roi>"], empty=False) == {"<r0>", "<r1>", "<r2>"}
    assert writable(config, ["<roi>", "<r0>"], empty=False) == {"<r1>", "<r2>", "</roi>"}


def test_a_tokenizers_own_words_are_written_only_to_end(groma: Groma) -> None:
    config, mark = groma.model.config, 301
    phrase = config.token_id("<p>")
    for written in ([], [phrase]):
        ids, scores = torch.tensor([written], dtype=torch.long).reshape(1, -1), torch.zeros(1, config.vocab_size)
        assert Grammar(config, [1], (2,), controls=[mark])(ids, scores)[0, mark] == -torch.inf
        assert Grammar(config, [1], (2, mark), controls=[mark])(ids, scores)[0, mark] == (-torch.inf if written else 0)
        assert Grammar(config, [1], (2,))(ids, scores)[0, mark] == 0


def test_rows_of_one_image_stand_together(groma: Groma) -> None:
    """As transformers' beams and samples do: two images of 1 and 3 regions, two rows each."""
    config = groma.model.config
    opened = torch.full((4, 1), config.token_id("<roi>"))
    scores = Grammar(config, [1, 3], (2,))(opened, torch.zeros(4, config.vocab_size))
    assert (scores[:, config.proxy_ids] == 0).sum(1).tolist() == [1, 1, 3, 3]


# -- the grammar in transformers' generation --------------------------------------------------------------------------


def assert_well_formed(config: GromaConfig, written: Sequence[int], regions: int) -> int:
    """Read tokens the slow way, word by word; the number of groups."""
    names = {i: word for word, i in config.new_token_ids.items()}  # type: ignore[union-attr]
    inside, seen, groups = "", [], 0
    for word in [names.get(token, "text") for token in written]:
        if word in ("</s>", "[PAD]"):
            break
        if inside == "<roi>":
            assert word == "</roi>" or (word.startswith("<r") and int(word[2:-1]) < regions and word not in seen)
            seen.append(word)
        elif inside == "<p>":
            assert word == "text" or (word == "</p>" and seen)
            seen.append(word)
        else:
            assert word in ("text", "<p>", "<roi>")
        if word in ("<p>", "<roi>"):
            inside, seen = word, []
            groups += word == "<roi>"
        elif word in ("</p>", "</roi>"):
            inside = ""
    assert inside == ""
    return groups


@pytest.mark.parametrize("how", [
    {"do_sample": True, "temperature": 2.0, "num_return_sequences": 6},
    {"num_beams": 3, "num_return_sequences": 2},
    {"num_beams": 2, "do_sample": True, "temperature": 2.0},
])  # fmt: skip
@torch.no_grad()
def test_sampled_text_is_well_formed(talkative: Callable[..., Groma], pictures: Path, how: dict[str, Any]) -> None:
    groma = talkative(3)
    model, processor = groma.model, groma.processor
    files = [pictures / "images" / f"{i}.png" for i in range(3)]
    counts = [len(view.proposals) for view in groma.look_many(files)]
    turn = Turn("user", "[grounding] What is it?")
    ids = build_prompt(processor, [turn], open_answer=True).ids.expand(3, -1)
    grammar = Grammar(model.config, counts, processor.end_ids, [24] * 3)
    pixels = processor.pixels([Image.open(file) for file in files])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = model.generate(ids, pixels, logits_processor=LogitsProcessorList([grammar]), max_new_tokens=24,
                             eos_token_id=list(processor.end_ids), pad_token_id=model.config.token_id("[PAD]"),
                             **how)  # fmt: skip
    copies = len(out) // 3
    assert copies == how.get("num_return_sequences", 1)
    groups = [assert_well_formed(model.config, row, counts[i // copies]) for i, row in enumerate(out.tolist())]
    assert any(groups), "the test is put to work"


# -- contexts ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_rows_of_different_lengths_read_as_alone(groma: Groma, pictures: Path) -> None:
    """Caches padded on the right, then prompts padded on the left, then one more token for some of the rows."""
    model, processor = groma.model, groma.processor
    views = groma.look_many([pictures / "images" / f"{i}.png" for i in range(3)])
    assert len({view.prefix.get_seq_length() for view in views}) > 1
    rows = [torch.tensor(processor.encode(text)) for text in ("What is it?", "Where", "A much longer question, is it?")]
    embed = model.get_input_embeddings()
    more, kept = torch.tensor([[7], [8], [9]]), torch.tensor([[1], [0], [1]])

    def prompt(ids: Tensor) -> Prompt:
        return Prompt(ids, torch.full_like(ids, -100), torch.zeros(0, 4), torch.zeros(0, 4))

    spliced = model.splice(views, [prompt(ids) for ids in rows], left=True)
    context = Context.after([view.prefix for view in views], spliced.pointers)
    first, context = context.read(model, spliced.embeds, spliced.mask, last=2)
    second, _ = context.read(model, embed(more), kept)
    for i, (view, ids) in enumerate(zip(views, rows, strict=True)):
        alone = Context.after([view.prefix], spliced.pointers[i : i + 1] if spliced.pointers is not None else None)
        one, after = alone.read(model, embed(ids[None]), torch.ones(1, len(ids), dtype=torch.long), last=2)
        torch.testing.assert_close(first[i, -1:], one[0, -1:], atol=2e-5, rtol=1e-4)
        if len(ids) > 1:
            torch.testing.assert_close(first[i], one[0], atol=2e-5, rtol=1e-4)
        if kept[i]:
            two, _ = after.read(model, embed(more[i : i + 1]), torch.ones(1, 1, dtype=torch.long))
            torch.testing.assert_close(second[i], two[0], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_reading_on_leaves_a_context_as_it_was(groma: Groma, view: View) -> None:
    context = Context.after([view.prefix, view.prefix])
    length, embeds = view.prefix.get_seq_length(), torch.randn(2, 5, 48)
    mask = torch.ones(2, 5, dtype=torch.long)
    one, longer = context.read(groma.model, embeds, mask)
    other, _ = context.read(groma.model, embeds, mask)
    assert torch.equal(one, other)
    assert (context.cache.get_seq_length(), longer.cache.get_seq_length()) == (length, length + 5)
    assert view.prefix.get_seq_length() == length


# -- scores and streams -----------------------------------------------------------------------------------------------


def test_presence_by_hand() -> None:
    # <roi> against "Nothing" 3 : 1; inside, proxies 1 + 4 and "closed" 5, a third proxy does not exist
    start, inside = torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[1.0, 4.0, 90.0, 5.0]]).log()
    f = 0.75 * (1 - 5 / 10)
    assert presence(start, inside, [2], 1.0).tolist() == pytest.approx([f])
    odds = (f / (1 - f)) ** 0.5
    assert presence(start, inside, [2], 2.0).tolist() == pytest.approx([odds / (1 + odds)])
    sure = presence(torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, -200.0]]), [1], 8.0)
    assert 0 < 1 - sure.item() < 1e-9  # neither term rounds the other away


@pytest.mark.parametrize("text, shown", [
    ("a red", "a red"), ("a red ", "a red"), ("caf\ufffd", "caf"), ("a \ufffd\ufffd", "a"), ("\ufffd", ""), ("", ""),
    ("a \ufffd b", "a \ufffd b"),
])  # fmt: skip
def test_what_a_stream_may_show(text: str, shown: str) -> None:
    assert settled(text) == shown
