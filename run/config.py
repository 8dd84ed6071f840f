"""The configuration of a run: its fields, flags and presets, their checks, and what a resume may change.

One object holds all that a run depends on. The fields here belong to any run; those of the method stand in
`sasr.Config`, which inherits them. A field is a flag: `group_size` is `--group-size`.
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Self

from baselines import METHODS, PUBLISHED, Method, make_method, may_choose_grpo
from data.files import check_number
from data.task import MAX_REWARD
from model import MAX_RANK, PROJECTIONS, read_adapter
from rollout import MIN_TEMPERATURE

PATHS = ("data", "reward", "model", "adapter", "replay")  # a run keeps these absolute, and each may be moved
MAX = 10**7  # the largest value of any number but the seed: no run could use more


def option(default, help: str, *, choices: str | list[str] = "", low: float = 0, high: float = MAX, **more):
    """A field. group: it begins a group of --help. resumable: it may change on --resume, past steps stay true.

    adaptive: it may change as long as no step of the adaptive stage has been taken, which it alone concerns.
    several: the flag may be given more than once, and its values are words of the field.
    """
    names = tuple(choices.split() if isinstance(choices, str) else choices)
    rules = {"help": help, "choices": names, "low": low, "high": high, "group": "", "resumable": False}
    return dataclasses.field(default=default, metadata=rules | {"adaptive": False, "several": False} | more)


resumable = partial(option, resumable=True)
adaptive = partial(option, adaptive=True)


@dataclasses.dataclass
class RunConfig:
    """What any run depends on, whatever the method."""

    task: str = option(
        "knights-knaves:demonstrations=200", "NAME[:key=value,...], as in countdown:numbers=4", group="what to learn"
    )
    data: str = resumable("", "folder with train.jsonl and test.jsonl (or .json) of the task ('': generate it)")
    skip_bad_lines: bool = option(False, "leave out records of --data that cannot be read, and say how many")
    verifier: str = option(
        "auto",
        "how answers are compared, e.g. rules, math-verify, numeric, regex ('': the task's own way; auto: that, "
        "but for math math-verify where it is installed)",
    )
    reward: str = resumable("", "FILE.py:FUNCTION or MODULE:FUNCTION, to be run; 1 or more is right ('': the verifier)")
    reward_seconds: float = resumable(10.0, "time limit for a completion: --reward, math-verify, regex", low=0.001)
    reward_on_error: str = resumable("0", "reward where such a verifier raises, hangs or returns no number; or stop")
    ood_task: str = option("auto", "out-of-domain test, NAME[:key=value,...] or none; auto: a harder one", several=True)
    warmup_task: str = option("", "warm up on this task instead, as NAME[:key=value,...] ('': the task itself)")

    model: str = resumable("", "checkpoint directory or hub id to start from ('': from scratch)", group="the model")
    prompt_format: str = option("raw", "the text, or a message in --model's chat template", choices="raw chat")
    system: str = option("", "chat: the system message ('': what the template says by itself)")
    template_args: str = option("", """chat: further variables of the template, '{"enable_thinking": false}'""")
    template_date: str = option("", "chat: when it is, for a template that prints the date ('': when the run began)")
    save_dtype: str = resumable("same", "of OUT/model; same: --model's own", choices="same float32 bfloat16 float16")
    hidden_size: int = option(128, "from scratch: features", low=1)
    layers: int = option(4, "from scratch: decoder layers", low=1)
    heads: int = option(4, "from scratch: attention heads", low=1)
    vocab_size: int = option(1024, "from scratch: size of the vocabulary at most", low=257)
    lora_rank: int = option(0, "train adapters (LoRA) of this rank on a frozen --model; 0: no", high=MAX_RANK)
    lora_alpha: float = option(32.0, "an adapter is scaled by this over its rank", low=1e-6)
    lora_targets: str = option(" ".join(PROJECTIONS), "which projections get one", several=True, choices=[*PROJECTIONS])
    adapter: str = resumable("", "start from this one, a directory of peft, with its rank, alpha and targets")
    shard: bool = resumable(False, "under torchrun: share weights, gradients and moments out to the processes (FSDP2)")
    compile: bool = resumable(False, "torch.compile for training: minutes at the first steps, faster ones after")

    max_new_tokens: int = option(0, "tokens per completion; 0: 5/4 of the longest demonstration", group="sizes")
    max_prompt_tokens: int = option(0, "longer prompts are dropped; 0: what --max-new-tokens leaves of the context")
    max_demonstration_tokens: int = option(0, "longer demonstrations are dropped; 0: what the context leaves")
    gradient_checkpointing: bool = resumable(False, "recompute activations in backward: less memory, more time")
    tokens_per_microbatch: int = resumable(0, "tokens, padding included, at once; 0: 2048 on a CPU, 16384 on CUDA")
    rollout_memory: float = resumable(0.0, "GB for a rollout's cache, more goes in chunks; 0: 80% of what is free")
    offload_reference: bool = resumable(False, "keep the reference policy in CPU memory while it is not needed")

    eval_every: int = resumable(125, "steps between evaluations; 0: around the stages only", group="evaluation, files")
    eval_examples: int = resumable(512, "examples per evaluation, decoded greedily", low=1)
    eval_split: str = option("test", "which examples those are", choices="test train")
    eval_samples: int = resumable(0, "also draw this many answers to each, for pass@1, 2, 4, ...")
    eval_temperature: float = resumable(1.0, "of those samples")
    eval_kl: bool = adaptive(False, "keep the policy at the end of the warm-up, and measure the KL to it")
    save_every: int = resumable(100, "steps between checkpoints; 0: only at the end")
    max_bad_steps: int = resumable(5, "stop after this many dropped steps in a row", low=1)
    out: str = resumable("", "folder of the run ('': runs/CONTROLLER-TASK-SEED, numbered if taken)")
    seed: int = option(0, "of everything: puzzles, weights, order, alpha, samples", high=2**63 - 1)
    device: str = resumable("auto", "auto, cpu, cuda, cuda:1, ...")
    deterministic: bool = resumable(False, "on CUDA: the same bits for the same seed, slower (a CPU always gives them)")

    def __post_init__(self):
        """Raise ValueError naming the flag, the value and what is allowed."""
        for spec in dataclasses.fields(self):
            value, flag, rules = getattr(self, spec.name), flag_name(spec.name), spec.metadata
            words = (str(value).split() if rules["several"] else []) or [value]
            if spec.type in (int, float):
                check_number(flag, value, spec.type(rules["low"]), rules["high"])
            elif not isinstance(value, spec.type):
                raise ValueError(f"{flag} {value!r}: must be of type {spec.type.__name__}")
            elif rules["choices"] and not set(words) <= set(rules["choices"]):
                raise ValueError(f"{flag} {value}: choose from {', '.join(rules['choices'])}")
        for name in PATHS:
            path = path_in(name, value := getattr(self, name))
            place = Path(os.path.expanduser(path))
            if path and os.path.exists(place):  # else it is an id on the hub, or not there
                setattr(self, name, f"{place.parent.resolve() / place.name}{value.removeprefix(path)}")  # a link stays
        try:
            datetime.fromisoformat(self.template_date or today())
        except ValueError:
            raise ValueError(f"--template-date {self.template_date}: expected a form like 2026-12-31T09:30") from None
        if 0 < self.eval_temperature < MIN_TEMPERATURE:
            raise ValueError(f"--eval-temperature {self.eval_temperature}: must be 0, or at least {MIN_TEMPERATURE}")
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"--hidden-size {self.hidden_size}: must be a multiple of twice --heads {self.heads}")
        if self.adapter and (os.path.isdir(self.adapter) or not self.lora_rank):  # else it was there, and has moved
            for name, value in read_adapter(self.adapter)[0].items():
                if (asked := getattr(self, name)) not in (getattr(RunConfig, name), value):  # neither default nor its
                    raise ValueError(f"{flag_name(name)} {asked}: --adapter {self.adapter} has {value}")
                setattr(self, name, value)
        for name in ("compile", "offload_reference"):
            if self.shard and getattr(self, name):
                raise ValueError(f"{flag_name(name)}: not with --shard")
        if self.lora_rank and not self.model:
            raise ValueError("--lora-rank and --adapter need --model: a model from scratch has nothing to adapt")
        if self.reward_on_error != "stop":
            try:
                check_number("--reward-on-error", float(self.reward_on_error), -MAX_REWARD, MAX_REWARD)
            except ValueError:
                number = f"a number of at most {MAX_REWARD:g}"
                raise ValueError(f"--reward-on-error {self.reward_on_error}: must be {number}, or stop") from None
        if self.verifier == "auto":  # a run keeps it, as config.json has what is installed on this machine
            open_choice = self.task.partition(":")[0] == "math" and "verifier=" not in self.task and not self.reward
            installed = "math-verify" if importlib.util.find_spec("math_verify") else "rules"
            self.verifier = installed if open_choice else ""

    def hash(self) -> str:
        """Equal for equal values, wherever the run and its files are kept, and on any day."""
        values = dataclasses.asdict(self) | {"out": "", "template_date": ""}
        values |= {name: "a path" for name in PATHS if os.path.isabs(values[name])}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def from_json(cls, values: dict, source: Path) -> Self:
        """The configuration in a run's config.json; ValueError naming the file and what is wrong in it."""
        try:
            if unknown := set(values) - {spec.name for spec in dataclasses.fields(cls)}:
                raise ValueError(f"unknown setting {min(unknown)!r}")
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    @property
    def total_steps(self) -> int:
        return self.warmup_steps + self.steps

    @property
    def evaluation_steps(self) -> set[int]:
        """Before and after each stage, and every `eval_every` steps."""
        every = range(0, self.total_steps + 1, self.eval_every) if self.eval_every else ()
        return {0, self.warmup_steps, self.total_steps, *every}


