"""Draw what happened in one or more runs: p_t, SFT gradient norm, reward, accuracy, and what GRPO had to learn from.

    python benchmarks/plot.py runs/x [runs/y ...] --out picture.png

Warm-up is shaded; dots are single steps, lines are running means (over as many dots as --smooth says). The dotted
line is G_warmup, the yardstick of p_t, where the run has ended and left a summary.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def read_metrics(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(f"{file}: no such file; is {run} the folder of a run?")
    try:
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if not all({"step", "phase", "kind"} <= set(record) for record in records):
            raise ValueError("a line lacks step, phase or kind")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: not the metrics of a run ({error})") from None
    if not records:
        raise ValueError(f"{file}: no step has been logged yet")
    return records


def read_summary(run: Path) -> dict:
    """What a finished run says of itself; nothing while it is still going."""
    file = run / "summary.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def series(records: list[dict], key: str, kind: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that have the key (and are of the kind)."""
    points = [(r["step"], r[key]) for r in records if r.get(key) is not None and kind in (None, r["kind"])]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps), np.array(values, dtype=float)


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of each value and up to width - 1 before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw(axis, records: list[dict], key: str, label: str, colour, width: int, kind=None, style="-") -> None:
    steps, values = series(records, key, kind)
    if len(steps):
        axis.plot(steps, values, ".", markersize=2.5, alpha=0.3, color=colour)
        axis.plot(steps, smooth(values, width), style, color=colour, label=label)


def picture(runs: list[Path], width: int):
    figure, axes = plt.subplots(3, 2, figsize=(11, 9.2), sharex=True, constrained_layout=True)
    decision, norms, rewards, accuracy, groups, completions = axes.flat
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for index, run in enumerate(runs):
        records, colour, name = read_metrics(run), colours[index % len(colours)], run.name
        mixes = any(record["kind"] == "mixed" for record in records)
        draw(decision, records, "sft_share" if mixes else "p_sft", name, colour, width)
        draw(norms, records, "grad_norm", f"{name}: SFT", colour, width, "sft")
        draw(norms, records, "grad_norm_sft", f"{name}: SFT part", colour, width, style="--")
        draw(rewards, records, "reward_mean", name, colour, width)
        draw(groups, records, "all_right_fraction", f"{name}: all right", colour, width)
        draw(groups, records, "all_wrong_fraction", f"{name}: all wrong", colour, width, style="--")
        draw(completions, records, "truncated_fraction", f"{name}: cut off", colour, width)
        draw(completions, records, "unparsed_fraction", f"{name}: no answer found", colour, width, style="--")
        summary = read_summary(run)
        if summary.get("g_warmup") is not None and summary.get("signal", "norm") == "norm":
            norms.axhline(summary["g_warmup"], color=colour, linestyle=":", linewidth=1)
        for suffix, style, label in (
            ("", "o-", "in domain"),
            ("_ood", "o--", "out of domain"),
            ("_ood2", "o:", "out of domain 2"),
        ):
            steps, values = series(records, f"eval/accuracy{suffix}")
            before = summary.get(f"accuracy_before{suffix}")
            if before is not None:
                steps, values = np.append(0, steps), np.append(before, values)
            if len(steps):
                accuracy.plot(steps, 100 * values, style, markersize=4, color=colour, label=f"{name}: {label}")
        warmup = max((r["step"] for r in records if r["phase"] == "warmup"), default=0)
        for axis in axes.flat:
            axis.axvspan(0, warmup, color="0.93", zorder=-1)
    for axis, title in (
        (decision, "p_t: probability of an SFT step; of a mixture, the share of SFT"),
        (norms, "gradient norm of the SFT loss"),
        (rewards, "mean reward of the GRPO samples"),
        (accuracy, "greedy accuracy on unseen problems, %"),
        (groups, "share of GRPO groups that are all right or all wrong"),
        (completions, "share of GRPO completions cut off, or without an answer"),
    ):
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    decision.set_ylim(0, 1)
    norms.set_yscale("log")
    for axis in (rewards, groups, completions):
        axis.set_ylim(0, 1)
    lowest, highest = rewards.dataLim.intervaly
    rewards.set_ylim(min(0, lowest), max(1, highest))
    accuracy.set_ylim(0, 100)
    for axis in axes[-1]:
        axis.set_xlabel("step (warm-up shaded)")
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, help="PNG to write (default: metrics.png in the first run's folder)")
    parser.add_argument("--smooth", type=int, default=20, help="dots that the running mean takes in (default 20)")
    args = parser.parse_args(argv)
    out = args.out or args.runs[0] / "metrics.png"
    try:
        picture(args.runs, max(args.smooth, 1)).savefig(out, dpi=110)
    except (ValueError, OSError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
