"""What came of the study of methods.py: each method over its seeds, and how it differs from SASR with the same seed.

    python benchmarks/findings.py D        # a stage: a table, differences, a JSON line
    python benchmarks/findings.py signs    # does what SFT looks like early in a run predict where the run ends?

Only lines of the runs that methods.py plans count. An interval is Student's t, 95%, of the mean over seeds. One
comparison was written down before any of its runs, PRIMARY; the others describe, and prove nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import methods
from benchmarks.compare import interval

PRIMARY = ("sasr", "random")  # stage D, greedy accuracy in domain at the end


def results(stage: str) -> dict[str, list[dict]]:
    """The lines of a stage by name, each list by seed."""
    lines = methods.finished()
    found: dict[str, list[dict]] = {}
    for job in methods.STAGES[stage](lines):
        found.setdefault(job.name, [])
        if job.is_that_of(line := lines.get(job.key)):
            found[job.name].append(line)
    return {name: sorted(of_name, key=lambda line: line["seed"]) for name, of_name in found.items() if of_name}


def strays(groups: dict[str, list[dict]]) -> list[str]:
    """Runs that began elsewhere than most of their seed did. The warm-up of another machine, say, is rounded otherwise,
    and the same seed then ends at another policy."""
    begun: dict[tuple, dict[tuple, list[str]]] = {}
    for line in (line for lines in groups.values() for line in lines):
        until, curve = line["summary"]["warmup_steps"], line["curves"].get("sft/loss", [])
        losses = tuple(loss for end, loss, _ in curve if end <= until)
        begun.setdefault(warmup_of(line), {}).setdefault(losses, []).append(f"{line['name']}, seed {line['seed']}")
    apart = [sorted(warmups.values(), key=len)[:-1] for warmups in begun.values()]
    return [name for of_setting in apart for names in of_setting for name in names]


def warmup_of(line: dict) -> tuple:
    """Equal for runs that are meant to branch off one warm-up."""
    config = line["config"]
    return line["seed"], line["summary"]["warmup_steps"], config["task"], config["warmup_task"]


def method_of(line: dict) -> tuple:
    """Equal for runs that differ in their rates, which a name may end in, or their seeds."""
    return re.sub(r"( [\d.e-]+)+$", "", line["name"]), line["config"]["task"]


# ----------------------------------------------------------------------------- figures of a run


def figures(line: dict) -> dict[str, float]:
    """In percent: accuracies, from more examples where the run was sampled, and the share of SFT; what the run took."""
    summary = line["summary"]
    found = accuracies(line.get("sampled_final") or {"accuracy": summary["accuracy_final"]})
    found["warm-up"] = warmed_up(line)["end"]
    found["gain"] = found["end"] - found["warm-up"]
    _, passes, trained, of_sft = map(sum, zip((0.0,) * 4, *work(line), strict=True))
    found |= {"SFT": 100 * of_sft / trained} if trained else {}
    minutes = (summary["seconds"] - summary["seconds_eval"] - summary["seconds_warmup"]) / 60
    return found | {"passes": passes / 1e6, "minutes": minutes}


def warmed_up(line: dict) -> dict[str, float]:
    """Where the run's adaptive stage began."""
    return accuracies(line.get("sampled_warmup") or {"accuracy": line["summary"]["accuracy_warmup"]})


def accuracies(scores: dict) -> dict[str, float]:
    keys = {
        "end": "accuracy",
        "pass@1": "pass@1",
        "pass@8": "pass@8",
        "ood": "accuracy_ood",
        "ood2": "accuracy_ood2",
    }
    return {label: 100 * scores[key] for label, key in keys.items() if key in scores}


def work(line: dict) -> list[tuple[float, float, float, float]]:
    """Of a kind of step in a window of adaptive steps: its end, its cost, tokens trained on, those of SFT among them.

    The cost is in forward passes of a token (2 FLOPs a parameter): one to draw a token, three to read it in an update.
    """
    found = []
    for kind in ("sft", "grpo", "mixed"):
        sums: dict[float, dict[str, float]] = {}
        for key in ("tokens", "tokens_read", "tokens_trained", "tokens_sft"):
            for end, mean, count in line["curves"].get(f"{kind}/{key}", []):
                if end > line["summary"]["warmup_steps"]:
                    sums.setdefault(end, dict.fromkeys(("tokens_read", "tokens_trained", "tokens_sft", "tokens"), 0.0))
                    sums[end][key] = mean * count
        for end, of in sums.items():
            drawn, of_sft = (0.0, of["tokens_trained"]) if kind == "sft" else (of["tokens"], of["tokens_sft"])
            found.append((end, drawn + 3 * of["tokens_read"], of["tokens_trained"], of_sft))
    return found


