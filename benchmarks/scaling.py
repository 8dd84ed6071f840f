"""One GRPO step by several processes: what each phase takes, and what goes between them.

    python benchmarks/scaling.py                              # 1 and 2 processes; on a GPU each, if there are that many
    python benchmarks/scaling.py --ranks 1 2 4 8 --model Qwen/Qwen2.5-0.5B
    python benchmarks/scaling.py --ranks 1 2 --shard          # FSDP2

Two questions, so two tables: does a step of fixed size get faster (16 prompts x 8 completions in all), and does one
that grows with the processes stay as fast (16 prompts for each)? The reward is a hash of the text, so that no group
agrees and none is skipped. `exchange` is the time in `run/parallel.py` between processes, waiting for the slowest
included; it is part of the other phases. Bytes are those of the gradients, at the rate of an all-reduce of their size.

On two cores with a thread a process this shows no more than that nothing is serial which should not be.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import zlib
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if sys.path[1] == str(Path(__file__).resolve().parent):  # Python put it there: its rollout.py is not the sampler
    sys.path.pop(1)

import torch

import sasr
from benchmarks.common import about, add_device_flag, answer, chosen_device, emit, in_child, say
from benchmarks.step import now, timed
from run import parallel

PROMPTS, GROUP = 16, 8


def measure(request: dict) -> dict:
    """Of one process of several: medians over steps, the first of which is not counted."""
    parallel.join()
    flags = {key: request[key] for key in ("model", "device", "shard") if request[key]}
    prompts = PROMPTS * (parallel.RANKS if request["grows"] else 1)
    config = sasr.Config(
        **flags, controller="grpo", warmup_steps=0, steps=request["steps"], lr=1e-9, lr_schedule="constant",
        prompts_per_step=prompts, group_size=GROUP, max_new_tokens=request["new_tokens"], ood_task="none",
    )  # fmt: skip
    trainer = sasr.Trainer(config)
    task, phases, taken = trainer.task.source, {}, []

    def verify(text, example):
        return dataclasses.replace(task.grade(text, example), reward=zlib.crc32(text.encode()) % 997 / 997)

    trainer.task.source = dataclasses.replace(task, verify=verify)
    with mock.patch.multiple(
        sasr,
        sample=timed(phases, "rollout", sasr.sample),
        add_samples=timed(phases, "rewards", sasr.add_samples),
        update=timed(phases, "update", sasr.update),
    ), mock.patch.multiple(
        parallel,
        gather=timed(phases, "exchange", parallel.gather),
        add_up=timed(phases, "exchange", parallel.add_up),
    ):  # fmt: skip
        for _ in range(request["steps"]):
            before, started = dict(phases), now()
            trainer.state.finish_step(trainer.step(), 0.0)
            taken.append({"step": now() - started} | {name: phases[name] - before.get(name, 0.0) for name in phases})
    row = {name: statistics.median(step.get(name, 0.0) for step in taken[1:]) for name in taken[-1]}
    row["bytes"] = 4 * sum(p.numel() for _, p in trainer.model.trained_parameters())
    return row | {"all_reduce": all_reduce_seconds(row["bytes"], trainer.device)}


def all_reduce_seconds(size: int, device: torch.device) -> float:
    """Of so many bytes; 0 for one process."""
    if parallel.RANKS == 1:
        return 0.0
    flat, seconds = torch.zeros(size // 4, device=device), []
    for _ in range(6):
        started = now()
        parallel.add_up([flat])
        seconds.append(now() - started)
    return statistics.median(seconds[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device_flag(parser)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of processes (default 1 2)")
    parser.add_argument("--model", default="", help="checkpoint (default: the small model, from scratch)")
    parser.add_argument("--new-tokens", type=int, default=128, help="of a completion at most (default 128)")
    parser.add_argument("--steps", type=int, default=6, help="steps, the first of which is not counted (default 6)")
    parser.add_argument("--shard", action="store_true", help="share out the weights, too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return parallel.leave(answer(measure, args.child))  # rank 0 alone is heard
    device = chosen_device(args.device)
    threads = max(1, (os.cpu_count() or 1) // max(args.ranks))
    begin, failed = about("scaling", device), False
    request = {"model": args.model, "device": args.device, "steps": args.steps, "new_tokens": args.new_tokens}
    for grows in (False, True):
        say(
            f"\n{'16 prompts for each process' if grows else '16 prompts in all'}, seconds, {threads} threads a process"
        )
        say(
            f"{'processes':>9}{'step':>8}{'ratio':>7}{'rollout':>9}{'rewards':>9}{'update':>8}{'exchange':>10}{'MB':>7}{'MB/s':>8}"
        )
        first = None
        for ranks in args.ranks:
            more = {"grows": grows, "threads": threads, "shard": args.shard and ranks > 1}
            launcher = () if ranks == 1 else ("-m", "torch.distributed.run", f"--nproc-per-node={ranks}")
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            row = in_child(__file__, request | more, launcher=launcher, environment=environment)
            emit(begin | request | more | {"ranks": ranks} | row)
            if "error" in row:
                failed = True
                say(f"{ranks:9}  {row['error']}")
                continue
            first = first or row["step"]
            rate = row["bytes"] / 1e6 / row["all_reduce"] if row["all_reduce"] else 0.0
            cells = f"{row['rollout']:9.3f}{row['rewards']:9.3f}{row['update']:8.3f}{row.get('exchange', 0.0):10.3f}"
            say(f"{ranks:9}{row['step']:8.3f}{first / row['step']:7.2f}{cells}{row['bytes'] / 1e6:7.1f}{rate:8.0f}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
