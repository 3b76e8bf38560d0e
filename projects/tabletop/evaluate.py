#!/usr/bin/env python
"""Measure a model on rendered tables it has not seen: referring expressions, refusals, plurals and proposals.

examples:
  python projects/tabletop/evaluate.py --data data/tabletop/test
  python projects/tabletop/evaluate.py --data data/tabletop/test --limit 50 --out outputs/tabletop-test
  python projects/tabletop/evaluate.py --data data/tabletop/test --model outputs/tabletop/stage3

--data is a split as generate.py writes it: rec.json, instances.json and images/. Prints a table; --out also gets
metrics.json and predictions.jsonl, a line per expression.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groma import cli

if TYPE_CHECKING:
    from torch import Tensor

    from groma.evaluation.grounding import RecReport
    from groma.evaluation.proposals import ProposalReport
    from groma.predictor import Groma

Truth = dict[str, "tuple[Tensor, Tensor]"]
"""By file name: boxes (M, 4) xyxy in [0, 1], and the areas (M) of their masks in square pixels."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; leaves with status 2 and one line if it is wrong."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", metavar="DIR", required=True, type=Path, help="rec.json, instances.json and images/")
    parser.add_argument("--limit", metavar="N", type=cli.at_least_one, help="only the first N scenes")
    parser.add_argument("--out", metavar="DIR", type=Path, help="write metrics.json and predictions.jsonl here")
    cli.add_model_arguments(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Evaluate, print the table; returns the exit status."""
    args = parse(arguments)
    with cli.user_errors():
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
        groma = cli.load(args.model, args.device, args.dtype, quiet=True)
        started = time.perf_counter()
        rec, seen, kept = evaluate(groma, args.data, args.limit, args.out)
        seconds = time.perf_counter() - started
        print(table(rec, seen, kept, f"{args.model or 'the embedded model'} on {args.data}", seconds))
        if args.out:
            path = args.out / "metrics.json"
            path.write_text(json.dumps(metrics(rec, seen, kept, seconds), indent=1) + "\n", encoding="utf-8")
    return cli.FOUND


def evaluate(
    groma: Groma, data: Path, limit: int | None, out: Path | None
) -> tuple[RecReport, ProposalReport, ProposalReport]:
    """Figures of the expressions, of all proposals, and of the regions kept of them, which the model can point at."""
    from tqdm import tqdm

    from groma.evaluation.grounding import ask, by_picture, read_rec, report
    from groma.evaluation.proposals import average_recall

    expressions = read_rec(data / "rec.json")
    truth = read_truth(data / "instances.json")
    scenes = len(by_picture(expressions))
    verdicts, candidates, regions, boxes, areas = [], [], [], [], []
    with ExitStack() as stack:
        lines = stack.enter_context((out / "predictions.jsonl").open("w", encoding="utf-8")) if out else None
        asked = ask(groma, expressions, data / "images", limit)
        for view, judged in tqdm(asked, total=min(limit or scenes, scenes), unit="scene", smoothing=0.05):
            name = judged[0].expression.file_name
            if name not in truth:
                raise ValueError(f"{data / 'instances.json'}: no entry of 'images' has file_name {name!r}")
            verdicts.extend(judged)
            candidates.append(view.candidates)
            regions.append(view.proposals)
            boxes.append(truth[name][0])
            areas.append(truth[name][1])
            if lines:
                lines.writelines(json.dumps(verdict.to_dict()) + "\n" for verdict in judged)
    return report(verdicts), average_recall(candidates, boxes, areas), average_recall(regions, boxes, areas)


def read_truth(path: Path) -> Truth:
    """The annotated objects of a COCO instances file, by the picture's file name."""
    import torch

    from groma.boxes import to_unit, xywh_to_xyxy

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows: dict[int, list[list[float]]] = {image["id"]: [] for image in content["images"]}
        for row in content["annotations"]:
            rows[row["image_id"]].append([*row["bbox"], row["area"]])
        truth = {}
        for image in content["images"]:
            numbers = torch.tensor(rows[image["id"]], dtype=torch.float64).reshape(-1, 5)
            boxes = to_unit(xywh_to_xyxy(numbers[:, :4]), image["width"], image["height"])
            truth[image["file_name"]] = (boxes, numbers[:, 4])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not COCO instances: {error!r}") from error
    return truth


def metrics(rec: RecReport, seen: ProposalReport, kept: ProposalReport, seconds: float) -> dict[str, Any]:
    """Everything measured, as flat plain numbers."""
    return {
        **rec.to_dict(),
        **{f"proposals/{name}": value for name, value in seen.to_dict().items()},
        **{f"regions/{name}": value for name, value in kept.to_dict().items()},
        "seconds": round(seconds, 1),
    }


def table(rec: RecReport, seen: ProposalReport, kept: ProposalReport, title: str, seconds: float) -> str:
    """The figures for people, each with how many it is over."""
    counts = rec.counts
    rows: list[tuple[str, float | None, int]] = [
        ("REC accuracy@0.5, one referent", rec.accuracy, counts["single"]),
        ("  of colour+kind pairs unseen in training", rec.accuracy_unseen, counts["unseen"]),
    ]
    rows += [(f"  {kind}", value, rec.counts_by_type[kind]) for kind, value in rec.accuracy_by_type.items()]
    rows += [
        ("absent referent answered found=False", rec.absent_refused, counts["absent"]),
        ("present referent wrongly refused", rec.present_refused, counts["single"] + counts["plural"]),
        ("plurals, F1 of the set at IoU 0.5", rec.plural_f1, counts["plural"]),
        ("proposals AR50@100", seen.ar50, seen.boxes),
        ("proposals AR@100 (.50:.95)", seen.ar, seen.boxes),
        ("regions the model can point at, AR50", kept.ar50, kept.boxes),
    ]
    lines = [f"{name:<44}{'-' if value is None else f'{value:.3f}':>7}{count:>9,}" for name, value, count in rows]
    heading = f"{title}: {counts['pictures']:,} scenes, {counts['expressions']:,} expressions, {seconds:.0f} s"
    return "\n".join([heading, f"{'':<44}{'score':>7}{'over':>9}", *lines])


if __name__ == "__main__":
    sys.exit(main())
