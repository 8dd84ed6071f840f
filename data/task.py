"""What every task is made of: examples, a grade, and the JSON files that hold published records.

A task is two lists of examples and a verifier. The verifier is the only reward: it reads the text of a
completion, never the model, so that the same function scores training, evaluation and a port.
"""

import importlib.util
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from .files import one_line, parse_json, read_file

MAX_TEXT = 10**6  # characters of a prompt or a demonstration; a tokenizer takes minutes for more
MAX_REWARD = 1e9  # more, squared and summed over a group, would leave fp32


@dataclass(frozen=True)
class Example:
    """One problem. Without a demonstration it can serve GRPO, but not SFT."""

    prompt: str
    answer: str  # what the verifier compares with, in the task's own notation
    demonstration: str | None = None  # chain of thought that ends in the answer
    group: str = ""  # level or size, by which an evaluation is broken down
    record: dict = field(default_factory=dict, compare=False, repr=False)  # the JSON object in the file, where kept


@dataclass(frozen=True)
class Grade:
    """`reward` trains; `correct` is the accuracy that is reported; `well_formed`: the answer could be parsed."""

    reward: float
    correct: bool
    well_formed: bool
    flexible: bool | None = None  # correct in a looser reading, where the task has one
    failed: bool = False  # the verifier itself raised, hung or died, so that the reward is not its own


@dataclass(frozen=True)
class Task:
    name: str
    train: list[Example]
    test: list[Example]
    verify: Callable[[str, Example], Grade]
    skipped: tuple[str, ...] = ()  # why each bad record was left out, where the user asked for that
    options: dict = field(default_factory=dict)  # that it was loaded with

    def grade(self, completion: str, example: Example) -> Grade:
        """Score the text of a completion (without its prompt). Never raises on bad text: that is a wrong answer."""
        return self.verify(completion, example)


def outcome_grade(correct: bool, well_formed: bool) -> Grade:
    """Reward 1 for a correct answer, 0 for any other."""
    return Grade(float(correct), correct, well_formed)


def tagged_answer(text: str, tag: str = "answer") -> str | None:
    """What stands in the last complete pair <answer> ... </answer>; None where there is none.

    A mention of the tags before it changes nothing, and guesses before the last one earn nothing.
    """
    parts = re.split(f"(</?{tag}>)", outside_cut_thought(text))  # texts and tags in turn
    closed = [i for i in range(3, len(parts), 2) if parts[i - 2 : i + 1 : 2] == [f"<{tag}>", f"</{tag}>"]]
    return parts[closed[-1] - 1] if closed else None


def outside_cut_thought(text: str) -> str:
    """A text without a <think> that never ends: what it says there is no answer yet."""
    thought = text.find("<think>", text.rfind("</think>") + 1)
    return text if thought < 0 else text[:thought]


def read_split(
    folder: Path, split: str, parse: Callable[[dict], Example], skipped: list[str] | None, keep_records: bool = False
) -> list[Example]:
    """Parse the records of FOLDER/SPLIT.jsonl (one a line), else SPLIT.json (a list), else SPLIT/**/*.json (one each).

    Without any of these there are no examples. A bad record raises ValueError with file, place and reason; with a list
    `skipped` its reason goes there instead. `keep_records`: each example has its own, about as much memory again.
    """
    examples = []
    for place, record in records_of(folder, split):
        try:
            if isinstance(record, bytes):  # of JSON, not yet read
                record = parse_json(record)
            if not isinstance(record, dict):
                raise ValueError(f"expected a JSON object, got {type(record).__name__}")
            example = parse(record)
            for text in (example.prompt, example.answer, example.demonstration or ""):
                if len(text) > MAX_TEXT:
                    raise ValueError(f"a text of {len(text)} characters, more than {MAX_TEXT}")
                text.encode()  # JSON can spell "\ud800", half a character, which no tokenizer takes
            examples.append(replace(example, record=record) if keep_records else example)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            lacking = "the record lacks the field " if isinstance(error, KeyError) else ""
            reason = f"{place}: {lacking}{error}"[:1000]
            if skipped is None:
                raise ValueError(reason) from None
            skipped.append(reason)
    return examples


def records_of(folder: Path, split: str) -> Iterator[tuple[str, object]]:
    """(Where it stands, its JSON as bytes or already read) for each record of a split."""
    read = partial(read_file, max_bytes=math.inf, links=True)  # a user's own file: of any size, maybe a link
    lines, whole = folder / f"{split}.jsonl", folder / f"{split}.json"
    if (content := read(lines)) is not None:
        for number, line in enumerate(content.split(b"\n"), start=1):
            if line.strip():
                yield f"{lines}:{number}", line
    elif (content := read(whole)) is not None:
        try:
            records = parse_json(content)
        except ValueError as error:
            raise ValueError(f"{whole}: {error}") from None
        if not isinstance(records, list):
            raise ValueError(f"{whole}: expected a list of records, got {type(records).__name__}")
        for number, record in enumerate(records, start=1):
            yield f"{whole}, record {number}", record
    else:  # MATH is published as a tree of files with a record each
        for file in sorted((folder / split).rglob("*.json")):
            yield str(file), read(file)


