"""Which way to mix SFT and RL wins, and where? A study in stages; a run that has finished is a line of a results file.

    python benchmarks/methods.py A --jobs 2     # take the runs of stage A that are missing, in any number of sittings
    python benchmarks/methods.py A --list       # which those are
    python benchmarks/methods.py A --table      # what came of the others

All runs of a seed branch off one warm-up, so that methods differ in their decision and their rates alone, and all runs
of a stage take equally many steps. A process has one thread. A run leaves its folder in runs/methods/ (git ignores it)
and its line in benchmarks/results/methods.jsonl: flags, summary, means of its metrics over ten steps, the p_t of each.

Seeds from 100 on are for development: rates and settings are chosen there. Seeds from 0 on are for the test.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/methods.jsonl"
RUNS = ROOT / "runs/methods"

# The main setting: few demonstrations, which the warm-up uses up, so that more SFT adds little, and many problems.
MAIN = {"task": "knights-knaves:demonstrations=200", "warmup_steps": 250, "ood_task": "none"}
WARMUP = {"device": "cpu", "eval_every": 100, "eval_examples": 512, "save_every": 50, "steps": 0}
ADAPTIVE = {"steps": 300, "prompts_per_step": 16, "group_size": 8, "decay_fraction": 0.3}

DEVELOPMENT = (100, 101, 102)
METRICS = ("reward_mean", "completion_length", "entropy", "loss", "grad_norm", "grad_norm_sft", "sft_share", "tokens")
METRICS += ("tokens_read", "seconds", "signal_groups", "truncated_fraction")
WINDOW = 10  # steps that a mean takes in


@dataclasses.dataclass
class Job:
    """A run: its stage, the name of what is compared there, its seed, and its flags, by stage of training."""

    stage: str
    name: str
    seed: int
    adaptive: dict
    setting: dict = dataclasses.field(default_factory=lambda: MAIN)

    def __post_init__(self):
        self.setting = self.setting | {"seed": self.seed}

    @property
    def flags(self) -> dict:
        return self.setting | WARMUP | ADAPTIVE | self.adaptive

    def is_that_of(self, line: dict | None) -> bool:
        """Whether a line is that of this run, and not of one with other flags."""
        return line is not None and all(line["config"].get(key) == value for key, value in self.flags.items())

    @property
    def key(self) -> tuple[str, str, int]:
        return self.stage, self.name, self.seed

    @property
    def out(self) -> Path:
        return RUNS / "-".join([self.stage, str(self.seed), *self.name.split(), digest(self.flags)])

    @property
    def warmup(self) -> Path:
        return RUNS / f"warmup-{self.seed}-{digest(self.setting | WARMUP)}"


def digest(flags: dict) -> str:
    """So that a run with other flags has another folder."""
    return hashlib.sha256(json.dumps(flags, sort_keys=True).encode()).hexdigest()[:8]


# ----------------------------------------------------------------------------- stages


def rates() -> list[Job]:
    """A: six runs a method on one development seed. A mixture has one rate; a coin has one for each kind of step."""
    mixtures = (3e-5, 5e-5, 1e-4, 2e-4, 3e-4, 5e-4)
    one = {
        "sft": (1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3),
        "grpo": (1e-5, 2e-5, 3e-5, 5e-5, 1e-4, 2e-4),
        "chord-mu": mixtures,
        "hpt": mixtures,
    }
    two = [{"sft_lr": sft, "lr": grpo} for grpo in (3e-5, 5e-5, 1e-4) for sft in (2e-4, 5e-4)]
    planned = {method: [{"lr": rate} for rate in some] for method, some in one.items()}
    planned |= dict.fromkeys(("sasr", "random", "sft-then-grpo"), two)
    # Those that decide by prompt draw half of each batch from prompts that have a demonstration.
    share = {"hpt": {"demonstrated_share": 0.5}}
    return [
        Job("A", " ".join([method, *(f"{rate:g}" for rate in rates[n].values())]), DEVELOPMENT[0], flags)
        for n in range(6)  # so that after every sitting all methods have come equally far
        for method, rates in planned.items()
        for flags in [{"controller": method} | rates[n] | share.get(method, {})]
    ]


STAGES = {"A": rates}


# ----------------------------------------------------------------------------- running


def take(job: Job) -> dict:
    """Run a job from wherever it was left, and return its line. Raises RuntimeError with what went wrong."""
    with WARMING.setdefault(job.warmup, threading.Lock()):
        if not (job.warmup / "summary.json").is_file():
            begun = (job.warmup / "checkpoint").is_dir()
            sasr(job, *(["--resume", job.warmup] if begun else ["--out", job.warmup, *as_flags(job.setting | WARMUP)]))
    if not job.out.is_dir():
        copy = job.out.with_name(f"{job.out.name}.tmp")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(job.warmup, copy)
        (copy / "summary.json").unlink()  # of the warm-up; that of the whole run will say that it is done
        copy.rename(job.out)
    if not (job.out / "summary.json").is_file():
        sasr(job, "--resume", job.out, *as_flags(ADAPTIVE | job.adaptive))
    return as_line(job)


WARMING: dict[Path, threading.Lock] = {}


def sasr(job: Job, *flags) -> None:
    command = ["nice", "-n", "10", sys.executable, ROOT / "sasr.py", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RuntimeError(f"{job.stage}, seed {job.seed}, {job.name}: {reason}")


def as_flags(values: dict) -> list[str]:
    return [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def as_line(job: Job) -> dict:
    """What is kept of a finished run."""
    records = [json.loads(text) for text in (job.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((job.out / "summary.json").read_text(encoding="utf-8"))
    config = json.loads((job.out / "config.json").read_text(encoding="utf-8"))
    evaluations = [r for r in records if "eval/accuracy" in r]
    scores = sorted({key for r in evaluations for key in r if key.startswith("eval/")})
    kept = {key: [[r["step"], r[key]] for r in evaluations if r.get(key) is not None] for key in scores}
    for kind in ("sft", "grpo", "mixed"):
        of_kind = [r for r in records if r["kind"] == kind]
        means = {f"{kind}/{key}": windows(of_kind, key) for key in METRICS}
        kept |= {key: values for key, values in means.items() if values}
    adaptive = [r for r in records if r["phase"] == "adaptive"]
    line = {"stage": job.stage, "name": job.name, "seed": job.seed}
    line["config"] = {key: value for key, value in config.items() if key not in ("out", "replay", "template_date")}
    line["summary"] = {key: value for key, value in summary.items() if key not in ("out", "diagnosis")}
    return line | {"curves": kept, "p": [round(r["p_sft"], 6) for r in adaptive], "kinds": kinds(adaptive)}


def windows(records: list[dict], key: str) -> list[list[float]]:
    """[last step of the window, mean of the key there, how many steps have it] for each WINDOW steps."""
    found: dict[int, list[float]] = {}
    for record in records:
        if record.get(key) is not None:
            found.setdefault(-(-record["step"] // WINDOW) * WINDOW, []).append(record[key])
    return [[end, float(f"{sum(values) / len(values):.4g}"), len(values)] for end, values in found.items()]


def kinds(records: list[dict]) -> str:
    """A letter a step: s, g or m."""
    return "".join(record["kind"][0] for record in records)


def finished() -> dict[tuple, dict]:
    """The lines that are in, by stage, name and seed."""
    found = {}
    for number, text in enumerate(RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.is_file() else [], 1):
        try:
            line = json.loads(text)
            found[line["stage"], line["name"], line["seed"]] = line
        except (ValueError, KeyError, TypeError):
            sys.exit(f"methods.py: {RESULTS}:{number}: not the line of a run; without it, the run is taken again")
    return found


def table(jobs: list[Job], lines: dict[tuple, dict]) -> str:
    """A row a run: accuracy after the warm-up, along the way and at the end, in percent, and what it cost."""
    rows = [f"{'':28}{'seed':>5}{'SFT':>5}{'GRPO':>6}{'mixed':>6}{'min':>6}  accuracy, % (step)"]
    for job in jobs:
        if line := lines.get(job.key):
            s = line["summary"]
            points = [p for p in line["curves"]["eval/accuracy"] if p[0] >= s["warmup_steps"]]
            curve = "  ".join(f"{100 * share:.1f} ({step - s['warmup_steps']})" for step, share in points)
            counts = f"{s['sft_steps']:5}{s['grpo_steps']:6}{s['mixed_steps']:6}{s['seconds'] / 60:6.1f}"
            rows.append(f"{job.name:28}{job.seed:5}{counts}  {curve}")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=tuple(STAGES))
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each (default 1)")
    parser.add_argument("--list", action="store_true", help="name the runs that are missing, and stop")
    parser.add_argument("--table", action="store_true", help="show those that are in, and stop")
    args = parser.parse_args(argv)
    jobs, lines = STAGES[args.stage](), finished()
    lines = {job.key: lines[job.key] for job in jobs if job.is_that_of(lines.get(job.key))}
    missing = [job for job in jobs if job.key not in lines]
    if args.table or args.list:
        print(table(jobs, lines) if args.table else "\n".join(f"{job.name}, seed {job.seed}" for job in missing))
        return 0
    RUNS.mkdir(parents=True, exist_ok=True)
    started, writing, failed = time.monotonic(), threading.Lock(), []

    def run(job: Job) -> None:
        try:
            line = take(job)
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            failed.append(str(error))
            print(f"methods.py: {error}", file=sys.stderr, flush=True)
            return
        with writing:
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            lines[job.key] = line
            done = len(jobs) - sum(job.key not in lines for job in jobs)
            took = (time.monotonic() - started) / max(done - (len(jobs) - len(missing)), 1)
            left = f"{done} of {len(jobs)} runs are in; about {took * (len(jobs) - done) / 3600:.1f} hours left"
            print(f"{job.name}, seed {job.seed}: {line['summary']['accuracy_final']:.1%}; {left}", flush=True)

    pool = ThreadPoolExecutor(args.jobs)
    try:
        list(pool.map(run, missing))
    except KeyboardInterrupt:  # the runs at work have got it, too, and save before they end
        failed.append("interrupted")
    finally:
        pool.shutdown(cancel_futures=True)
    print(table(jobs, lines))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
