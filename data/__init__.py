"""Tasks: examples, demonstrations and verifiers. `load_task` is the one way in."""

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import get_args

from .task import Example, Grade, Task, load_reward, read_split

__all__ = ["TASKS", "Example", "Grade", "Task", "load_reward", "load_task", "task_module"]

# A task is a module with grade(completion, example, **options); parse_record(record, **options) -> Example; PUBLISHED,
# which tells where such records are; and, if problems can be made up, generate(seed, **options) -> (train, test).
TASKS = {"knights-knaves": "knights_knaves", "countdown": "countdown", "gsm8k": "gsm8k"}
TASKS |= {"math": "competition_math", "jsonl": "jsonl"}
# Beyond the training domain, in its vocabulary: claims of three operands instead of two, four numbers instead of three.
OOD_TASKS = {"knights-knaves": ("width", 3), "countdown": ("numbers", 4)}


def task_module(name: str) -> ModuleType:
    """Imported when it is asked for, so that `import data.files` loads no task."""
    return importlib.import_module(f".{TASKS[name]}", __name__)


def load_task(
    name: str, path: str | Path | None = None, *, seed=0, skip_bad_lines=False, keep_records=False, **options
) -> Task:
    """Generate a task, or read its published records from a folder with train.jsonl and test.jsonl (or .json).

    Options are the keyword arguments of the module's functions; numbers may come as text. A split without a file is
    empty. With `skip_bad_lines`, records that cannot be read are left out, and `Task.skipped` tells why; with
    `keep_records`, `Example.record` holds all fields of what was read. Raises ValueError naming an unknown task or
    option, the files that are missing, or the place of a bad record.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    module = task_module(name)
    if path is None and not hasattr(module, "generate"):
        raise ValueError(f"task {name} needs --data, a folder with train.jsonl and test.jsonl: {module.PUBLISHED}")
    source = module.generate if path is None else module.parse_record
    known = options_of(source) | options_of(module.grade)  # some serve both
    for key, value in options.items():
        if key not in known:
            where = "" if path is None else " with a data folder"
            raise ValueError(f"task {name}{where} has no option {key!r}; known: {', '.join(known) or 'none'}")
        if isinstance(value, str) and int in (known[key], *get_args(known[key])):
            try:
                options[key] = int(value)
            except ValueError:
                raise ValueError(f"task {name}: {key} must be a whole number, got {value!r}") from None

    verifiers = getattr(module, "VERIFIERS", ())  # wrong once, and not in each record
    if "verifier" in options and options["verifier"] not in verifiers:
        raise ValueError(f"task {name}: verifier must be one of {', '.join(verifiers)}, got {options['verifier']!r}")

    def with_options(function: Callable) -> Callable:
        return partial(function, **{key: options[key] for key in options_of(function) if key in options})

    skipped: list[str] = []
    if path is None:
        train, test = with_options(source)(seed)
        lacking = f"task {name}: there are no examples"  # where both sizes are 0
    elif Path(path).is_dir():
        how = (with_options(source), skipped if skip_bad_lines else None, keep_records)
        train, test = (read_split(Path(path), split, *how) for split in ("train", "test"))
        lacking = f"{path}: neither train.jsonl nor test.jsonl (or .json) with a record that can be read: "
        lacking += skipped[0] if skipped else module.PUBLISHED
    else:
        what = "a file, not a folder" if Path(path).exists() else "no such folder"
        raise ValueError(f"{path}: {what}; it should have train.jsonl and test.jsonl: {module.PUBLISHED}")
    if not train and not test:
        raise ValueError(lacking)
    task = Task(name, train, test, with_options(module.grade), tuple(skipped), options)
    task.grade("", (train + test)[0])  # a bad option of the verifier is an error now, not at the first step
    return task


def options_of(function: Callable) -> dict[str, type]:
    """The types of the keyword-only parameters, by name."""
    return {name: function.__annotations__[name] for name in function.__kwdefaults__ or {}}


def load_task_spec(spec: str, path: str, seed: int, **more) -> Task:
    """'countdown:numbers=4,test_size=100' -> the task. Raises ValueError naming what is wrong in the spec."""
    name, _, rest = spec.partition(":")
    flags = {key: f"--{key.replace('_', '-')}" for key in more}
    flags |= {"name": "--task", "path": "--data", "seed": "--seed", "keep_records": "--reward"}
    options: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"task {spec!r}: expected NAME:key=value,..., found {part!r}")
        if key in flags or key in options:
            raise ValueError(f"task {spec!r}: {key} is given twice, or has a flag of its own, {flags.get(key, '')}")
        options[key] = value
    return load_task(name, path or None, seed=seed, **options, **more)


def generated_task(flag: str, spec: str, seed: int) -> Task:
    """A task beside --task, which must be a generated one. Raises ValueError naming the flag."""
    able = [name for name in TASKS if hasattr(task_module(name), "generate")]
    if spec.partition(":")[0] not in able:
        raise ValueError(f"{flag} {spec}: only generated tasks can serve here: {', '.join(able)}")
    return load_task_spec(spec, "", seed)
