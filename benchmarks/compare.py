"""Compare finished runs, several seeds a method: mean accuracies with 95% intervals, a table and then one JSON line.

    python benchmarks/compare.py runs/*

Runs are grouped by controller and task; runs that have not finished are named and left out. The interval is Student's
t over seeds: what another seed would bring, not what another sample of test problems would. One seed has no interval.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

# Two-sided 95% quantiles of Student's t for 1 to 9 degrees of freedom; beyond that 2.26 is on the safe side.
STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


NUMBERS = ("accuracy_warmup", "accuracy_final", "sft_steps", "seconds", "seed")


def read_summary(run: Path) -> dict | None:
    file = run / "summary.json"
    if not (file.is_file() or (run / "config.json").is_file()):
        raise ValueError(f"{run} is not the folder of a run")
    try:
        summary = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        if summary is not None and not all(isinstance(summary.get(key, 0), (int, float)) for key in NUMBERS):
            raise ValueError(f"{', '.join(NUMBERS)} must be numbers")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: not the summary of a run ({error})") from None
    reason = "has not finished" if summary is None else "trained nothing" if "controller" not in summary else ""
    if not reason and not {*NUMBERS, "task"} <= set(summary):
        reason = "was not evaluated"
    if reason:
        print(f"compare.py: {run} {reason} and is left out", file=sys.stderr)
        return None
    return summary


def read_metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics, one a step. ValueError names the file where it is absent or no such file."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(f"{file}: no such file; is {run} the folder of a run?")
    try:
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if not all({"step", "phase", "kind"} <= set(record) for record in records):
            raise ValueError("a line lacks step, phase or kind")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: not the metrics of a run ({error})") from None
    if not records:
        raise ValueError(f"{file}: no step has been logged yet")
    return records


def interval(values: list[float]) -> float | None:
    """Half the width of the 95% interval of the mean."""
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    return STUDENT_T[min(freedom, len(STUDENT_T)) - 1] * statistics.stdev(values) / len(values) ** 0.5


def compare(summaries: list[dict]) -> dict[str, dict]:
    """By controller and task: the seeds, and (mean, half interval) of each figure over them."""
    groups: dict[str, list[dict]] = {}
    for summary in summaries:
        groups.setdefault(f"{summary['controller']} on {summary['task']}", []).append(summary)
    table = {}
    for name, group in sorted(groups.items()):
        seeds = sorted(s["seed"] for s in group)
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{name}: a seed was given twice ({seeds}); an interval needs runs that differ")
        figures = {
            "warmup": [100 * s["accuracy_warmup"] for s in group],
            "final": [100 * s["accuracy_final"] for s in group],
            "gain": [100 * (s["accuracy_final"] - s["accuracy_warmup"]) for s in group],
            "final_ood": [100 * s["accuracy_final_ood"] for s in group if "accuracy_final_ood" in s],
            "sft_steps": [s["sft_steps"] for s in group],
            "seconds": [s["seconds"] for s in group],
        }
        means = {key: (statistics.mean(v), interval(v)) for key, v in figures.items() if v}
        table[name] = {"seeds": seeds, "least_gain": min(figures["gain"])} | means
    return table


def show(table: dict[str, dict]) -> str:
    def cell(row: dict, key: str, digits: int = 1) -> str:
        if key not in row:
            return f"{'-':>14}"
        mean, half = row[key]
        return f"{mean:.{digits}f}{'' if half is None else f' ± {half:.{digits}f}'}".rjust(14)

    columns = ("warmup", "final", "gain", "final_ood", "sft_steps", "seconds")
    width = max(map(len, table), default=0) + 1
    lines = [f"{'':{width}}{'seeds':>6}" + "".join(f"{column:>14}" for column in columns)]
    for name, row in table.items():
        digits = {"sft_steps": 0, "seconds": 0}
        cells = "".join(cell(row, column, digits.get(column, 1)) for column in columns)
        lines.append(f"{name:{width}}{len(row['seeds']):6}{cells}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    args = parser.parse_args(argv)
    try:
        table = compare([summary for run in args.runs if (summary := read_summary(run))])
    except (ValueError, KeyError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    print(show(table))
    print(json.dumps(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