def required_text(record: dict, field: str) -> str:
    """A field that must hold text which is not blank."""
    value = record[field]
    if not (isinstance(value, str) and value.strip()):
        raise ValueError(f"{field} must be a text that is not empty, got {value!r}")
    return value


def load_reward(spec: str, *, alone: bool = False) -> Callable[[str, Example], Grade]:
    """The verifier that MODULE:FUNCTION or path/to/FILE.py:FUNCTION names, called with a completion and its example.

    It returns a Grade, or a number: the reward, at most MAX_REWARD either way, which counts as correct from 1 on. A
    module may stand in the current directory; a file may import those beside it, also later: before ours of the same
    name in a process of its own (`alone`, as in a run), else after what is loaded. Raises ValueError with one line that
    names the spec; so does the verifier when the function returns anything else. What that raises is not caught.
    """
    place, _, name = spec.rpartition(":")
    if not (place and name):
        raise ValueError(f"reward {spec!r}: expected MODULE:FUNCTION or path/to/FILE.py:FUNCTION")
    file = Path(place) if place.endswith(".py") else None
    if file and not file.is_file():
        raise ValueError(f"reward {spec!r}: no such file {place!r}")
    beside = str(file.parent.resolve() if file else Path.cwd())
    sys.path.insert(0, beside)
    if alone and Path(beside) != Path(__file__).resolve().parents[1]:  # where ours are the neighbours
        let_neighbours_win(beside)
    try:
        module = import_file(file) if file else importlib.import_module(place)
    except (Exception, SystemExit) as error:  # a script may end itself
        if not file and isinstance(error, ModuleNotFoundError) and f"{place}.".startswith(f"{error.name}."):
            raise ValueError(f"reward {spec!r}: no such module {place!r} here in {beside}, nor installed") from None
        reason = f"importing it raised {type(error).__name__}: {one_line(error)}"
        raise ValueError(f"reward {spec!r}: {reason}") from error
    finally:
        if beside in sys.path and not alone:
            sys.path.remove(beside)
    if not hasattr(module, name):
        raise ValueError(f"reward {spec!r}: {place} has no function {name!r}")
    function = getattr(module, name)
    if not callable(function):
        raise ValueError(f"reward {spec!r}: {name!r} must be a function, got {one_line(repr(function), 200)}")
    sys.path.append(beside)  # at the end, where it hides nothing

    def verify(completion: str, example: Example) -> Grade:
        result = function(completion, example)
        graded = any(kind.__name__ == "Grade" for kind in type(result).__mro__)  # ours, or of a copy beside the reward
        reward = result.reward if graded else result
        try:
            number = math.nan if isinstance(reward, (str, bytes)) else float(reward)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several elements
            number = math.nan
        if not abs(number) <= MAX_REWARD:  # NaN is not, either
            wanted = f"a Grade or a finite number of at most {MAX_REWARD:g}"
            raise ValueError(f"reward {spec!r}: expected {wanted}, got {one_line(repr(result), 200)}")
        if not graded:
            return Grade(number, correct=number >= 1, well_formed=True)
        flexible = None if result.flexible is None else bool(result.flexible)
        return Grade(number, bool(result.correct), bool(result.well_formed), flexible)

    return verify


def let_neighbours_win(beside: str) -> None:
    """Let a folder that is first in sys.path come before what is ours, as if Python had been started there."""
    for name in ("data", "kernels", "run"):  # our packages; what is one file, such as model.py, is not loaded yet
        spec = PathFinder.find_spec(name, [beside])
        if spec and (spec.origin or any(Path(beside, name).glob("*.py"))):  # no folder of records
            for loaded in [module for module in sys.modules if f"{module}.".startswith(f"{name}.")]:
                del sys.modules[loaded]  # it goes on to work for those who have it
            if not spec.origin:  # without __init__.py, Python would prefer ours, which now fills the gaps
                sys.modules[name] = module = importlib.util.module_from_spec(spec)
                module.__path__ = [str(place / name) for place in (Path(beside), Path(__file__).resolve().parents[1])]


def import_file(file: Path) -> ModuleType:
    name = f"reward file {file.resolve()}"  # no name that an import could spell: nothing else is shadowed
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # listed, since dataclasses look there
    spec.loader.exec_module(module)
    return module
