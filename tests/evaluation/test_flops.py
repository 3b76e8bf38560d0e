"""Operations against hand counts and the published sizes of the released model; the machine's own rate."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from groma.evaluation import flops
from groma.evaluation.flops import counter
from groma.evaluation.random_weights import SIZES
from groma.model.configuration import GromaConfig
from groma.model.groma import GromaForConditionalGeneration
from groma.structures import ImageFeatures

pytestmark = pytest.mark.usefixtures("quiet_torch")
CPU = torch.device("cpu")
X = torch.rand(1, 3, 10, 12)
CASES = {
    "linear": (lambda: F.linear(torch.rand(5, 7), torch.rand(11, 7), torch.rand(11)), 2 * 5 * 7 * 11),
    "product": (lambda: torch.rand(2, 5, 7) @ torch.rand(2, 7, 3), 2 * 2 * 5 * 7 * 3),
    "convolution": (lambda: F.conv2d(X, torch.rand(4, 3, 3, 3), padding=1), 2 * 10 * 12 * 4 * 27),
    # scores and mixing, 2 heads, 5 x 6 pairs of width 8
    "attention": (
        lambda: F.scaled_dot_product_attention(*(torch.rand(1, 2, n, 8) for n in (5, 6, 6))),
        4 * 2 * 5 * 6 * 8,
    ),
    "causal attention": (
        lambda: F.scaled_dot_product_attention(*(torch.rand(1, 2, 6, 8) for _ in range(3)), is_causal=True),
        4 * 2 * 6 * 6 * 8,
    ),
    # 3 channels at 4 x 5 places, four neighbours, a multiply-add each
    "grid sample": (lambda: F.grid_sample(X, torch.zeros(1, 4, 5, 2), align_corners=False), 8 * 3 * 4 * 5),
    # 2 boxes of 7 x 7 bins of 2 x 2 samples
    "ROIAlign": (
        lambda: roi_align(X, torch.tensor([[0, 1, 1, 5, 5], [0, 2, 2, 8, 9.0]]), 7, 1.0, 2, True),
        8 * 4 * 2 * 3 * 49,
    ),
    "a sum": (lambda: X + X, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_operations_equal_the_hand_count(name: str) -> None:
    run, expected = CASES[name]
    with torch.inference_mode(), counter() as count:
        run()
    assert count.get_total_flops() == expected


def mask(queries: int, keys: int) -> Tensor:
    return torch.empty(1, 1, queries, keys, dtype=torch.bool, device="meta")


@torch.inference_mode()
def test_operations_of_the_released_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    """GFLOP at 448 pixels, 100 regions and 556 tokens, as worked out for the released 7B; worst difference 3 %."""
    plain = torch.Tensor.repeat_interleave  # on the meta device there are no counts to look at, and no autocast
    monkeypatch.setattr(torch.Tensor, "repeat_interleave", lambda x, n, **_: plain(x, n, output_size=100))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    with torch.device("meta"):
        model = GromaForConditionalGeneration(GromaConfig(**SIZES["7b"])).eval().requires_grad_(False)
        embeds, pixels, boxes = torch.empty(1, 556, 4096), torch.empty(1, 3, 448, 448), torch.empty(100, 4)
    found, kept = {}, {}

    def count(name: str, run: Any) -> None:
        with counter() as counting:
            kept[name] = run()
        found[name] = counting.get_total_flops() / 1e9

    count("encoder", lambda: model.encoder(pixels))
    features: ImageFeatures = kept["encoder"]
    count("proposer", lambda: model.proposer(features))
    count("regions", lambda: model.regions(features, [boxes]))
    count("tokens", lambda: model.bridge(features))
    count("prefill, all logits", lambda: model.speak(embeds, mask(556, 556)))
    count("prefill", lambda: model.speak(embeds, mask(556, 556), use_cache=True, last=1))
    cache = kept["prefill"].past_key_values
    count("token", lambda: model.speak(embeds[:, :1], mask(1, 557), cache, True))
    assert found == pytest.approx({"encoder": 724, "proposer": 15, "regions": 3226, "tokens": 17, "prefill": 7364,
                                   "prefill, all logits": 7510, "token": 13.5}, rel=0.035)  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(304 + 11 + 289 + 34 + 6738, rel=0.01)


def test_the_peak_is_the_best_product(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(100))
    monkeypatch.setattr(flops, "now", lambda device: next(seconds))  # every product takes a second
    assert flops.gemm_peak(torch.float32, CPU, (8, 32, 16), tries=2) == 2 * 32**3
    assert next(seconds) == 2 * 3 * 3