@dataclasses.dataclass
class BaselineConfig(RunConfig):
    """What the methods of `baselines.py` depend on."""

    switch_step: int = adaptive(0, "sft-then-grpo: step at which GRPO begins; 0: half-way", group="the other methods")
    alternate: str = adaptive("1:1", "alternate: SFT steps : GRPO steps")
    sft_fraction: float = adaptive(0.5, "random: the constant p_t", high=1)
    mu: float = adaptive(0.1, "chord-phi: the constant weight of SFT", high=1)
    tau: float = adaptive(0.5, "chord-reward: the mean reward from which on SFT has no weight")
    gate: int = adaptive(0, "hpt: number of right samples up to which a prompt gets SFT instead of GRPO")
    buffer: int = adaptive(0, "relift: failed prompts that make an SFT step; 0: --sft-batch-size")
    replay: str = adaptive("", "replay: folder of the run whose p_t are taken", resumable=True)
    replay_order: str = adaptive("shuffled", "replay: order in which the p_t are taken", choices="shuffled same")

    @property
    def compares_kl(self) -> bool:
        return self.controller == "sasr" and self.signal == "kl"

    @property
    def keeps_warmed_up(self) -> bool:
        """Whether a copy of the policy at the end of the warm-up is needed."""
        return self.compares_kl or self.eval_kl

    @property
    def signal_key(self) -> str:
        """What of an SFT gradient the controller is told."""
        return "loss" if self.signal == "loss" else "grad_norm"

    def __post_init__(self):
        super().__post_init__()
        sft_steps, _, grpo_steps = self.alternate.partition(":")
        if not (sft_steps.isdecimal() and grpo_steps.isdecimal() and int(sft_steps) + int(grpo_steps) > 0):
            raise ValueError(f"--alternate {self.alternate}: expected SFT:GRPO, two whole numbers such as 2:1")
        if self.group_size == 1 and may_choose_grpo(self):
            raise ValueError("--group-size 1: a sample alone in its group has advantage 0, so GRPO needs 2 or more")
        if self.controller == "replay" and not self.replay:
            raise ValueError("--controller replay: --replay names the run whose p_t are taken")
        if self.resample_groups and METHODS.get(self.controller, Method).by_prompt:
            raise ValueError(f"--resample-groups: {self.controller} itself decides what becomes of each prompt")
        if self.compares_kl and self.probe_every:
            raise ValueError("--probe-every measures an SFT gradient, which --signal kl does not look at")
        if -1 < self.demonstrated_share < 0:
            raise ValueError(f"--demonstrated-share {self.demonstrated_share}: must be -1, or between 0 and 1")


