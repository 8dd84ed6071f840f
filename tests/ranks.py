"""What several processes do: started by torchrun from test_parallel.py, and used there by the one process beside it.

torchrun --nproc-per-node 2 tests/ranks.py FOLDER CASE ...      # each case leaves FOLDER/CASE.RANK.pt
"""

from __future__ import annotations

import copy
import dataclasses
import signal
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import sasr  # noqa: E402
from baselines import METHODS, SCHEDULES  # noqa: E402
from data import Grade  # noqa: E402
from run import parallel  # noqa: E402
from run.checkpoint import RunFolder, named_tensors  # noqa: E402
from run.lifecycle import Stopped  # noqa: E402

TINY = {"task": "countdown:train_size=40,test_size=6", "ood_task": "none", "device": "cpu", "warmup_steps": 2}
TINY |= {"steps": 18, "layers": 2, "hidden_size": 16, "heads": 2, "vocab_size": 300, "sft_batch_size": 5}
TINY |= {"prompts_per_step": 3, "group_size": 4, "max_new_tokens": 12, "eval_examples": 5, "eval_every": 0}
TINY |= {"lr_warmup_steps": 0, "warmup_lr": 0.02, "lr": 0.01, "tokens_per_microbatch": 120}

CONTROLLERS = [name for name in ("sasr", *SCHEDULES, *METHODS) if name != "replay"]
STEPS = {name: {"controller": name} for name in CONTROLLERS}
STEPS["sasr"] |= {"kl_coef": 0.1, "inner_updates": 2, "probe_every": 2}
STEPS["hpt"] |= {"prompts_per_step": 1, "sft_batch_size": 1, "entropy_coef": 0.01}  # less than there are ranks
STEPS["kl"] = {"controller": "sasr", "signal": "kl", "kl_target": 0.001, "eval_kl": True}
STEPS["replay"] = {"controller": "replay"}


def grade(text: str, example) -> Grade:
    """An untrained model solves nothing, and GRPO skips a step without signal: reward something else instead."""
    return Grade(len(text) % 3 / 2, len(text) % 3 == 2, well_formed=False)


def make_trainer(flags: dict) -> sasr.Trainer:
    trainer = sasr.Trainer(sasr.Config(**TINY | flags))
    trainer.task.source = dataclasses.replace(trainer.task.source, verify=grade)
    mix, trainer.seen = trainer.method.mix, []

    def seen(t, groups):
        trainer.seen = [(g.index, g.hint, [(s.tokens, s.logprobs, s.grade.reward) for s in g.samples]) for g in groups]
        return mix(t, groups)

    trainer.method.mix = seen
    return trainer


def take_step(trainer: sasr.Trainer) -> dict:
    """One step as in `sasr.loop`: what was decided and measured, the samples, and the gradient."""
    trainer.seen = []
    if trainer.state.step == 0:
        sasr.after_step(trainer)
    record = trainer.step()
    trainer.state.finish_step(record, 0.0)
    trainer.state.pending = None
    grads = [parallel.whole(p.grad).flatten() for _, p in trainer.model.trained_parameters() if p.grad is not None]
    gradient = torch.cat(grads) if grads else torch.zeros(0)
    scores = sasr.after_step(trainer)
    return {"record": record, "seen": trainer.seen, "gradient": gradient, "scores": scores}


def whole_tensors(trainer: sasr.Trainer) -> dict[str, torch.Tensor]:
    return {name: parallel.whole(t.detach()).clone() for name, t in named_tensors(trainer).items()}


def position(trainer: sasr.Trainer) -> dict:
    """All that the next step depends on."""
    tensors = whole_tensors(trainer)
    kept = {"state": dataclasses.asdict(trainer.state), "memory": trainer.method.memory}
    return copy.deepcopy({"tensors": tensors, "controller": trainer.controller.state_dict(), **kept})


def go_to(trainer: sasr.Trainer, position: dict) -> None:
    trainer.state = sasr.State(**position["state"])
    trainer.controller.load_state_dict(position["controller"])
    trainer.method.memory.update(position["memory"])
    for prefix in ("reference", "warmed_up"):
        kept = any(name.startswith(f"{prefix}.") for name in position["tensors"])
        setattr(trainer, prefix, trainer.frozen_copy() if kept else None)
    for name, tensor in named_tensors(trainer).items():
        if name.split(".")[0] in ("model", "reference", "warmed_up"):
            parallel.fill(tensor, position["tensors"][name])


def steps_alone(flags: dict, steps: int) -> list[dict]:
    """By one process: of each step where it began, and what came of it."""
    trainer, found = make_trainer(flags), []
    for _ in range(steps):
        found.append({"from": position(trainer), **take_step(trainer)})
    return found


def steps_from(flags: dict, steps: list[dict]) -> list[dict]:
    """The same steps, each from where one process began it."""
    trainer, found = make_trainer(flags), []
    for step in steps:
        go_to(trainer, step["from"])
        found.append(take_step(trainer))
    return found


def steps_free(flags: dict, steps: int) -> dict:
    """Some steps after one another, and the weights at the end."""
    trainer = make_trainer(flags)
    return {"steps": [take_step(trainer) for _ in range(steps)], "tensors": whole_tensors(trainer)}


def out_of_memory_once(flags: dict, steps: int) -> dict:
    """Rank 1 alone runs out of memory once, in the second step; all of them go on with smaller pieces."""
    trainer, inner, failed = make_trainer(flags), sasr.completion_logprobs, []

    def completion_logprobs(*args):
        if trainer.state.step == 1 and parallel.RANK == 1 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("no memory left")
        return inner(*args)

    sasr.completion_logprobs = completion_logprobs
    try:
        return {"steps": [take_step(trainer) for _ in range(steps)], "tokens": trainer.budget.tokens, "failed": failed}
    finally:
        sasr.completion_logprobs = inner


def stopped_while_rank_0_writes(flags: dict) -> dict:
    """A signal to rank 1 alone, and a slow disk: when the checkpoint is written, and when each rank goes on to end."""
    written, step, save_checkpoint = [], sasr.Trainer.step, RunFolder.save_checkpoint

    def interrupted_step(trainer):
        if parallel.RANK == 1:
            signal.raise_signal(signal.SIGINT)
        return step(trainer)

    def save_slowly(*args):
        time.sleep(0.3 * (parallel.RANK == 0))
        save_checkpoint(*args)
        written.append(time.time())

    sasr.Trainer.step, RunFolder.save_checkpoint = interrupted_step, save_slowly
    try:
        whole_run(flags)
    except Stopped:
        return {"written": written[-1], "ended": time.time()}
    finally:
        sasr.Trainer.step, RunFolder.save_checkpoint = step, save_checkpoint


def whole_run(flags: dict) -> dict:
    return sasr.train(sasr.Config(**TINY | flags))


FUNCTIONS = (steps_from, steps_free, out_of_memory_once, stopped_while_rank_0_writes, whole_run)
CASES = {function.__name__: function for function in FUNCTIONS}


def main(folder: Path, names: list[str]) -> None:
    parallel.join()
    for name in names:
        case = torch.load(folder / f"{name}.pt", weights_only=False)  # written by the test itself
        torch.save(CASES[case.pop("function")](**case), folder / f"{name}.{parallel.RANK}.pt")
    parallel.leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