def accuracy_after(line: dict, passes: float) -> float:
    """In percent, on the curve, where this much work was done; between evaluations on a straight line."""
    spent, points = work(line), []
    for step, accuracy in line["curves"]["eval/accuracy"]:
        if step >= line["summary"]["warmup_steps"]:
            points.append((sum(cost for end, cost, *_ in spent if end <= step), 100 * accuracy))
    return float(np.interp(passes, *zip(*points, strict=True)))


# ----------------------------------------------------------------------------- statistics


def paired(some: dict[int, dict], others: dict[int, dict], label: str) -> list[float]:
    """Differences of a figure between runs with the same seed, of those that have it."""
    return [of[label] - others[seed][label] for seed, of in some.items() if label in others.get(seed, {})]


def sign_flip(differences: list[float]) -> float:
    """Two-sided p, exact: how often the mean is as far from 0 if each difference could as well have the other sign."""
    observed = abs(sum(differences)) - 1e-9
    flips = list(itertools.product((1, -1), repeat=len(differences)))
    return sum(abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= observed for signs in flips) / len(
        flips
    )


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's: the correlation of the ranks, of which equal values share the mean."""

    def ranks(values: list[float]) -> list[float]:
        return [(sum(v < value for v in values) + sum(v <= value for v in values) + 1) / 2 for value in values]

    return statistics.correlation(ranks(x), ranks(y))


# ----------------------------------------------------------------------------- tables

COLUMNS = {"gain": 1, "least": 1, "equal": 1, "pass@1": 1, "pass@8": 1, "ood": 1, "ood2": 1}  # with their digits
COLUMNS |= {"SFT": 0, "passes": 1, "minutes": 1}
WARM = "warmed up on knights and knaves"
BASES = {"B": "as in A", "H": WARM, "H2": WARM}  # what others are compared with; elsewhere SASR
WARMED_UP = "after the warm-up"


def by_seed(groups: dict[str, list[dict]], stage: str) -> dict[str, dict[int, dict[str, float]]]:
    """Figures by name and seed; also where a base began.

    `equal`: accuracy on the curve at the work of the method that did least.
    """
    found = {name: {line["seed"]: figures(line) for line in lines} for name, lines in groups.items()}
    least = 1e6 * min(statistics.mean(of["passes"] for of in each.values()) for each in found.values())
    for name, lines in groups.items():
        for line in lines:
            found[name][line["seed"]]["equal"] = accuracy_after(line, least)
    for base in dict.fromkeys(base_of(name, stage) for name in groups if base_of(name, stage) in groups):
        found[WARMED_UP + amount_in(base)] = {line["seed"]: warmed_up(line) for line in groups[base]}
    return found


def base_of(name: str, stage: str) -> str:
    return BASES.get(stage, "sasr" + amount_in(name))


def amount_in(name: str) -> str:
    """Of `sft of 50` the part from ` of` on, if there is one."""
    return name[name.index(" of ") :] if " of " in name else ""


def means(found: dict[str, dict[int, dict]]) -> dict[str, dict]:
    """By name: the seeds; mean, interval and worst seed of `end`; `least` gain; the mean of each other figure."""
    rows = {}
    for name, of_seed in found.items():
        each = list(of_seed.values())
        ends = [of["end"] for of in each]
        rows[name] = {"seeds": len(each), "end": statistics.mean(ends), "half": interval(ends), "worst": min(ends)}
        rows[name] |= {label: statistics.mean(of[label] for of in each) for label in COLUMNS if label in each[0]}
        rows[name] |= {"least": min(of["gain"] for of in each)} if "gain" in each[0] else {}
    return rows


def table(found: dict[str, dict]) -> str:
    width = max(map(len, found)) + 1
    rows = [f"{'':{width}}{'seeds':>6}{'end':>13}{'worst':>7}" + "".join(f"{label:>8}" for label in COLUMNS)]
    for name, of in found.items():
        end = f"{of['end']:.1f}{plus_minus(of['half'])}"
        cells = (f"{of[label]:8.{digits}f}" if label in of else f"{'-':>8}" for label, digits in COLUMNS.items())
        rows.append(f"{name:{width}}{of['seeds']:6}{end:>13}{of['worst']:7.1f}" + "".join(cells))
    return "\n".join(rows)


def plus_minus(half: float | None) -> str:
    return "" if half is None else f" ± {half:.1f}"


def differences(found: dict[str, dict[int, dict]], stage: str) -> dict[str, dict]:
    """By name: what the base has more than it, in points, over the seeds of both; at the end and at equal work."""
    rows = {}
    for name, others in found.items():
        base = base_of(name, stage)
        some = found.get(base, {}) if name != base else {}
        if points := paired(some, others, "end"):
            rows[name] = {"base": base, "seeds": len(points), "mean": statistics.mean(points)}
            rows[name] |= {"half": interval(points), "least": min(points), "most": max(points)}
            rows[name]["sign_flip_p"] = sign_flip(points)
            if equal := paired(some, others, "equal"):
                rows[name] |= {"equal": statistics.mean(equal), "equal_half": interval(equal)}
    return rows


