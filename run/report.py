"""What the user sees: the headline, the progress line, the tables at the end, and where a result came from."""

import contextlib
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

from baselines import Group

from .config import RunConfig
from .setup import Setup


class Progress(contextlib.AbstractContextManager):
    """One line that rewrites itself on a terminal; into a pipe or file, a fresh line every 10 seconds."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stderr
        self.live, self.last = self.stream.isatty(), float("-inf")
        self.open = False  # whether the line on the terminal has not ended

    def show(self, text: str, *, last: bool = False) -> None:
        now = time.monotonic()
        if last or now - self.last >= (0.1 if self.live else 10):
            width, self.last = shutil.get_terminal_size().columns - 1, now
            self._write("\r" + text[:width].ljust(width) if self.live else text + "\n")

    def say(self, text: str) -> None:
        """Lines that stay."""
        self._write(("\n" if self.open else "") + text + "\n")

    def _write(self, text: str) -> None:
        self.open = not text.endswith("\n")
        with contextlib.suppress(OSError):  # a closed pipe or terminal is no reason to stop
            self.stream.write(text)
            self.stream.flush()

    def __exit__(self, *_) -> None:
        if self.open:
            self._write("\n")


def say(text: str) -> None:
    Progress().say(text)


def clock(seconds: float) -> str:
    """90 -> '1:30'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def headline(trainer, out: Path) -> str:
    """What is about to happen, before anything takes time."""
    config, task, step = trainer.config, trainer.task, trainer.state.step
    parameters = sum(p.numel() for _, p in trainer.model.trained_parameters()) / 1e6
    graded_by = f", graded by {config.verifier}" if config.verifier else ""
    start = "first, an evaluation" if task.evaluated else "from the first step on"
    return "\n".join([*dropped_report(trainer), ""]) + (
        f"{config.controller} on {task.source.name}: {len(task.train_prompts)} training prompts, "
        f"{len(task.demonstrations)} with a demonstration{graded_by}\n"
        f"{parameters:.2f} M {'adapter ' if trainer.model.adapter else ''}parameters {config.model or 'from scratch'}, "
        f"on {trainer.device}; {config.warmup_steps} warm-up steps, then {config.steps} adaptive ones\n"
        f"writing to {out}; {f'resuming after step {step}' if step else start}"
    )


def dropped_report(setup: Setup) -> list[str]:
    """A line for each kind of example that will not be learnt from or graded, and for what is unusual."""
    config, task = setup.config, setup.task
    lines = []
    if task.source.skipped:
        lines.append(f"skipped {len(task.source.skipped)} bad record(s), the first: {task.source.skipped[0]}")
    why = {"prompts": "that are too long", "demonstrations": "that are too long, or whose prompts are"}
    for learnt in dict.fromkeys((task, setup.warmup_task)):  # often the same
        lines += [f"dropped {n} {kind} of {learnt.source.name} {why[kind]}" for kind, n in learnt.dropped.items() if n]
    if too_long := task.eval_prompts[: config.eval_examples].count(None):
        lines.append(f"{too_long} {config.eval_split} prompts are too long and count as wrong answers")
    if not task.evaluated:
        lines.append(f"there are no {config.eval_split} examples, so nothing is evaluated; --eval-split has the other")
    if config.ood_task == "auto" and not (setup.ood_tasks or config.data or config.reward):
        lines.append(f"there is no harder variant of {config.task} to be evaluated on; --ood-task can name one")
    if config.reward:
        lines.append(f"rewards come from {config.reward}, which is run as a program")
    return lines + setup.notes


def progress_line(config: RunConfig, state, record: dict) -> str:
    """One line of a terminal; reward and accuracy stay until there are newer ones."""
    p = f"p_sft {record['p_sft']:.2f}" if "p_sft" in record else "warm-up"
    p = f"sft {record['sft_share']:.2f}  " if record["kind"] == "mixed" and "sft_share" in record else p
    reward = "" if state.reward is None else f"reward {state.reward:.2f} "
    accuracy = f"accuracy {state.scores['accuracy']:.1%} " if state.scores else ""
    skipped = f"skipped {state.grpo_skipped} " if state.grpo_skipped else ""
    start = f"{state.step}/{config.total_steps} {record['kind']:5} {p} loss {record['loss']:.3f} "
    return f"{start}{reward}{skipped}{accuracy}left {clock(seconds_left(config, state))}"