def today() -> str:
    return datetime.now().isoformat(timespec="seconds")


def keeps_initial(config: dict) -> bool:
    """Whether the reference policy of a run is the one that it began with."""
    return bool(config["kl_coef"]) and config["reference"] == "initial"


def path_in(name: str, value: str) -> str:
    """The part of one of PATHS that may be a path: of --reward the FILE.py before :FUNCTION, or "" for a module."""
    file = value.rpartition(":")[0]
    return value if name != "reward" else file if file.endswith(".py") else ""


def flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def in_order(config_class: type[RunConfig]) -> list[dataclasses.Field]:
    """The fields of SASR first, then those of the other methods and of any run."""
    rooms = (BaselineConfig, RunConfig)
    return sorted(dataclasses.fields(config_class), key=lambda spec: sum(hasattr(room, spec.name) for room in rooms))


# ----------------------------------------------------------------------------- presets

# Values from a public recipe say which; the others are ours, chosen to fit one GPU, and not tuned. With adapters the
# rates of a preset are ten times as large, as published studies found (thinkingmachines.ai/blog/lora).
PRETRAINED = (
    {"prompt_format": "chat", "ood_task": "none", "gradient_checkpointing": True, "warmup_steps": 100, "steps": 500}
    | {"sft_batch_size": 32, "prompts_per_step": 8, "warmup_lr": 1e-5, "sft_lr": 1e-5, "decay_fraction": 0.5}
    | {"eval_every": 100, "eval_examples": 10_000}
    # verl, examples/grpo_trainer on GSM8K and MATH
    | {"lr": 1e-6, "kl_coef": 0.001, "clip_low": 0.2, "clip_high": 0.2, "max_grad_norm": 1.0}
    | {"beta2": 0.999, "weight_decay": 0.01}  # PyTorch's own beta, which most recipes keep
)
PRESETS = {
    "kk-tiny": {},  # the default: all values are those of Config, found on the generated puzzles themselves
    "countdown-tiny": {"task": "countdown", "warmup_steps": 250, "prompts_per_step": 8, "lr": 5e-4, "sft_lr": 0.0}
    | {"decay_fraction": 0.5},
    "gsm8k": PRETRAINED
    | {"task": "gsm8k", "data": "records/gsm8k", "model": "Qwen/Qwen2.5-0.5B"}
    | {"max_prompt_tokens": 512, "max_new_tokens": 512},  # verl
    "math": PRETRAINED
    | {"task": "math", "data": "records/math", "model": "Qwen/Qwen2.5-1.5B"}
    | {"max_prompt_tokens": 1024, "max_new_tokens": 1024},  # verl
    "kk": PRETRAINED
    | {"task": "knights-knaves:format=logic-rl", "data": "records/knights_knaves"}
    # Logic-RL (arXiv 2502.14768), as is the reward; it allows 4096 tokens, and the demonstrations need a tenth or two
    | {"model": "Qwen/Qwen2.5-0.5B-Instruct", "max_new_tokens": 1024, "lr": 4e-7, "temperature": 0.7, "group_size": 8}
    # After 240 demonstrations SmolLM2's SFT loss had fallen from 1.38 to 0.04, and fell no more
    | {"warmup_steps": 30},
}
PRESETS["smollm2"] = (  # an hour on two cores: benchmarks/README.md has what came of it
    PRESETS["kk"]
    | {"model": "smollm2", "data": "records/people3", "warmup_lr": 1e-4, "sft_lr": 5e-5, "lr": 1e-5, "steps": 40}
    | {"sft_batch_size": 8, "prompts_per_step": 4, "group_size": 4, "max_new_tokens": 400, "temperature": 1.0}
    | {"lr_warmup_steps": 5, "gradient_checkpointing": False, "eval_examples": 100, "eval_every": 0, "save_every": 5}
)


