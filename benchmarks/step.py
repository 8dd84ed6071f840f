"""One whole GRPO step (rollout, rewards, log-probs, update) beside TRL's `GRPOTrainer`, split into its phases.

    pip install trl==1.16.0                         # the peer; the project itself does not need it
    python benchmarks/step.py                       # on a GPU if there is one; tables, and a line of JSON a row
    python benchmarks/step.py --device cpu --shapes small --inner-updates 2
    python benchmarks/step.py --no-peers --profile  # this project alone, and which operations take its time

Both start from the same checkpoint and take the same prompts in the same order, 8 a step with 8 completions each. The
small model is warmed up on its puzzles first, so that its completions have realistic lengths; the Qwen2.5-0.5B shape
has random weights, which hardly ever draw the one stop token among 151,936, so its completions are cut at 64. The
reward is the task's own plus a hash of the text, so that no group agrees and no update may be skipped. The learning
rate is too small to move the policy. TRL runs with its default generation and fused AdamW, without gradient
checkpointing and without a reference model; and in eight parts where the memory of a CPU does not hold the whole batch.
Text is made of tokens in our "rewards" and in TRL's "update", which is a matter of milliseconds.

Each measurement is a process of its own. Times are medians over steps, the first of which is not counted unless steps
take minutes; those of the phases are means. Peak memory is the resident set on a CPU, what PyTorch allocated on CUDA.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
import zlib
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if sys.path[1] == str(Path(__file__).resolve().parent):  # Python put it there: its rollout.py is not the sampler
    sys.path.pop(1)

import torch
from tokenizers import Tokenizer

import sasr
from benchmarks.common import (
    about,
    add_device_flag,
    answer,
    chosen_device,
    emit,
    in_child,
    peak_of_process,
    profiled,
    say,
)
from benchmarks.rollout import SHAPES
from data.batch import shuffled
from data.tokenizer import Codec
from model import ModelConfig, Transformer
from run.checkpoint import save_model
from run.setup import load_task_spec

PROMPTS, GROUP = 8, 8
TASKS = {  # prompts of 16 to 20 tokens; of about 100
    "tiny": {"task": "knights-knaves:train_size=64,test_size=8"},
    "small": {"task": "knights-knaves", "warmup_steps": 100},
    "0.5b": {"task": "knights-knaves:people=8,width=3,train_size=64,test_size=8", "vocab_size": 257},
    "1.5b": {"task": "knights-knaves:people=8,width=3,train_size=64,test_size=8", "vocab_size": 257},
}
ENGINES = ("this project", "TRL")
PHASES = ("rollout", "rewards", "log-probs", "update")


def make_checkpoint(shape: str, folder: Path, device: str) -> dict:
    """Write the model that both start from; what else they must agree on."""
    config = sasr.Config(**TASKS[shape], lr_schedule="constant", ood_task="none", device=device)
    trainer = sasr.Trainer(config)
    prompts = trainer.task.train_prompts
    if shape == "small":
        while trainer.state.step < config.warmup_steps:
            trainer.state.finish_step(trainer.step(), seconds=0.0)
        max_new_tokens = trainer.task.max_new_tokens
    else:
        spec = json.loads(trainer.codec.tokenizer.to_str())
        vocabulary = spec["model"]["vocab"]
        known = trainer.codec.tokenizer.get_vocab_size()
        vocabulary |= {f"w{i}": i for i in range(known, SHAPES[shape]["vocab_size"])}  # words no text is cut into
        trainer.codec = Codec(Tokenizer.from_str(json.dumps(spec)), trainer.codec.stop_token_ids)
        torch.manual_seed(0)
        eos = trainer.codec.stop_token_ids[0]
        trainer.model = Transformer(
            ModelConfig(**SHAPES[shape], max_position_embeddings=32768, tie_word_embeddings=True, eos_token_id=eos)
        )
        max_new_tokens = 64
    folder.mkdir()
    save_model(trainer, folder)
    return {
        "model": str(folder),
        "task": config.task,
        "max_new_tokens": max_new_tokens,
        "prompt_lengths": [min(map(len, prompts)), max(map(len, prompts))],
    }


def timed(seconds: dict, phase: str, function):
    """The function, with the time of its calls added to seconds[phase]."""

    def wrapper(*args, **kwargs):
        started = now()
        result = function(*args, **kwargs)
        seconds[phase] = seconds.get(phase, 0.0) + now() - started
        return result

    return wrapper


def now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def reward_of(task, text: str, example) -> float:
    return task.grade(text, example).reward + zlib.crc32(text.encode()) % 997 / 997


def of_this_project(request: dict) -> dict:
    config = sasr.Config(
        model=request["model"],
        task=request["task"],
        max_new_tokens=request["max_new_tokens"],
        controller="grpo",
        warmup_steps=0,
        steps=request["steps"],
        lr=1e-9,
        lr_schedule="constant",
        prompts_per_step=PROMPTS,
        group_size=GROUP,
        inner_updates=request["inner_updates"],
        ood_task="none",
        device=request["device"],
    )
    trainer = sasr.Trainer(config)
    task = trainer.task.source

    def verify(text, example):
        return dataclasses.replace(task.grade(text, example), reward=reward_of(task, text, example))

    trainer.task.source = dataclasses.replace(task, verify=verify)
    phases: dict[str, float] = {}
    steps, tokens = [], []
    with mock.patch.multiple(
        sasr,
        sample=timed(phases, "rollout", sasr.sample),
        add_samples=timed(phases, "rewards", sasr.add_samples),
        compute_logprobs=timed(phases, "log-probs", sasr.compute_logprobs),
    ):
        for _ in range(request["steps"]):
            if len(steps) == request["uncounted"]:
                begin(phases)
            started = now()
            record = trainer.step()
            steps.append(now() - started)
            tokens.append(record["tokens"])
            trainer.state.finish_step(record, steps[-1])
    result = result_of(steps, tokens, phases, request)
    if request["profile"]:
        result["profile"] = profiled(trainer.step, trainer.device)
    return result


def of_trl(request: dict) -> dict:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32)
    task = load_task_spec(request["task"], "", 0)
    order = shuffled(len(task.train), 0, request["steps"] * PROMPTS, 0, "prompts")
    on_cpu, inner = request["device"] == "cpu", request["inner_updates"]
    parts = 8 if on_cpu and model.config.vocab_size > 100_000 else 1

    def rewards(prompts, completions, index, **_):
        return [reward_of(task, text, task.train[i]) for text, i in zip(completions, index, strict=True)]

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds = []  # of each optimizer step, the rollout included where there is one

        def on_step_begin(self, *_, **__):
            if len(self.seconds) == inner * request["uncounted"]:
                begin(phases)
            self.started = now()

        def on_step_end(self, *_, **__):
            self.seconds.append(now() - self.started)

    config = GRPOConfig(
        output_dir=request["model"] + "-trl",
        per_device_train_batch_size=PROMPTS * GROUP // parts,
        gradient_accumulation_steps=parts,
        num_generations=GROUP,
        num_iterations=inner,
        max_steps=request["steps"] * inner,
        max_completion_length=request["max_new_tokens"],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        loss_type="dapo",
        learning_rate=1e-9,
        lr_scheduler_type="constant",
        shuffle_dataset=False,
        gradient_checkpointing=False,
        use_cpu=on_cpu,
        bf16=not on_cpu,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    phases: dict[str, float] = {}
    clock, tokens = Clock(), []
    trainer = GRPOTrainer(
        model,
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": task.train[i].prompt, "index": i} for i in order]),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    generate, log_probs = trainer._generate, trainer._get_per_token_logps_and_entropies

    def counted(prompts, *args, **kwargs):
        out = generate(prompts, *args, **kwargs)
        tokens.append(sum(map(len, out[1])))
        return out

    def of_old_policy(*args, **kwargs):  # inside the update it is the update's own forward
        if torch.is_grad_enabled():
            return log_probs(*args, **kwargs)
        return timed(phases, "log-probs", log_probs)(*args, **kwargs)

    trainer._generate = timed(phases, "rollout", counted)
    trainer._calculate_rewards = timed(phases, "rewards", trainer._calculate_rewards)
    trainer._get_per_token_logps_and_entropies = of_old_policy
    trainer.train()
    steps = [sum(clock.seconds[start : start + inner]) for start in range(0, len(clock.seconds), inner)]
    return result_of(steps, tokens, phases, request)


def begin(phases: dict) -> None:
    """What was measured so far is not counted."""
    phases.clear()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def result_of(steps: list[float], tokens: list[int], phases: dict[str, float], request: dict) -> dict:
    steps, tokens = steps[request["uncounted"] :], tokens[request["uncounted"] :]
    phases = {name: seconds / len(steps) for name, seconds in phases.items()}
    phases["update"] = sum(steps) / len(steps) - sum(phases.values())
    peak = torch.cuda.max_memory_allocated() if request["device"] == "cuda" else peak_of_process()
    return {
        "seconds": statistics.median(steps),
        "phases": {name: phases[name] for name in PHASES if name in phases},
        "tokens": sum(tokens) / len(tokens),
        "peak_bytes": peak,
    }


def measure(engine: str, request: dict) -> dict:
    """Runs in a process of its own."""
    chosen_device(request["device"])
    return (of_this_project if engine == ENGINES[0] else of_trl)(request)


def compare(
    common: dict, shape: str, device: str, steps: int, inner_updates: int, engines: tuple, profile: bool
) -> bool:
    """A table for a shape; whether this project was measured."""
    measured, ours = True, None
    with tempfile.TemporaryDirectory() as folder:
        shared = make_checkpoint(shape, Path(folder) / "model", device)
        uncounted = 0 if device == "cpu" and shape != "small" else 1  # a step of minutes needs no warming up
        request = shared | {"steps": steps + uncounted, "uncounted": uncounted, "profile": profile}
        request |= {"inner_updates": inner_updates, "device": device}
        say(
            f"\n{shape}: {PROMPTS} prompts of {shared['prompt_lengths'][0]} to {shared['prompt_lengths'][1]} tokens, "
            f"{GROUP} completions of at most {shared['max_new_tokens']}; {inner_updates} "
            f"update{'s' * (inner_updates > 1)} a rollout"
        )
        heads = "".join(f"{name:>10}" for name in ("seconds", "ratio", *PHASES, "tokens", "peak GB"))
        say(f"{'':14}{heads}")
        for engine in engines:
            row = in_child(__file__, engine, request)
            emit(common | {"shape": shape, "engine": engine, "inner_updates": inner_updates} | row)
            if "error" in row:
                say(f"{engine:14}not measured: {row['error']}")
                measured &= engine != ENGINES[0]
                continue
            ours = ours or row["seconds"]
            phases = "".join(f"{row['phases'].get(name, 0.0):10.3f}" for name in PHASES)
            say(
                f"{engine:14}{row['seconds']:10.3f}{row['seconds'] / ours:9.2f}x{phases}{row['tokens']:10.0f}"
                f"{row['peak_bytes'] / 1e9:10.2f}"
            )
    return measured


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device_flag(parser)
    parser.add_argument("--shapes", nargs="+", choices=("tiny", "small", "0.5b"), default=("small", "0.5b"))
    parser.add_argument("--steps", type=int, help="steps that are timed (default: small 20, else 5; 1 on a CPU)")
    parser.add_argument("--inner-updates", type=int, default=1, help="optimizer steps a rollout (default 1)")
    parser.add_argument("--no-peers", action="store_true", help="this project alone")
    parser.add_argument("--profile", action="store_true", help="also which operations take this project's time")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        return answer(measure, arguments.child)
    device, measured = chosen_device(arguments.device), True
    common, engines = about("step", device), ENGINES[:1] if arguments.no_peers else ENGINES
    for shape in arguments.shapes:
        steps = arguments.steps or (20 if shape == "small" else 1 if device.type == "cpu" else 5)
        how = arguments.inner_updates, engines, arguments.profile
        measured &= compare(common, shape, device.type, steps, *how)
    return int(not measured)


if __name__ == "__main__":
    sys.exit(main())
