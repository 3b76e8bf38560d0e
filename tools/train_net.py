#!/usr/bin/env python
"""Train a Groma as a configuration says: one of the three stages, on one process or under torchrun.

examples:
  tools/train_net.py --config stage2.yaml data_root=/data output=out/stage2
  tools/train_net.py --config projects/tabletop/configs/stage1.yaml data_root=/data/tabletop optim.lr=3e-4
  tools/train_net.py --config stage2.yaml data_root=/data output=out/stage2 --resume     # after a kill
  torchrun --nproc_per_node 8 tools/train_net.py --config stage3.yaml data_root=/data
"""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Tells a wrong call in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"train_net.py: {message} (see --help)\n")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="train_net.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="YAML", help="a path, or a name in groma/configs/")
    parser.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint in output")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the configuration, dotted")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    from groma.config import load_config

    try:
        run = load_config(args.config, args.overrides)
        import torch

        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda: torch sees no CUDA device here; use --device cpu")
        from groma.training.run import train

        print(train(run, resume=args.resume, device=args.device))
    except ValueError as error:  # ConfigError, TrainingError, and the readers' errors: what a user can put right
        print(f"train_net.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_net.py: interrupted; go on with --resume", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