def seconds_left(config: RunConfig, state) -> float:
    """From the mean cost of a step of each stage so far; before there is an adaptive one, its cost is a guess."""
    adaptive = state.sft_steps + state.grpo_steps + state.mixed_steps
    warmed_up = state.step - adaptive
    warmup_cost = state.seconds["warmup"] / max(warmed_up, 1)
    spent = state.seconds["sft"] + state.seconds["grpo"] + state.seconds["mixed"]
    guess = warmup_cost * config.prompts_per_step * config.group_size / config.sft_batch_size
    adaptive_cost = spent / adaptive if adaptive else guess
    steps = (config.warmup_steps - warmed_up) * warmup_cost + (config.steps - adaptive) * adaptive_cost
    evaluated = sum(step <= state.step for step in config.evaluation_steps)  # at least the one before the first step
    return steps + (len(config.evaluation_steps) - evaluated) * state.seconds["eval"] / evaluated


def closing_table(summary: dict) -> str:
    """Accuracies and costs of a finished run, and what looks wrong in it."""

    def row(label: str, cells: list) -> str:
        return f"{label:24}" + "".join(f"{cell:>9}" for cell in cells)

    lines = [row("accuracy", ["before", "warm-up", "final"])]
    of_ood = [key.removeprefix("accuracy_final") for key in summary if key.startswith("accuracy_final_ood")]
    for suffix in ["", *(of_ood or ["_ood"])]:
        label = f"out of domain {suffix.removeprefix('_ood')}".rstrip() if suffix else "in domain"
        shares = [summary.get(f"accuracy_{at}{suffix}") for at in ("before", "warmup", "final")]
        lines.append(row(label, ["-" if share is None else f"{share:.1%}" for share in shares]))
    kinds = {"warm-up": "warmup", "SFT": "sft", "GRPO": "grpo"} | ({"mixed": "mixed"} if summary["mixed_steps"] else {})
    steps = [summary[f"{kind}_steps"] for kind in kinds.values()]
    seconds = [*(summary[f"seconds_{kind}"] for kind in (*kinds.values(), "eval")), summary["seconds"]]
    lines += ["", row("", [*kinds, "eval", "all"]), row("steps", [*steps, "", sum(steps)])]
    lines.append(row("of these without signal", [""] * (len(steps) - 1) + [summary["grpo_skipped"]]))
    lines.append(row("seconds", [f"{s:.1f}" for s in seconds]))
    dropped, failed = summary["bad_steps"], summary["reward_failures"]
    if dropped or failed:
        lines += ["", f"steps dropped: {dropped}; completions for which the verifier failed: {failed}"]
    if summary["study"]:
        lines += ["", summary["study"]]
    lines += ["", *score_table(summary["scores"], "final evaluation"), f"written to {summary['out']}"]
    if summary["diagnosis"]:
        lines += ["", "what looks wrong (means are over the last quarter of the steps with samples)"]
    return "\n".join([*lines, *(f"- {finding}" for finding in summary["diagnosis"])])


def measure_rollout(groups: list[Group], rewards: torch.Tensor) -> dict[str, float | None]:
    """What the line of a step says of its samples and their rewards [Q, G]; null is what an update would measure."""
    samples = [sample for group in groups for sample in group.samples]
    correct = torch.tensor([s.grade.correct for s in samples]).view_as(rewards)  # [Q, G]
    tokens, count = sum(len(s.tokens) for s in samples), len(samples)
    of_updates = "ratio_mean ratio_max clip_fraction clip_low_fraction clip_high_fraction kl entropy sampler_gap"
    of_updates = [*of_updates.split(), "padding_fraction", "tokens_read", "tokens_trained"]
    return dict.fromkeys(of_updates) | {
        "loss": 0.0,
        "grad_norm": 0.0,
        "tokens": tokens,
        "reward_failures": sum(s.grade.failed for s in samples),
        "reward_mean": rewards.mean().item(),
        "reward_std": rewards.std(dim=1, correction=0).mean().item(),
        "zero_variance_fraction": (rewards.amax(1) == rewards.amin(1)).float().mean().item(),  # of the groups
        "all_right_fraction": correct.all(dim=1).float().mean().item(),
        "all_wrong_fraction": (~correct.any(dim=1)).float().mean().item(),
        "completion_length": tokens / count,
        "truncated_fraction": 1 - sum(s.finished for s in samples) / count,
        "unparsed_fraction": 1 - sum(s.grade.well_formed for s in samples) / count,
    }


