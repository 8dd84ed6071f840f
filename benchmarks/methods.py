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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/methods.jsonl"
RUNS = ROOT / "runs/methods"
Lines = dict[tuple[str, str, int], dict]  # of finished runs, by stage, name and seed

# The main setting: few demonstrations, which the warm-up uses up, so that more SFT adds little, and many problems.
MAIN = {"task": "knights-knaves:demonstrations=200", "warmup_steps": 250, "ood_task": "none"}
WARMUP = {"device": "cpu", "eval_every": 100, "eval_examples": 512, "save_every": 50, "steps": 0}
ADAPTIVE = {"steps": 300, "prompts_per_step": 16, "group_size": 8, "decay_fraction": 0.3, "sft_lr": 0.0}
ADAPTIVE |= {"gamma": 1.0, "warmup_norm": "last", "current_norm": "last", "probe_every": 0}  # whatever the defaults are

# What a test looks at beside: claims of three operands, nested claims, the KL to the policy after the warm-up. (A
# fourth person is out of reach: training never shows the letter D.) Curves come from fewer puzzles, so that looking
# often costs little; a result comes from EXAMPLES, each answered greedily and with SAMPLES samples, at the end.
OOD = "knights-knaves:width=3,train_size=1,test_size=128 knights-knaves:depth=3,train_size=1,test_size=128"
CLOSELY = {"ood_task": OOD, "eval_kl": True, "eval_every": 50, "eval_examples": 256}
EXAMPLES, SAMPLES = 512, 8

COUNTDOWN = {"task": "countdown:demonstrations=1000", "warmup_steps": 400, "ood_task": "none"}

DEVELOPMENT = (100, 101, 102)
TEST = (0, 1, 2, 3, 4, 5, 6, 7)
METRICS = ("reward_mean", "completion_length", "entropy", "loss", "loss_sft", "grad_norm", "grad_norm_sft", "sft_share")
METRICS += ("tokens", "tokens_read", "tokens_trained", "tokens_sft", "seconds", "signal_groups", "truncated_fraction")
WINDOW = 10  # steps that a mean takes in


@dataclasses.dataclass
class Job:
    """A run: its stage, the name of what is compared there, its seed, and its flags, by stage of training."""

    stage: str
    name: str
    seed: int
    adaptive: dict | None  # None: they follow from a run that is not in yet
    setting: dict = dataclasses.field(default_factory=lambda: MAIN)
    replay: list[float] = dataclasses.field(default_factory=list)  # p_t of the run that it replays
    sampled: bool = False  # whether its result comes from EXAMPLES and SAMPLES

    def __post_init__(self):
        self.setting = WARMUP | self.setting | {"seed": self.seed}

    @property
    def flags(self) -> dict:
        return self.setting | ADAPTIVE | self.adaptive

    def is_that_of(self, line: dict | None) -> bool:
        """Whether a line is that of this run, and not of one with other flags."""
        if line is None or self.adaptive is None or (self.replay and sorted(self.replay) != sorted(line["p"])):
            return False
        return all(line["config"].get(key) == value for key, value in self.flags.items())

    @property
    def key(self) -> tuple[str, str, int]:
        return self.stage, self.name, self.seed

    @property
    def out(self) -> Path:
        return RUNS / "-".join([self.stage, str(self.seed), *self.name.split(), digest(self.flags, *self.replay)])

    @property
    def warmup(self) -> Path:
        return RUNS / f"warmup-{self.seed}-{digest(self.setting)}"


def digest(flags: dict, *more) -> str:
    """So that a run with other flags has another folder."""
    return hashlib.sha256((json.dumps(flags, sort_keys=True) + "".join(map(str, more))).encode()).hexdigest()[:8]


# ----------------------------------------------------------------------------- stages


def rates(lines: Lines) -> list[Job]:
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
    return [
        at_rates("A", DEVELOPMENT[0], method, rates[n])
        for n in range(6)  # so that after every sitting all methods have come equally far
        for method, rates in planned.items()
    ]


def at_rates(stage: str, seed: int, method: str, flags: dict) -> Job:
    """A run of a method that is named by its rates."""
    name = " ".join([method, *(f"{flags[key]:g}" for key in flags if key.endswith("lr"))])
    return Job(stage, name, seed, {"controller": method} | flags | BY_PROMPT.get(method, {}))


