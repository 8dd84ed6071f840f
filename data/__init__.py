"""Tasks: examples, demonstrations and verifiers. `load_task` is the one way in."""

from __future__ import annotations

import inspect
from pathlib import Path

from . import countdown, knights_knaves
from .task import Example, Grade, Task

__all__ = ["TASKS", "Example", "Grade", "Task", "load_task"]

# A task is a module with generate(seed, **options) and read(path, **options), both giving (train, test),
# and grade(completion, example).
TASKS = {"knights-knaves": knights_knaves, "countdown": countdown}


def load_task(name: str, path: str | Path | None = None, *, seed: int = 0, **options) -> Task:
    """Generate a task, or read its published records from a folder with train.jsonl and test.jsonl.

    Options are the keyword arguments of the module's `generate` (or `read`, with a path).
    Raises ValueError naming an unknown task or option, or the file and line of a bad record.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    module = TASKS[name]
    source = module.generate if path is None else module.read
    known = [p.name for p in inspect.signature(source).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for key in options:
        if key not in known:
            where = "" if path is None else " with a data folder"
            raise ValueError(f"task {name}{where} has no option {key!r}; known: {', '.join(known) or 'none'}")
    train, test = source(seed, **options) if path is None else source(path, **options)
    return Task(name, train, test, module.grade)