def measure_mixing(groups: list[Group], weight: float, sft_parts: list) -> dict[str, float]:
    """The weight of SFT, or the share of prompts whose demonstration is learnt; its tokens; how many had none."""
    missing = sum(group.asked and group.demonstration is None for group in groups)
    learnt = sum(bool(group.sft) or any(s.logprobs is None for s in group.samples) for group in groups)
    tokens = sum(len(completion) for part in sft_parts for completion in part.batch.completions)
    return {"sft_share": weight or learnt / len(groups), "tokens_sft": tokens, "without_demonstration": missing}


def rollout_fault(groups: list[Group]) -> str:
    """What failed altogether, or ""; infinite or NaN, the model itself gave no probabilities."""
    samples = [sample for group in groups for sample in group.samples]
    if not math.isfinite(sum(sum(s.logprobs) for s in samples)):
        return "the sampler's probabilities are not finite"
    return "the verifier failed for every completion" if all(s.grade.failed for s in samples) else ""


def score_table(scores: dict[str, float], title: str) -> list[str]:
    """A line a score, its interval behind it."""
    lines = [f"{title:40}{'share':>8}   95% interval"] if scores else []
    for name, value in scores.items():
        base, ood, number = name.partition("_ood")
        low, high = (scores.get(f"{base}_{end}{ood}{number}") for end in ("low", "high"))
        interval = "" if low is None else f"   {low:.1%} to {high:.1%}"
        text = f"{round(value, 3) + 0.0:8.3f} nats a token" if name == "kl" else f"{value:8.1%}{interval}"  # no -0.000
        if not base.endswith(("_low", "_high")):
            lines.append(f"{name:40}{text}")
    return [*lines, ""] if lines else []


STUDY = Path(__file__).resolve().parents[1] / "benchmarks/results/methods.jsonl"
ASIDE = ("seed", "out", "device", "ood_task", "save_every")  # and all of evaluation: they leave training as it is


def published_means(config: RunConfig) -> str:
    """Mean accuracies of the study's runs of the default, if this is such a run, and of those beside them; or ""."""
    lines = map(json.loads, STUDY.read_text(encoding="utf-8").splitlines()) if STUDY.is_file() else ()
    ends, like_this = {}, False
    for line in (line for line in lines if line["stage"] == "default"):
        training = [key for key in line["config"] if key not in ASIDE and not key.startswith("eval_")]
        like_this |= all(getattr(config, key, None) == line["config"][key] for key in training)
        ends.setdefault(line["name"], []).append(line["summary"]["accuracy_final"])
    means = ", ".join(f"{name} {sum(end) / len(end):.1%} ({len(end)})" for name, end in ends.items())
    return f"in the study, mean of (seeds): {means}" if like_this else ""


def summarise(trainer, out: Path) -> dict:
    """What OUT/summary.json holds."""
    config, state = trainer.config, trainer.state
    return (
        state.accuracy
        | {name: getattr(config, name) for name in ("controller", "task", "verifier", "seed", "warmup_steps")}
        | {name: getattr(state, name) for name in ("sft_steps", "grpo_steps", "bad_steps", "reward_failures", "scores")}
        | {"config_hash": config.hash(), "g_warmup": trainer.controller.g_warmup, "out": str(out)}
        | {"study": published_means(config)}
        | {"grpo_skipped": state.grpo_skipped, "mixed_steps": state.mixed_steps, "signal": config.signal}
        | {"seconds": sum(state.seconds.values()), **{f"seconds_{kind}": s for kind, s in state.seconds.items()}}
        | provenance(trainer.device)
    )


def provenance(device: torch.device) -> dict:
    """What produced a result: versions, machine and commit."""
    ask = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        commit = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {package: metadata.version(package) for package in ("torch", "numpy", "tokenizers", "safetensors")}
    machine = f"{device.type} ({name}, {torch.get_num_threads()} threads)"
    return {"python": platform.python_version(), **versions, "device": machine, "git_commit": commit}