def rates_again(lines: Lines) -> list[Job]:
    """A2: three runs a method on two seeds, less those that A has. The best two of A, by the mean of their last two
    evaluations; and the third, or what lies beyond the best if that was at the edge. `random`, now with SASR's share
    instead of a half, has SASR's pairs.
    """
    one = {
        "sft": (7e-4, 3e-4, 1e-4),
        "grpo": (5e-5, 3e-5, 2e-5),
        "chord-mu": (3e-4, 1e-4, 2e-4),
        "hpt": (5e-5, 3e-4, 2e-4),
    }
    coins, beyond = ((5e-4, 5e-5), (2e-4, 5e-5), (1e-3, 5e-5)), (2e-3, 5e-5)  # the edge again, for two of three
    planned = {
        "sasr": [{"sft_lr": sft, "lr": lr} for sft, lr in coins],
        "random": [{"sft_lr": sft, "lr": lr, "sft_fraction": 0.3} for sft, lr in (*coins, beyond)],
        "sft-then-grpo": [{"sft_lr": sft, "lr": lr} for sft, lr in (coins[0], (5e-4, 3e-5), coins[2], beyond)],
    }
    planned |= {method: [{"lr": rate} for rate in some] for method, some in one.items()}
    jobs = [
        at_rates("A2", seed, method, flags)
        for seed in (DEVELOPMENT[1], DEVELOPMENT[0])
        for method, some in planned.items()
        for flags in some
    ]
    of_a = [job.flags for job in rates(lines)]
    return [job for job in jobs if job.flags not in of_a]


# Those that decide by prompt draw half of each batch from prompts that have a demonstration.
BY_PROMPT = {name: {"demonstrated_share": 0.5} for name in ("hpt", "relift", "luffy", "srft", "uft")}

# What stage A found best.
RATES: dict[str, dict] = {
    "sft": {"lr": 7e-4},
    "grpo": {"lr": 5e-5},
    "sft-then-grpo": {"sft_lr": 1e-3, "lr": 5e-5},
    "random": {"sft_lr": 1e-3, "lr": 5e-5},
    "sasr": {"sft_lr": 2e-4, "lr": 5e-5},
    "chord-mu": {"lr": 3e-4},
    "hpt": {"lr": 2e-4},
}
RATES["replay"] = RATES["sasr"]  # of which it is a copy without the timing

OPEN = {
    "as in A": {},
    "gamma 0.25": {"gamma": 0.25},
    "gamma 4": {"gamma": 4.0},
    "mean": {"warmup_norm": "mean"},
    "mean, ema": {"warmup_norm": "mean", "current_norm": "ema"},
    "probe": {"probe_every": 5},
    "loss": {"signal": "loss"},
    "kl": {"signal": "kl"},
    "moments": {"separate_moments": True},
}  # what the paper leaves open, one at a time


def open_questions(lines: Lines) -> list[Job]:
    """B: what the paper leaves open, on SASR; and the norm over 20 batches of demonstrations at fixed weights."""
    fixed = {"controller": "sft", "lr": 0.0, "steps": 20, "eval_every": 0}
    return [
        job
        for seed in DEVELOPMENT
        for job in [
            Job("B", "fixed weights", seed, fixed),
            *(Job("B", name, seed, {"controller": "sasr"} | RATES["sasr"] | more) for name, more in OPEN.items()),
        ]
    ]


def side_by_side(stage: str, seed: int, setting: dict, methods: dict[str, dict], lines: Lines, note="") -> list[Job]:
    """Runs of one seed, SASR's first: `random` gets its share of SFT steps, `replay` its p_t."""
    jobs, of_sasr = [], None
    for name, flags in methods.items():
        controller = flags.get("controller", name)
        flags, replay = {"controller": controller} | BY_PROMPT.get(controller, {}) | flags, []
        if controller in ("random", "replay") and of_sasr is None:
            flags = None
        elif controller == "random":
            flags["sft_fraction"] = round(of_sasr["kinds"].count("s") / len(of_sasr["p"]), 4)
        elif controller == "replay":
            replay = of_sasr["p"]
        jobs.append(job := Job(stage, f"{name}{note}", seed, flags, setting, replay, sampled=True))
        if name == "sasr" and job.is_that_of(line := lines.get(job.key)):
            of_sasr = line
    return jobs