# ----------------------------------------------------------------------------- flags


def parse_command_line(config_class: type[RunConfig], argv: list[str] | None) -> tuple[str, dict]:
    """What to do (train, resume, eval_only or dry_run), and fields of the configuration (for resume, the new ones)."""
    values = vars(make_parser(config_class).parse_args(argv))
    values.pop("debug", None)  # `lifecycle.exit_code` reads it
    mode = values.pop("mode", "train")
    values = {name: " ".join(value) if isinstance(value, list) else value for name, value in values.items()}
    if values.pop("published", False):
        if (controller := values.get("controller")) not in PUBLISHED:
            raise ValueError(f"--published: --controller must be one of {', '.join(PUBLISHED)}")
        values = PUBLISHED[controller] | values
    if "resume" not in values:
        preset = PRESETS[values.pop("preset", "kk-tiny")]
        if values.get("lora_rank") or values.get("adapter"):
            preset = preset | {rate: 10 * preset[rate] for rate in ("warmup_lr", "sft_lr", "lr") if rate in preset}
        if values.get("data"):  # has demonstrations of its own
            preset = {"task": "knights-knaves"} | preset
        return mode, preset | values
    if "preset" in values:
        raise ValueError(f"--preset {values['preset']}: a resumed run keeps its values; name the flags to change")
    if not values["resume"]:
        raise ValueError("--resume '': name the folder of a run")
    return "resume", values


