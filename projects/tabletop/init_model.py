"""Make the tiny Groma with random weights: its configuration, its processor, and the list of description words.

    python projects/tabletop/init_model.py --processor tabletop_processor --out tabletop_init

About 10 M parameters: a DINOv2 of 6 layers and 192 channels on 256 x 256 pixels (patches of 16), a proposer of 128
channels with one objectness head, a Llama of 5 layers and 256 channels. Same seed, same bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from groma import markup
from groma.model.configuration import GromaConfig
from groma.processor import GromaProcessor

WORDS = (
    "cup bowl plate bottle vase ball book box can ring cone candle "
    "red green blue yellow orange purple black white brown pink small large matte shiny"
).split()
"""What stage 1 asks every region for: kind, colour, size and finish."""


def tiny_config(processor: GromaProcessor, image_size: int = 256, words: int = len(WORDS)) -> GromaConfig:
    """The configuration of the embedded model, for ``processor``'s vocabulary."""
    ids = {word: processor.word_id(word) for word in markup.words()}
    base = _base(ids)
    return GromaConfig(
        encoder=dict(model_type="dinov2", hidden_size=192, num_hidden_layers=6, num_attention_heads=6, mlp_ratio=4,
                     patch_size=16, image_size=image_size),
        proposer=dict(width=128, encoder_layers=2, decoder_layers=3, encoder_ffn=256, decoder_ffn=256, queries=100,
                      heads=["coco"], fusion=[1.0], dropout=0.0),
        llm=dict(model_type="llama", hidden_size=256, intermediate_size=704, num_hidden_layers=5,
                 num_attention_heads=8, num_key_value_heads=8, vocab_size=base, max_position_embeddings=1024,
                 pad_token_id=ids[markup.PAD], bos_token_id=ids[markup.BOS], eos_token_id=ids[markup.EOS]),
        image_size=image_size, base_vocab=base, new_token_ids=ids, region_width=96, region_scales=(2, 1, 0.5),
        region_rounds=2, region_groups=8, region_size=7, region_hidden=256, region_box_hidden=64, max_regions=40,
        words=words,
    )  # fmt: skip


def _base(ids: dict[str, int]) -> int:
    """Size of the vocabulary before extension: the new words are the run of ids that ends at the highest."""
    taken, first = set(ids.values()), max(ids.values())
    while first - 1 in taken:
        first -= 1
    return first


def main() -> int:
    """The command line; 0 when the model is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processor", type=Path, required=True, help="folder that tokenizer.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    options = parser.parse_args()
    import torch

    from groma.model.groma import GromaForConditionalGeneration

    processor = GromaProcessor.from_pretrained(options.processor)
    torch.manual_seed(options.seed)
    model = GromaForConditionalGeneration(tiny_config(processor, processor.image_processor.size["height"]))
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    (options.out / "words.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    print(f"{options.out}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