def methods_of(*names: str) -> dict[str, dict]:
    return {name: RATES[name] for name in names}


def main_setting(lines: Lines) -> list[Job]:
    """D: every method of the test, in the main setting."""
    methods = methods_of("sasr", "sft", "grpo", "sft-then-grpo", "chord-mu", "hpt", "random", "replay")
    methods["sasr, half shown"] = {"controller": "sasr", "demonstrated_share": 0.5} | RATES["sasr"]
    return [job for seed in TEST for job in side_by_side("D", seed, MAIN | CLOSELY, methods, lines)]


def amounts(lines: Lines) -> list[Job]:
    """E: a quarter and four times as many demonstrations."""
    methods = methods_of("sasr", "sft", "grpo", "random")
    return [
        job
        for seed in TEST[:4]
        for n in (50, 800)
        for setting in [MAIN | CLOSELY | {"task": f"knights-knaves:demonstrations={n}"}]
        for job in side_by_side("E", seed, setting, methods, lines, f" of {n}")
    ]


def another_task(lines: Lines) -> list[Job]:
    """F: Countdown. Each method has the better of two pairs of rates, on a development seed, at the end."""
    names = ("sasr", "sft", "grpo", "sft-then-grpo", "random")
    tried = {
        name: [RATES[name], {key: 3 * rate for key, rate in RATES[name].items() if key.endswith("lr")}]
        for name in names
    }
    tuning = [
        Job("F", f"tuning {name} {n}", DEVELOPMENT[0], {"controller": name} | RATES[name] | rates, COUNTDOWN)
        for name in names
        for n, rates in enumerate(tried[name])
    ]
    if not all(job.is_that_of(lines.get(job.key)) for job in tuning):
        return tuning
    accuracy = {job.name: lines[job.key]["summary"]["accuracy_final"] for job in tuning}
    best = {name: max((0, 1), key=lambda n: accuracy[f"tuning {name} {n}"]) for name in names}
    methods = {name: RATES[name] | tried[name][best[name]] for name in names}
    setting = COUNTDOWN | CLOSELY | {"ood_task": "countdown:numbers=4,train_size=1,test_size=128"}
    return tuning + [job for seed in TEST[:5] for job in side_by_side("F", seed, setting, methods, lines)]


def bad_data(lines: Lines) -> list[Job]:
    """G: a fifth of the demonstrations are those of other puzzles."""
    setting = MAIN | CLOSELY | {"task": "knights-knaves:demonstrations=200,swapped=40"}
    methods = methods_of("sasr", "sft", "grpo")
    return [job for seed in TEST[:4] for job in side_by_side("G", seed, setting, methods, lines)]


def transfer(lines: Lines, stage: str = "H", task: str = "countdown:train_size=100") -> list[Job]:
    """H: few prompts of a task for which the model was not warmed up, or not at all."""
    setting = MAIN | CLOSELY | {"task": task, "ood_task": "none"}
    warm = {"warmed up on knights and knaves": {"warmup_task": MAIN["task"]}, "not warmed up": {"warmup_steps": 0}}
    sasr = {"controller": "sasr"} | RATES["sasr"] | {"sft_lr": 1e-3}  # the warm-up's: the demonstrations are new
    return [Job(stage, name, seed, sasr, setting | w, sampled=True) for seed in TEST[:4] for name, w in warm.items()]


def easier_transfer(lines: Lines) -> list[Job]:
    """H2: the same with two numbers instead of three, since H ended at nothing with and without a warm-up."""
    return transfer(lines, "H2", "countdown:train_size=100,numbers=2,high=30")


def others(lines: Lines) -> list[Job]:
    """I: the other methods, at the rates of the nearest of the test, beside SASR. Exploratory."""
    nearest = {"sasr": "sasr", "relift": "sasr"}
    nearest |= dict.fromkeys(("parallel", "chord-phi", "chord-reward"), "chord-mu")
    nearest |= dict.fromkeys(("rft", "luffy", "srft", "uft"), "hpt")
    methods = {name: RATES[like] for name, like in nearest.items()}
    return [job for seed in TEST[:2] for job in side_by_side("I", seed, MAIN | CLOSELY, methods, lines)]


