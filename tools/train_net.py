#!/usr/bin/env python
"""Train a Groma as a configuration says: one of the three stages, in one process or many (docs/training.md).

exit status: 0 done; 2 a mistake, told in one line; 75 ended by SIGTERM, saved, go on with --resume

examples:
  tools/train_net.py --config stage2.yaml data_root=/data output=out/stage2
  tools/train_net.py --config projects/tabletop/configs/stage1.yaml data_root=/data/tabletop optim.lr=3e-4
  tools/train_net.py --config stage2.yaml data_root=/data output=out/stage2 --resume     # after a kill
  torchrun --nproc_per_node 8 tools/train_net.py --config stage3.yaml data_root=/data output=out/stage3
  deepspeed --num_gpus 8 tools/train_net.py --config stage3.yaml optim.deepspeed=zero3.json data_root=/data output=out
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings

from groma import cli

INTERRUPTED = 75
"""EX_TEMPFAIL of sysexits.h: asked to end, saved, worth another try."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; leaves with status 2 and one line if it is wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--config", required=True, metavar="YAML", help="a path, or a name in groma/configs/")
    parser.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint in output")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # deepspeed's launcher says it twice
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the configuration, dotted")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Train, print the folder of the final model; returns the exit status."""
    args = parse(arguments)
    first = os.environ.get("RANK", "0") == "0"
    if args.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed looks for another, and says that it did
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    with cli.user_errors():
        from groma.config import load_config
        from groma.training.recipe import require_inputs

        run = load_config(args.config, args.overrides)
        require_inputs(run)  # before the seconds that the libraries take to load
        from groma.training.parts import Interrupted
        from groma.training.run import train

        try:
            final = train(run, resume=args.resume, device=args.device)
        except Interrupted as asked:
            if first:
                cli.tell(str(asked))
            return INTERRUPTED
        if first:
            print(final)
    return 0


if __name__ == "__main__":
    sys.exit(main())
