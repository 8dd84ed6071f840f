"""Write the metrics of a run for other people's tools.

    python benchmarks/export.py runs/x --to csv             # runs/x/metrics.csv, a row a step, a column a metric
    python benchmarks/export.py runs/x --to tensorboard     # runs/x/tensorboard; then: tensorboard --logdir runs
    python benchmarks/export.py runs/x --to wandb           # ./wandb/offline-run-...; then: wandb sync THAT

`tensorboard` and `wandb` must be installed. Steps are those of the run, warm-up and adaptive counted through; nulls are
left out. SFT and GRPO steps do not share a curve: for these two tools a metric is named by the kind of its step,
`sft/loss` or `grpo/loss`. Evaluations keep their names, `eval/accuracy`. What chose the kind is under `decision/`:
`decision/p_sft` and the like, and `decision/sft`, 1 or 0, which smoothed is the share of SFT steps.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.compare import read_metrics
from data.files import read_json

ABOUT = ("step", "phase", "kind")  # the rest of a record are metrics
DECISION = ("p_sft", "alpha", "sft_norm", "sft_norm_age")


def named_by_kind(record: dict) -> dict[str, float]:
    """The metrics of a step under the names that the top of this file tells."""
    named = {"decision/sft": float(record["kind"] == "sft")}
    for key, value in record.items():
        if key in ABOUT or not isinstance(value, (int, float)) or not math.isfinite(value):
            continue
        room = "" if key.startswith("eval/") else "decision/" if key in DECISION else f"{record['kind']}/"
        named[room + key] = value
    return named


def to_csv(run: Path, records: list[dict], out: Path | None) -> str:
    """Columns in the order in which they first appear; a cell is empty where the step has no such metric."""
    file = out or run / "metrics.csv"
    columns = dict.fromkeys([*ABOUT, *(key for record in records for key in record)])
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(columns))
        writer.writeheader()
        writer.writerows(records)  # None is an empty cell, too
    return str(file)


def to_tensorboard(run: Path, records: list[dict], out: Path | None) -> str:
    from torch.utils.tensorboard import SummaryWriter

    folder = out or run / "tensorboard"
    if folder.exists() and any(folder.iterdir()):  # TensorBoard would draw old and new points as one curve
        raise ValueError(f"{folder} is not empty: delete it, or name another place by --out")
    with SummaryWriter(str(folder)) as writer:
        for record in records:
            for name, value in named_by_kind(record).items():
                writer.add_scalar(name, value, record["step"])
    return str(folder)


def to_wandb(run: Path, records: list[dict], out: Path | None) -> str:
    """Its default place is not in the run's folder, which may hold no links: wandb makes some."""
    from wandb import init

    folder, config = out or Path(), read_json(run / "config.json")
    folder.mkdir(parents=True, exist_ok=True)  # else wandb takes a temporary one
    with init(project="sasr", name=run.resolve().name, dir=str(folder), config=config, mode="offline") as opened:
        for record in records:
            about = {"phase": record["phase"], "kind": record["kind"]}
            opened.log(about | named_by_kind(record), step=record["step"])
    return str(folder / "wandb")


TOOLS: dict[str, Callable[[Path, list[dict], Path | None], str]]
TOOLS = {"csv": to_csv, "tensorboard": to_tensorboard, "wandb": to_wandb}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--to", required=True, choices=tuple(TOOLS), help="what reads it")
    parser.add_argument("--out", type=Path, help="CSV file, or folder, to write (default: see above)")
    args = parser.parse_args(argv)
    try:
        print(TOOLS[args.to](args.run, read_metrics(args.run), args.out))
    except ImportError as error:
        print(f"export.py: --to {args.to}: {error}; pip install {args.to}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
