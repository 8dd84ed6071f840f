"""Draw what happened in one or more runs: p_t, SFT gradient norm, reward, accuracy, and what GRPO had to learn from.

    python benchmarks/plot.py runs/x [runs/y ...] --out picture.png
    python benchmarks/plot.py --stage D --out picture.png      # of the study, methods.py: every method over its seeds
    python benchmarks/plot.py --stage D --methods sasr,random,grpo,sft --out picture.png

Of runs: warm-up is shaded; dots are single steps, lines are running means (over as many dots as --smooth says). The
dotted line is G_warmup, the yardstick of p_t, where the run has ended and left a summary. Of the study: lines are means
over seeds, bands their 95% intervals (of two seeds what lies between them), and steps, as points gained, are counted
from the end of the warm-up.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks import findings
from benchmarks.compare import interval, read_metrics


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


def log_scale(axis) -> None:
    """With plain numbers beside it."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


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
    log_scale(norms)
    for axis in (rewards, groups, completions):
        axis.set_ylim(0, 1)
    lowest, highest = rewards.dataLim.intervaly
    margin = 0.05 * (max(1, highest) - min(0, lowest))  # so that no dot lies on the frame
    rewards.set_ylim(min(0, lowest - margin), max(1, highest))
    accuracy.set_ylim(0, 100)
    for axis in axes[-1]:
        axis.set_xlabel("step (warm-up shaded)")
    return figure


# ----------------------------------------------------------------------------- the study

Curve = dict[float, float]  # a figure by adaptive step


def curve(line: dict, *keys: str) -> Curve:
    """What the line has under these keys, from the end of the warm-up on. (A mixture has SFT steps in the warm-up.)"""
    first = line["summary"]["warmup_steps"]
    points = [point for key in keys for point in line["curves"].get(key, [])]
    return {step - first: value for step, value, *_ in points if step >= first}


def decisions(line: dict) -> Curve:
    """p_t, or of a mixture the share of SFT: means over the steps of a window."""
    width = findings.methods.WINDOW  # as the other curves have
    if shares := curve(line, "mixed/sft_share"):
        return shares
    return {end: statistics.mean(line["p"][end - width : end]) for end in range(width, len(line["p"]) + 1, width)}


def gain(values: Curve) -> Curve:
    """In points, since the first evaluation, at the warm-up's end: seeds differ by more there than methods do later."""
    return {step: 100 * (value - values[min(values)]) for step, value in values.items()}


NORM = "gradient norm of the SFT loss"
PANELS = {
    "accuracy in domain, points gained": lambda line: gain(curve(line, "eval/accuracy")),
    "accuracy on {ood}, points gained": lambda line: gain(curve(line, "eval/accuracy_ood")),
    "accuracy on {ood2}, points gained": lambda line: gain(curve(line, "eval/accuracy_ood2")),
    "p_t; of a mixture, the share of SFT": decisions,
    NORM: lambda line: curve(line, *findings.SIGNS["SFT norm"]),
    "mean reward of the samples": lambda line: curve(line, "grpo/reward_mean", "mixed/reward_mean"),
    "entropy of the samples, nats a token": lambda line: curve(line, "grpo/entropy", "mixed/entropy"),
    "tokens of a sample": lambda line: curve(line, "grpo/completion_length", "mixed/completion_length"),
    "KL to the policy after the warm-up, nats a token": lambda line: curve(line, "eval/kl"),
}


def out_of_domain(lines: list[dict]) -> dict[str, str]:
    """The tasks that stand for {ood} and {ood2} in a title, without their sizes."""
    tasks = max((line["config"]["ood_task"].replace("none", "").split() for line in lines), key=len)
    tasks = [re.sub(r",\w+_size=\d+", "", task) for task in tasks]
    return dict(zip(("ood", "ood2"), [*tasks, "another task", "another task"], strict=False))


def study(stage: str, names: str | None = None):
    """Every method of a stage in one colour, over the adaptive steps."""
    groups = findings.results(stage)
    shown = names.split(",") if names else list(groups)
    if missing := sorted(set(shown) - set(groups)):
        raise ValueError(f"--methods {missing[0]}: stage {stage} has {', '.join(groups) or 'no run yet'}")
    if not groups:
        raise ValueError(f"--stage {stage}: no run is in: python benchmarks/methods.py {stage}")
    figure, axes = plt.subplots(3, 3, figsize=(13, 10), sharex=True, constrained_layout=True)
    colours = plt.get_cmap("tab10" if len(groups) <= 10 else "tab20").colors
    colour_of = {name: colours[index % len(colours)] for index, name in enumerate(groups)}  # in every picture the same
    others = out_of_domain([line for name in shown for line in groups[name]])
    for (title, measure), axis in zip(PANELS.items(), axes.flat, strict=True):
        for name in shown:
            band(axis, [measure(line) for line in groups[name]], colour_of[name], name)
        axis.set_title(title.format(**others), fontsize=10)
        axis.grid(alpha=0.3)
        if not axis.lines:
            axis.text(0.5, 0.5, "not measured in this stage", transform=axis.transAxes, ha="center", color="0.5")
        if title == NORM and axis.lines:
            log_scale(axis)
            axis.set_ylim(bottom=min(min(line.get_ydata()) for line in axis.lines) / 2)  # a band may reach below 0
    for axis in axes[-1]:
        axis.set_xlabel("step after the warm-up")
    handles = {line.get_label(): line for axis in axes.flat for line in axis.lines}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 6))
    return figure


def band(axis, curves: list[Curve], colour, name: str) -> None:
    """The mean at each step over the seeds that have it, and how far they are apart."""
    steps = sorted({step for values in curves for step in values})
    if steps:
        at = [[values[step] for values in curves if step in values] for step in steps]
        axis.plot(steps, [statistics.mean(values) for values in at], color=colour, label=name)
        axis.fill_between(steps, *zip(*map(ends, at), strict=True), color=colour, alpha=0.12, linewidth=0)


def ends(values: list[float]) -> tuple[float, float]:
    """Of the 95% interval of the mean; of two values, whose interval is too wide to say anything, these two."""
    mean, half = statistics.mean(values), interval(values)
    return (mean - half, mean + half) if len(values) > 2 else (min(values), max(values))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--stage", choices=tuple(findings.methods.STAGES), help="draw this stage of the study instead")
    parser.add_argument("--methods", help="of that stage, these only, in this order, with commas between them")
    parser.add_argument("--out", type=Path, help="PNG to write (default: metrics.png in the first run's folder)")
    parser.add_argument("--smooth", type=int, default=20, help="dots that the running mean takes in (default 20)")
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.stage) or (args.stage and not args.out):
        parser.error("name runs, or a --stage and --out")
    out = args.out or args.runs[0] / "metrics.png"
    try:
        figure = study(args.stage, args.methods) if args.stage else picture(args.runs, max(args.smooth, 1))
        figure.savefig(out, dpi=110)
    except (ValueError, OSError) as error:
        print(f"plot.py: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
