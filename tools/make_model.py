#!/usr/bin/env python
"""Make a Groma to start training from: a pre-trained image encoder and a pre-trained language model, joined by parts
of random weights. The folder it writes is what model.init of a stage-1 configuration names.

examples:
  tools/make_model.py --encoder facebook/dinov2-large --llm lmsys/vicuna-7b-v1.5 --out models/start
  tools/make_model.py --encoder path/to/dinov3 --llm Qwen/Qwen3-4B --out models/start --dtype bfloat16
  tools/train_net.py --config stage1.yaml model.init=models/start data_root=/data

--encoder and --llm are folders or hub ids; the encoder is a DINOv2, one with registers, or a DINOv3 vision transformer.
The special words and the proxies are added to the tokenizer, and both pre-trained parts keep every weight. --image-size
must be an even number of the encoder's patches: 448 is, for patches of 14 and of 16 pixels.
Exit status: 0 done, 2 a mistake in the call.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from groma import cli


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; leaves with status 2 and one line if it is wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--encoder", required=True, metavar="NAME", help="a vision transformer")
    parser.add_argument("--llm", required=True, metavar="NAME", help="a causal language model")
    parser.add_argument("--tokenizer", metavar="NAME", help="default: that of --llm")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write, which must not exist")
    parser.add_argument("--image-size", metavar="S", type=cli.at_least_one, default=448, help="default: %(default)s")
    parser.add_argument("--proxies", metavar="N", type=cli.at_least_one, default=100,
                        help="regions that can be named (default: %(default)s)")  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="of the saved weights (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the random weights (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Write the model and its processor, print the folder; returns the exit status."""
    args = parse(arguments)
    with cli.user_errors():
        if Path(args.out).exists():
            raise ValueError(f"--out: {args.out} exists already")
        import torch

        from groma.training.parts_loading import assemble

        model, processor = assemble(args.encoder, args.llm, args.tokenizer, args.image_size, args.proxies, args.seed)
        model.to(getattr(torch, args.dtype)).save_pretrained(args.out)
        processor.save_pretrained(args.out)
    print(args.out)
    return cli.FOUND


if __name__ == "__main__":
    sys.exit(main())
