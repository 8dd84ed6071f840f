"""What the benchmarks share: where their output goes, and a process of its own for each measurement.

A table for people goes to stderr, and every row of it, as soon as it is measured, as a line of JSON to stdout: what
was measured before a benchmark is cut off is not lost. `python benchmarks/step.py > rows.jsonl` shows the one and keeps
the other.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from rollout import resolve_device


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def emit(row: dict) -> None:
    print(json.dumps(row), flush=True)


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(default auto)")


def chosen_device(name: str) -> torch.device:
    """As a run chooses it. Ends the program with one line where there is none."""
    try:
        return resolve_device(name)
    except ValueError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def about(benchmark: str, device: torch.device) -> dict:
    """What every row begins with; also told to the reader."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    threads = torch.get_num_threads()
    say(f"{name}, {threads} threads, torch {torch.__version__}")
    return {"benchmark": benchmark, "device": name, "threads": threads, "torch": torch.__version__}


def failure(error: Exception) -> dict:
    """The row of what could not be measured. A package that is not installed needs no traceback."""
    if not isinstance(error, ImportError):
        traceback.print_exception(error)
    return {"error": f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:200]}


def in_child(script: str, *request, launcher: tuple[str, ...] = (), environment: dict | None = None) -> dict:
    """What `answer` gives for this request, in a process of its own; its other output appears as it comes.

    launcher: a module of Python that starts it, with its flags. Where it fails, the row is {"error": what happened}.
    """
    command = [sys.executable, *launcher, script, "--child", json.dumps(request)]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=False, env=environment)
    if done.returncode:
        return {"error": f"its process ended with code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def answer(measure: Callable[..., dict], request: str) -> int:
    """The other end of `in_child`."""
    try:
        emit(measure(*json.loads(request)))
    except Exception as error:
        emit(failure(error))
    return 0


def profiled(call: Callable[[], object], device: torch.device, most: int = 20) -> dict:
    """What took the time of a call, on CUDA its kernels.

    Keys: `seconds` by the clock, `busy_seconds` the sum over all operations, `operations` the largest as
    [name, calls, ms].
    """
    activity = "CUDA" if device.type == "cuda" else "CPU"
    with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, activity)]) as profile:
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started

    def ms(event) -> float:
        return (event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total) / 1e3

    events = sorted(profile.key_averages(), key=ms, reverse=True)
    rows = [[event.key[:120], event.count, round(ms(event), 3)] for event in events[:most]]
    for name, calls, took in rows:
        say(f"{took:10.2f} ms {calls:7}  {name[:100]}")
    return {"seconds": seconds, "busy_seconds": sum(map(ms, events)) / 1e3, "operations": rows}


def peak_of_process() -> int:
    """Bytes. Not getrusage's, which a child inherits from its parent."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
