"""New words beside a base vocabulary: rows, order of logits, and who learns."""

from __future__ import annotations

import torch
from torch import nn

from groma.model.vocabulary import JoinedEmbedding, NewWords


def parts(
    base: int = 10, new: int = 4, width: int = 6, rows: int | None = None
) -> tuple[nn.Embedding, nn.Linear, NewWords]:
    """A base embedding and head of ``rows`` rows (a model may pad its vocabulary), and the words beside them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Embedding(rows or base, width), nn.Linear(width, rows or base, bias=False), NewWords(base, new, width)


@torch.no_grad()
def test_ids_read_the_row_they_name() -> None:
    base, _, words = parts()
    ids = torch.tensor([[0, 9, 10], [13, 3, 11]])
    embeds = words.embed_ids(ids, base)
    expected = [[base.weight[0], base.weight[9], words.embed.weight[0]],
                [words.embed.weight[3], base.weight[3], words.embed.weight[1]]]  # fmt: skip
    assert torch.equal(embeds, torch.stack([torch.stack(row) for row in expected]))
    assert ids.tolist() == [[0, 9, 10], [13, 3, 11]]
    assert torch.equal(JoinedEmbedding(base, words)(ids), embeds)
    assert JoinedEmbedding(base, words).weight is base.weight


@torch.no_grad()
def test_logits_hold_base_words_first_and_no_padding_rows() -> None:
    base, head, words = parts(rows=16)  # 6 rows of the head belong to no word
    hidden = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
    logits = words.logits(hidden, head)
    assert logits.shape == (2, 3, 14)
    torch.testing.assert_close(logits[..., :10], hidden @ head.weight[:10].T)
    torch.testing.assert_close(logits[..., 10:], hidden @ words.head.weight.T)
    # id 10 is the first new word, though the base has a row 10
    assert torch.equal(words.embed_ids(torch.tensor([10]), base)[0], words.embed.weight[0])


def test_a_frozen_base_stays_while_new_rows_learn() -> None:
    base, head, words = parts()
    base.requires_grad_(False)
    head.requires_grad_(False)
    hidden = words.embed_ids(torch.tensor([1, 11, 11]), base)
    words.logits(hidden, head).square().sum().backward()
    assert base.weight.grad is None
    assert head.weight.grad is None
    assert words.head.weight.grad.abs().min() > 0
    touched = words.embed.weight.grad.abs().sum(1) > 0
    assert touched.tolist() == [False, True, False, False]


def test_a_trained_base_learns_from_its_own_words_only() -> None:
    base, head, words = parts()
    words.logits(words.embed_ids(torch.tensor([4, 12, 13]), base), head)[..., :10].sum().backward()
    assert (base.weight.grad.abs().sum(1) > 0).nonzero().flatten().tolist() == [4]
    assert head.weight.grad.abs().min() > 0
    assert not words.head.weight.grad.any()


def test_new_rows_start_around_the_mean_of_the_base() -> None:
    base, _, words = parts(base=500, new=300, width=32, rows=600)
    with torch.no_grad():
        base.weight += 3.0
        base.weight[500:] = 1e4  # rows of no word
        base.weight[500:] = 3.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        words.reset(base)
    mean = base.weight[:500].mean(0)
    torch.testing.assert_close(words.embed.weight.mean(0), mean, atol=0.3, rtol=0)
    assert len(words.embed.weight.unique(dim=0)) == 300
    torch.testing.assert_close(words.head.weight, words.embed.weight - mean)
