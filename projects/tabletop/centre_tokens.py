#!/usr/bin/env python
"""Between stage 1 and stage 2: give image and region tokens a size and a middle the language model can work with.

examples:
  python projects/tabletop/centre_tokens.py --model outputs/stage1/final --data data/tabletop/train --out outputs/start

Turns ``token_norm``, ``named_slots`` and ``pointer_head`` on (GromaConfig says why), and changes the last layers so
that tokens average zero over the first pictures of --data. Stage 1 leaves region tokens 100 long; a word is 0.4 long.

Region tokens are also evened out: twenty directions, those of the words of stage 1, hold 99 % of their variance, and
where a region is, which the relations need, is nearly lost beside them. Every principal direction is scaled by the
fourth root of its variance, so that a share of 1/10,000 becomes one of 1/100.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from groma import cli

if TYPE_CHECKING:
    from torch import Tensor

FLOOR = 1e-6


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; leaves with status 2 and one line if it is wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--model", metavar="DIR", required=True, help="what stage 1 left in its final/")
    parser.add_argument("--data", metavar="DIR", required=True, type=Path, help="the training split")
    parser.add_argument("--out", metavar="DIR", required=True, type=Path, help="where the model goes")
    parser.add_argument("--pictures", metavar="N", type=cli.at_least_one, default=500, help="default: %(default)s")
    return parser.parse_args(arguments)


def even(tokens: Tensor) -> Tensor:
    """The symmetric map (E, E) that scales each principal direction of tokens (K, E) by its variance to the -1/4.

    Directions of less than FLOOR of the largest variance count as having that much: they are noise.
    """
    import torch

    centred = (tokens - tokens.mean(0)).double()
    variance, directions = torch.linalg.eigh(centred.T @ centred / len(tokens))
    scale = variance.clamp(min=FLOOR * float(variance[-1])) ** -0.25
    return (directions * scale @ directions.T).to(tokens.dtype)


def main(arguments: list[str] | None = None) -> int:
    """Measure, move, store, tell; returns the exit status."""
    args = parse(arguments)
    with cli.user_errors():
        import torch
        from transformers.utils import logging

        from groma.data.detection import Detection
        from groma.data.images import read_image
        from groma.model.configuration import GromaConfig
        from groma.model.groma import GromaForConditionalGeneration
        from groma.processor import GromaProcessor

        logging.set_verbosity_error()  # the norms are new on purpose
        config = GromaConfig.from_pretrained(args.model)
        config.token_norm = config.named_slots = config.pointer_head = True
        model = GromaForConditionalGeneration.from_pretrained(args.model, config=config).eval()
        torch.manual_seed(0)
        model.vocabulary.reset(model.llm.get_input_embeddings())
        processor = GromaProcessor.from_pretrained(args.model)
        samples = Detection(args.data / "regions.json", args.data / "images")
        regions, images = [], []
        merge, norms = model.bridge.mlp, (model.regions.norm, model.bridge.norm)
        model.regions.norm, model.bridge.norm = torch.nn.Identity(), torch.nn.Identity()
        with torch.inference_mode():
            for i in range(min(args.pictures, len(samples))):
                features = model.encoder(processor.pixels([read_image(samples[i].image)]))
                regions += model.regions(features, [samples[i].boxes])
                images.append(model.bridge(features)[0])
        model.regions.norm, model.bridge.norm = norms
        with torch.no_grad():
            for layer, tokens in ((model.regions.output, torch.cat(regions)), (merge[-1], torch.cat(images))):
                before = float(tokens.norm(dim=1).mean())
                layer.bias -= tokens.mean(0)
                after = float((tokens - tokens.mean(0)).norm(dim=1).mean())
                print(f"{len(tokens)} tokens: {before:.1f} long on average, {after:.1f} from their middle")
            scale = even(torch.cat(regions))
            model.regions.output.weight.copy_(scale @ model.regions.output.weight)
            model.regions.output.bias.copy_(scale @ model.regions.output.bias)
        model.save_pretrained(args.out)
        processor.save_pretrained(args.out)
    return cli.FOUND


if __name__ == "__main__":
    sys.exit(main())
