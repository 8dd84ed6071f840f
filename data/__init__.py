"""Tasks: examples, demonstrations and verifiers. `load_task` is the one way in."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import competition_math, countdown, gsm8k, jsonl, knights_knaves
from .task import Example, Grade, Task, load_reward, read_split

__all__ = ["TASKS", "Example", "Grade", "Task", "load_reward", "load_task"]

# A task is a module with grade(completion, example, **options); with generate(seed, **options) -> (train, test),
# if its problems can be made up; with parse_record(record, **options) -> Example, for the published ones; and with
# PUBLISHED, which says where those are to be had.
TASKS = {
    "knights-knaves": knights_knaves,
    "countdown": countdown,
    "gsm8k": gsm8k,
    "math": competition_math,
    "jsonl": jsonl,
}


def load_task(
    name: str, path: str | Path | None = None, *, seed: int = 0, skip_bad_lines: bool = False, **options
) -> Task:
    """Generate a task, or read its published records from a folder with train.jsonl and test.jsonl (or .json).

    Options are the keyword arguments of the module's functions; numbers may come as text. One of the two files may be
    missing: that split is then empty. With `skip_bad_lines`, records that cannot be read are left out and told in
    `Task.skipped`.
    Raises ValueError naming an unknown task or option, the files that are missing, or the place of a bad record.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    module = TASKS[name]
    if path is None and not hasattr(module, "generate"):
        raise ValueError(f"task {name} needs --data, a folder with train.jsonl and test.jsonl: {module.PUBLISHED}")
    source = module.generate if path is None else module.parse_record
    known = options_of(source) | options_of(module.grade)  # some serve both
    for key, value in options.items():
        if key not in known:
            where = "" if path is None else " with a data folder"
            raise ValueError(f"task {name}{where} has no option {key!r}; known: {', '.join(known) or 'none'}")
        if isinstance(value, str) and "int" in known[key]:
            try:
                options[key] = int(value)
            except ValueError:
                raise ValueError(f"task {name}: {key} must be a whole number, got {value!r}") from None

    def with_options(function: Callable) -> Callable:
        return partial(function, **{key: options[key] for key in options_of(function) if key in options})

    skipped: list[str] = []
    if path is None:
        train, test = with_options(source)(seed)
    elif not Path(path).is_dir():
        what = "a file, not a folder" if Path(path).exists() else "no such folder"
        raise ValueError(f"{path}: {what}; it should have train.jsonl and test.jsonl: {module.PUBLISHED}")
    else:
        bad = skipped if skip_bad_lines else None
        train, test = (read_split(Path(path), split, with_options(source), bad) for split in ("train", "test"))
        if not train and not test:
            raise ValueError(
                f"{path}: neither train.jsonl nor test.jsonl (or .json) with a record that can be read: "
                + (skipped[0] if skipped else module.PUBLISHED)
            )
    if not train and not test:  # of a size of 0
        raise ValueError(f"task {name}: there are no examples")
    task = Task(name, train, test, with_options(module.grade), tuple(skipped))
    task.grade("", (train + test)[0])  # a bad option of the verifier is an error now, not at the first step
    return task


def options_of(function: Callable) -> dict[str, str]:
    """Names of the keyword-only parameters, and their annotations as text."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: str(p.annotation) for p in parameters if p.kind is p.KEYWORD_ONLY}
