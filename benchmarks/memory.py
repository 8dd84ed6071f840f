"""What `sasr.py --dry-run` says a run needs, beside what it then takes.

    python benchmarks/memory.py                       # on a GPU if there is one; a table, and a line of JSON a row

A run of one SFT step, one GRPO step and an evaluation, each in a process of its own: with and without gradient
checkpointing. On CUDA the peak is what PyTorch allocated; on a CPU it is the growth of the resident set since before
the model was made, which also holds what the allocator keeps for itself.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import sasr
from benchmarks.common import about, add_device_flag, answer, chosen_device, emit, in_child, peak_of_process, say
from benchmarks.step import make_checkpoint
from run.memory import memory_plan
from run.setup import Setup

FROM_SCRATCH = {"task": "countdown:train_size=200,test_size=8", "hidden_size": 512, "layers": 8, "heads": 8}
RUN = {
    "controller": "alternate",  # one SFT step of the adaptive stage, then one of GRPO
    "warmup_steps": 0,
    "steps": 2,
    "eval_every": 0,
    "ood_task": "none",
    "kl_coef": 0.001,
    "save_every": 0,
}


def flags_of(shape: str, folder: Path, device: str) -> dict:
    """What makes a run of this shape; 8 x 8 completions of up to 512 tokens where it is that of a public checkpoint."""
    if shape == "25m":
        return RUN | FROM_SCRATCH
    if shape == "tiny":
        return RUN | FROM_SCRATCH | {"hidden_size": 64, "layers": 2}
    made = make_checkpoint(shape, folder / "model", device)
    return RUN | {"model": made["model"], "task": made["task"], "max_new_tokens": 512, "offload_reference": True}


def resident() -> float:
    """Bytes of this process in memory now."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * float(next(line.split()[1] for line in status if line.startswith("VmRSS")))


def measure(flags: dict) -> dict:
    """The plan in bytes, and the peak of a run."""
    config = sasr.Config(**flags)
    plan = memory_plan(Setup(config))
    before = resident()
    sasr.train(config)
    peak = torch.cuda.max_memory_allocated() if config.device == "cuda" else peak_of_process() - before
    return {"plan": plan, "peak": peak, "ratio": plan["peak"] / peak}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device_flag(parser)
    shapes = ("tiny", "25m", "0.5b", "1.5b")
    parser.add_argument("--shapes", nargs="+", choices=shapes, help="(default 25m, on CUDA the two larger ones)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        return answer(measure, arguments.child)
    device, measured = chosen_device(arguments.device), True
    common = about("memory", device)
    say(f"{'shape':8}{'checkpointing':>16}{'planned GB':>12}{'peak GB':>10}{'ratio':>8}")
    for shape in arguments.shapes or (("25m",) if device.type == "cpu" else ("0.5b", "1.5b")):
        with tempfile.TemporaryDirectory() as folder:
            flags = flags_of(shape, Path(folder), device.type) | {"device": device.type}
            for checkpointing in (False, True):
                run = {"gradient_checkpointing": checkpointing, "out": f"{folder}/run-{checkpointing}"}
                row = in_child(__file__, flags | run)
                emit(common | {"shape": shape, "gradient_checkpointing": checkpointing} | row)
                measured &= "error" not in row
                if "error" in row:
                    say(f"{shape:8}{checkpointing!s:>16}  not measured: {row['error']}")
                    continue
                planned, peak = row["plan"]["peak"] / 1e9, row["peak"] / 1e9
                say(f"{shape:8}{checkpointing!s:>16}{planned:12.2f}{peak:10.2f}{row['ratio']:8.2f}")
    return int(not measured)


if __name__ == "__main__":
    sys.exit(main())