def spread(lines: list[dict]) -> str:
    """Of SFT norms at fixed weights, one batch each."""
    rows = ["the norm over batches of demonstrations, at the weights after the warm-up"]
    for line in lines:
        norms, last = line["norms"], line["summary"]["g_warmup"]
        mean, deviation = statistics.mean(norms), statistics.stdev(norms)
        text = f"  seed {line['seed']}: {len(norms)} batches, mean {mean:.2f}, standard deviation {deviation:.2f}, "
        rows.append(text + f"{min(norms):.2f} to {max(norms):.2f}; the last of the warm-up was {last:.2f}")
    return "\n".join(rows)


SIGNS = {"SFT norm": ("sft/grad_norm", "mixed/grad_norm_sft"), "SFT loss": ("sft/loss", "mixed/loss_sft")}
AMONG = {"warm-up": warmup_of, "method": method_of}
ENOUGH = 4  # runs that a rank correlation is taken of


def early_signs(stages: tuple[str, ...]) -> str:
    """Rank correlations of what a run's first tenth of steps show with its gain, means over warm-ups or methods.

    Runs with other warm-ups and methods are not ranked together: these, not the signs, would make the correlation.
    """
    rows = [f"{'rank correlation with the gain':36}" + "".join(f"{sign:>38}" for sign in SIGNS)]
    for stage in stages:
        lines = [line for of_name in results(stage).values() for line in of_name]
        for what, key in AMONG.items():
            cells = [sign_cell(lines, key, sign) for sign in SIGNS]
            if any(cells):
                rows.append(f"{f'{stage}, among the runs of a {what}':36}" + "".join(f"{c:>38}" for c in cells))
    return "\n".join(rows)


def sign_cell(lines: list[dict], key: Callable, sign: str) -> str:
    """How many runs in how many groups, the mean correlation of the groups, and its range; "" without a group."""
    points: dict[tuple, list[tuple]] = {}
    for line in lines:
        if (value := early(line, sign)) is not None:
            points.setdefault(key(line), []).append((value, figures(line)["gain"]))
    columns = [list(zip(*some, strict=True)) for some in points.values() if len(some) >= ENOUGH]
    columns = [pair for pair in columns if all(len(set(column)) > 1 for column in pair)]
    found = [rank_correlation(*pair) for pair in columns]
    if not found:
        return ""
    mean, least, most = (f"{round(x, 2) + 0.0:.2f}" for x in (statistics.mean(found), min(found), max(found)))  # no -0
    return f"{sum(len(gains) for _, gains in columns)} runs in {len(found)}: {mean} ({least} to {most})"


def early(line: dict, sign: str) -> float | None:
    """Mean SFT norm or loss in the first tenth of the adaptive steps."""
    first, curves = line["summary"]["warmup_steps"], line["curves"]
    until = first + line["config"]["steps"] / 10
    points = [(mean, count) for key in SIGNS[sign] for end, mean, count in curves.get(key, []) if first < end <= until]
    return sum(mean * count for mean, count in points) / sum(count for _, count in points) if points else None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*methods.STAGES, "signs"))
    args = parser.parse_args(argv)
    if args.stage == "signs":
        print(early_signs(tuple(methods.STAGES)))
        return 0
    groups = results(args.stage)
    if not groups:
        command = f"python benchmarks/methods.py {args.stage}"
        print(f"findings.py: no run of stage {args.stage} is in: {command}", file=sys.stderr)
        return 2
    if fixed := groups.pop("fixed weights", []):
        print(f"{spread(fixed)}\n")
    if not groups:
        return 0
    each = by_seed(groups, args.stage)
    found, apart = means(each), differences(each, args.stage)
    print(table(found))
    for name in strays(groups):
        print(f"{name}: from another warm-up than the others of its seed, so not to be compared with them")
    if apart:
        print("\nhow much more one has at the end (points: mean, 95% interval; least, most; p), and at equal work")
    pairs = {name: f"{of['base']} than {name}" for name, of in apart.items()}
    width = max(map(len, pairs.values()), default=0)
    for name, of in apart.items():
        text, p = f"{of['mean']:.1f}{plus_minus(of['half'])}", f"{of['sign_flip_p']:.3f}"
        equal = f"{of['equal']:.1f}{plus_minus(of['equal_half'])}" if "equal" in of else ""
        pair = f"{pairs[name]:{width}}{of['seeds']:4} seeds"
        row = f"  {pair}{text:>13}{of['least']:8.1f}{of['most']:7.1f}{p:>7}{equal:>13}"
        print(row.rstrip())
    if args.stage == "D" and PRIMARY[1] in apart:
        p = apart[PRIMARY[1]]["sign_flip_p"]
        print(f"\nthe primary comparison, {' against '.join(PRIMARY)}: p = {p:.3f}, exact sign-flip test")
    exact = json.dumps({"stage": args.stage, "methods": found, "differences": apart})
    print(json.dumps(json.loads(exact, parse_float=lambda number: round(float(number), 3))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
