"""The one reader of foreign files, and the checks that everything from outside goes through.

A file may come from the hub, from a user, or from a run's folder that was moved or edited. Reading is bounded, follows
no link out of where the file belongs, and whatever is wrong becomes one line that names the file. Nothing is unpickled.
This module imports nothing of ours, so every room may use it.
"""

import json
import re
from pathlib import Path
from reprlib import repr as short_repr  # cut short: a foreign value may be long

MAX_JSON_BYTES = 50_000_000  # of a config.json or an index: published ones have a hundredth


def one_line(error: object, limit: int = 400) -> str:
    """The message of an error, or any text, in one line of at most `limit` characters; the type where it is empty."""
    return re.sub(r"\s+", " ", str(error)[: 4 * limit]).strip()[:limit] or type(error).__name__


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Raise ValueError naming a value that is not a number from low to high, an int if low is one. No bool passes."""
    if isinstance(value, bool) or not isinstance(value, (int, type(low))) or not low <= value <= high:
        kind = "whole number" if isinstance(low, int) else "number"
        raise ValueError(f"{name} {short_repr(value)}: must be a {kind} from {low} to {high}")


def read_file(file: Path, max_bytes: float, *, links: bool = False) -> bytes | None:
    """The bytes of a file, or None where it is absent. links: it may be a link to anywhere, as a user's own data.

    Raises ValueError for more bytes than `max_bytes` (infinite: no limit), and for a link that is not allowed.
    """
    if not file.is_file():
        return None
    if not links:
        check_link(file)
    if file.stat().st_size > max_bytes:
        raise ValueError(f"{file}: {file.stat().st_size} bytes, more than {max_bytes}")
    return file.read_bytes()


def check_link(file: Path) -> None:
    """Raise ValueError for a link out of the file's directory, or, in the hub's cache, out of the model's."""
    home, target = file.parent.resolve(), file.resolve()
    if home.parent.name == "snapshots" and home.parents[1].name.startswith("models--"):
        home = home.parents[1]  # snapshots/COMMIT/ has links into blobs/
    if not target.is_relative_to(home):
        raise ValueError(f"{file}: a link that leads out of its directory, to {target}")


def read_json(file: Path, max_bytes: float = MAX_JSON_BYTES, *, links: bool = False) -> dict:
    """The JSON object in a file; {} where there is no file. Raises ValueError naming the file for anything else."""
    content = read_file(file, max_bytes, links=links)
    try:
        value = {} if content is None else parse_json(content)
        if not isinstance(value, dict):
            raise ValueError(f"expected an object, got {type(value).__name__}")
        json.dumps(value, ensure_ascii=False).encode()  # "\ud800" is half a character, which no tokenizer takes
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not a JSON object ({error})") from None
    return value


def parse_json(content: bytes) -> object:
    """Raises ValueError for what is not JSON in UTF-8, or is nested too deeply."""
    try:
        return json.loads(content.decode("utf-8-sig"))  # some editors begin a file with a mark
    except RecursionError as error:
        raise ValueError(one_line(error)) from None