# What sasr.py does of itself: a shorter warm-up, after which there is much left to copy, too.
DEFAULT = MAIN | {"warmup_steps": 100}


def of_default(lines: Lines) -> list[Job]:
    """The default of sasr.py on seeds of its own, and its parts alone from the same warm-up, at the same rates."""
    flags = [{"controller": name, "steps": 500, "lr": 5e-5, "sft_lr": 1e-3} for name in ("sasr", "sft", "grpo")]
    return [Job("default", of["controller"], seed, of, DEFAULT) for seed in range(16, 24) for of in flags]


STAGES: dict[str, Callable[[Lines], list[Job]]] = {
    "A": rates,
    "A2": rates_again,
    "B": open_questions,
    "D": main_setting,
}
STAGES |= {"E": amounts, "F": another_task, "G": bad_data, "H": transfer, "H2": easier_transfer, "I": others}
STAGES["default"] = of_default


# ----------------------------------------------------------------------------- running


def take(job: Job) -> dict:
    """Run a job from wherever it was left, and return its line. Raises RuntimeError with what went wrong."""
    with WARMING.setdefault(job.warmup, threading.Lock()):
        if not (job.warmup / "summary.json").is_file():
            begun = (job.warmup / "checkpoint").is_dir()
            sasr(job, *(["--resume", job.warmup] if begun else ["--out", job.warmup, *as_flags(job.setting)]))
        after_warmup = sample(job, job.warmup) if job.sampled else {}
    if not job.out.is_dir():
        copy = job.out.with_name(f"{job.out.name}.tmp")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(job.warmup, copy)
        (copy / "summary.json").unlink()  # of the warm-up; that of the whole run will say that it is done
        copy.rename(job.out)
    if not (job.out / "summary.json").is_file():
        sasr(job, "--resume", job.out, *as_flags(ADAPTIVE | job.adaptive), *replayed(job))
    at_the_end = sample(job, job.out) if job.sampled else {}
    return as_line(job) | {"sampled_warmup": after_warmup, "sampled_final": at_the_end}


WARMING: dict[Path, threading.Lock] = {}


def replayed(job: Job) -> list[str]:
    """The flag that names a run with the p_t to replay; what there is of that run is made of its line."""
    if not job.replay:
        return []
    folder = job.out.with_name(f"{job.out.name}.replay")
    folder.mkdir(exist_ok=True)
    records = ({"phase": "adaptive", "kind": "grpo", "p_sft": p} for p in job.replay)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return ["--replay", str(folder)]


def sample(job: Job, run: Path) -> dict:
    """Scores of a finished run, from more examples than its curves, and from several answers to each."""
    out = run.with_name(f"{run.name}.sampled")
    if not (out / "summary.json").is_file():
        shutil.rmtree(out, ignore_errors=True)
        flags = {key: job.setting[key] for key in ("task", "ood_task", "seed", "device")}
        flags |= {"eval_examples": EXAMPLES, "eval_samples": SAMPLES, "model": run / "model", "out": out}
        sasr(job, "--eval-only", *as_flags(flags))
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return {key: round(value, 6) for key, value in summary.items() if is_score(key)}


def is_score(key: str) -> bool:
    """And no end of an interval over problems: those over seeds are what a study is about."""
    return key.startswith(("accuracy", "pass@")) and "_low" not in key and "_high" not in key