def make_parser(config_class: type[RunConfig]) -> argparse.ArgumentParser:
    """The flags of the method first, then those of any run, by group. A field that is not named stays absent."""
    parser = argparse.ArgumentParser(
        prog="sasr.py",
        usage="python sasr.py [--preset NAME | --resume RUN] [--FLAG VALUE ...]",
        description="Warm a language model up with SFT, then let its gradient norm decide between SFT and GRPO.",
        epilog="Without a flag it trains a small model on generated puzzles, on a GPU or a CPU, in minutes. Its folder "
        "holds config.json, metrics.jsonl, samples.jsonl, summary.json, checkpoint/, model/ (see run/checkpoint.py). "
        "Exit codes: 0 done, 2 bad input, 1 a fault, 128 plus the signal that stopped it (see run/lifecycle.py).",
        argument_default=argparse.SUPPRESS,
    )
    group = parser
    for spec in in_order(config_class):
        rules, flag = spec.metadata, flag_name(spec.name)
        group = parser.add_argument_group(rules["group"]) if rules["group"] else group
        text = f"{rules['help']} (default {spec.default!r})".replace("%", "%%")
        if spec.type is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
            continue
        names, action = rules["choices"], "append" if rules["several"] else "store"
        text += f": {', '.join(names)}" if names else ""
        metavar = "NAME" if names else spec.type.__name__.upper()
        group.add_argument(flag, type=spec.type, help=text, metavar=metavar, action=action)
    group = parser.add_argument_group("to begin, go on, grade or plan")
    group.add_argument("--preset", choices=tuple(PRESETS), help="values for other flags, which still override them")
    text = "what the publication of --controller sets beside its decision, over a preset: see baselines.py"
    group.add_argument("--published", action="store_true", help=text)
    modes, const = group.add_mutually_exclusive_group(), {"dest": "mode", "action": "store_const"}
    specs = in_order(config_class)
    always = ", ".join(flag_name(s.name) for s in specs if s.metadata["resumable"])
    early = ", ".join(flag_name(s.name) for s in specs if s.metadata["adaptive"] and not s.metadata["resumable"])
    text = f"go on with the run in this folder, or with --out in a branch of it; what may change: {always}"
    modes.add_argument("--resume", metavar="RUN", help=f"{text}; and up to the end of the warm-up: {early}")
    modes.add_argument("--eval-only", **const, const="eval_only", help="grade --model on the task, train nothing")
    modes.add_argument("--dry-run", **const, const="dry_run", help="say what the run would need in memory, and stop")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


# ----------------------------------------------------------------------------- resuming


def check_resume(old: RunConfig, new: RunConfig, state, named: dict, learning_rate: Callable) -> str:
    """What changes, as flags in one line. Raises ValueError naming a flag that contradicts the steps already taken.

    old: the configuration of those steps. new: that in config.json with the overrides `named`. learning_rate: a
    function of a configuration, a step and its kind. Up to the end of the warm-up it may become another kind of run.
    """
    changed, done = {}, state.step
    in_warmup = done <= old.warmup_steps
    for spec in in_order(type(new)):
        before, now = getattr(old, spec.name), getattr(new, spec.name)
        other = spec.name in PATHS and not (before and now)  # to have one or none is no move
        may_change = (spec.metadata["adaptive"] and in_warmup) or (spec.metadata["resumable"] and not other)
        if before != now and not may_change:
            where = "" if spec.name in named else f"{Path(old.out) / 'config.json'}: "
            raise ValueError(f"{where}{flag_name(spec.name)} {now}: a resumed run keeps its {before!r}")
        if before != now and spec.name != "out":
            changed[spec.name] = f"{flag_name(spec.name)} {now}"
    if done > new.total_steps:
        raise ValueError(f"--steps {new.steps}: the run has already taken {done - new.warmup_steps}")
    taken = [(step, kind) for step in range(1, done + 1) for kind in ("sft", "grpo")]
    if any(learning_rate(old, *step) != learning_rate(new, *step) for step in taken):
        raise ValueError(
            f"--steps, --decay-fraction or --lr-schedule would change the learning rate of the {done} steps already "
            "taken; a decay must begin after them, and --steps counts the whole adaptive stage"
        )
    if not in_warmup and new.controller == "replay" and new.steps > old.steps:
        raise ValueError(f"--steps {new.steps}: a replay keeps the p_t, and the {old.steps} steps, that it began with")
    if not in_warmup and new.controller != "replay":
        before, after = (make_method(config).level for config in (old, new))
        if any(before(t) != after(t) for t in range(done - new.warmup_steps)):
            raise ValueError(f"--steps {new.steps}: would change the {new.controller} schedule of steps already taken")
    idle = [text for name, text in changed.items() if name not in ("save_dtype", "device", *PATHS)]
    if idle and done == new.total_steps and state.pending is None:
        raise ValueError(
            f"{', '.join(idle)}: the run has finished, so nothing would come of it; more --steps let it go on, and "
            f"--eval-only --model {Path(old.out) / 'model'} grades it anew"
        )
    return ", ".join(changed.values())