def sasr(job: Job, *flags) -> None:
    command = ["nice", "-n", "10", sys.executable, ROOT / "sasr.py", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise RuntimeError(f"{job.stage}, seed {job.seed}, {job.name}: {reason}")


def as_flags(values: dict) -> list[str]:
    flags = []
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        flags += [flag] * value if isinstance(value, bool) else [flag, str(value)]
    return flags


def as_line(job: Job) -> dict:
    """What is kept of a finished run."""
    records = [json.loads(text) for text in (job.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((job.out / "summary.json").read_text(encoding="utf-8"))
    config = json.loads((job.out / "config.json").read_text(encoding="utf-8"))
    evaluations = [r for r in records if "eval/accuracy" in r]
    keys = sorted({key for r in evaluations for key in r if key.startswith("eval/")})
    scores = [key for key in keys if is_score(key.removeprefix("eval/")) or key == "eval/kl"]
    kept = {key: [[r["step"], r[key]] for r in evaluations if r.get(key) is not None] for key in scores}
    for kind in ("sft", "grpo", "mixed"):
        of_kind = [r for r in records if r["kind"] == kind]
        means = {f"{kind}/{key}": windows(of_kind, key) for key in METRICS}
        kept |= {key: values for key, values in means.items() if values}
    adaptive = [r for r in records if r["phase"] == "adaptive"]
    line = {"stage": job.stage, "name": job.name, "seed": job.seed}
    line["config"] = {key: value for key, value in config.items() if key not in ("out", "replay", "template_date")}
    line["summary"] = {key: value for key, value in summary.items() if key not in ("out", "diagnosis")}
    norms = [float(f"{r['grad_norm']:.4g}") for r in adaptive if r["kind"] == "sft"]
    line |= {"curves": kept, "p": [round(r["p_sft"], 6) for r in adaptive], "kinds": kinds(adaptive), "norms": norms}
    return line


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


def finished() -> Lines:
    """The lines that are in."""
    found = {}
    for number, text in enumerate(RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.is_file() else [], 1):
        try:
            line = json.loads(text)
            found[line["stage"], line["name"], line["seed"]] = line
        except (ValueError, KeyError, TypeError):
            sys.exit(f"methods.py: {RESULTS}:{number}: not the line of a run; without it, the run is taken again")
    return found


class Plan:
    """The runs of a stage, given to the workers one by one."""

    def __init__(self, stage: str):
        self.jobs_of, self.lines, self.turn = STAGES[stage], finished(), threading.Condition()
        self.begun: set[tuple] = set()  # here
        self.ended, self.stopped, self.started = 0, False, time.monotonic()

    @property
    def jobs(self) -> list[Job]:
        return self.jobs_of(self.lines)

    def missing(self) -> list[Job]:
        return [job for job in self.jobs if not job.is_that_of(self.lines.get(job.key))]

    def work(self) -> None:
        """Take one run after the other, until there are none that could be taken."""
        while job := self.next_job():
            line = None
            try:
                line = take(job)
            except (RuntimeError, OSError, ValueError, KeyError) as error:
                print(f"methods.py: {error}", file=sys.stderr, flush=True)
            with self.turn:
                self.ended += 1
                if line:
                    self.keep(job, line)
                self.turn.notify_all()

    def keep(self, job: Job, line: dict) -> None:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.lines[job.key] = line
        jobs, missing = len(self.jobs), len(self.missing())
        hours = (time.monotonic() - self.started) / self.ended * missing / 3600
        left = f"{jobs - missing} of {jobs} runs are in; about {hours:.1f} hours left"
        print(f"{job.name}, seed {job.seed}: {line['summary']['accuracy_final']:.1%}; {left}", flush=True)

    def next_job(self) -> Job | None:
        """A run that nobody has begun; waits for those that are under way, from which others may follow."""
        with self.turn:
            while True:
                left = (job for job in self.missing() if job.key not in self.begun and job.adaptive is not None)
                if not self.stopped and (job := next(left, None)):
                    self.begun.add(job.key)
                    return job
                if self.stopped or len(self.begun) == self.ended:
                    return None
                self.turn.wait()


def table(jobs: list[Job], lines: Lines) -> str:
    """A row a run: accuracy after the warm-up, along the way and at the end, in percent, and what it cost."""
    rows = [f"{'':28}{'seed':>5}{'SFT':>5}{'GRPO':>6}{'mixed':>6}{'min':>6}  accuracy, % (step)"]
    for job in jobs:
        if job.is_that_of(line := lines.get(job.key)):
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
    plan = Plan(args.stage)
    if args.list:
        print("\n".join(f"{job.name}, seed {job.seed}" for job in plan.missing()))
    if args.table:
        print(table(plan.jobs, plan.lines))
    if args.table or args.list:
        return 0
    RUNS.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            for worker in [pool.submit(plan.work) for _ in range(args.jobs)]:
                worker.result()
        except KeyboardInterrupt:  # the runs at work have got it, too, and save before they end
            plan.stopped = True
    print(table(plan.jobs, plan.lines))
    return 1 if plan.missing() else 0


if __name__ == "__main__":
    sys.exit(main())
