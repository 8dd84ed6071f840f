"""Run one part of `gpu.sh` within a limit, and keep what it says, line by line.

    python benchmarks/record.py RESULTS NAME SECONDS COMMAND...

All output is shown and appended to RESULTS.log. RESULTS.json holds, for each NAME, how it ended and every line that was
an object of JSON. Both are up to date after every line, so that nothing is lost when this process is killed: the part
then stays "unfinished" there. Exits 1 unless the command ended well.
"""

from __future__ import annotations

import collections
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

GRACE = 5  # seconds from asking a command to end until it is killed


def main(argv: list[str]) -> int:
    results, name, limit, *command = argv
    limit = float(limit)
    with open(f"{results}.log", "a", encoding="utf-8") as log:
        return record(Path(f"{results}.json"), log, name, limit, command)


def record(file: Path, log, name: str, limit: float, command: list[str]) -> int:
    parts = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    part = parts[name] = {
        "result": "unfinished",
        "command": " ".join(command),
        "limit": limit,
        "seconds": 0,
        "rows": [],
    }

    def show(line: str) -> None:
        print(line, flush=True)
        print(line, file=log, flush=True)

    def write() -> None:
        part["seconds"] = round(time.monotonic() - started, 1)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, file)

    started = time.monotonic()
    show(f"== {name}: {part['command']}")
    write()
    if limit <= 0:
        part["result"] = "not begun: no time was left"
    else:
        part |= run(command, limit, part, show, write)
    write()
    show(f"== {name}: {part['result']}, {part['seconds']} s, rows: {len(part['rows'])}")
    return int(part["result"] != "ok")


def run(command: list[str], limit: float, part: dict, show, write) -> dict:
    """How the command ended, and the end of its output if that was not well."""
    stopped, tail, started = [], collections.deque(maxlen=30), time.monotonic()
    process = subprocess.Popen(
        ["timeout", "-k", str(GRACE), str(limit), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )

    def stop(number, frame):
        stopped.append(signal.Signals(number).name)
        process.terminate()  # `timeout` passes it on to the command and to all that this has started

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)

    def read():
        for line in process.stdout:
            line = line.rstrip("\n")
            show(line)
            row = row_of(line)
            if row is None:
                tail.append(line[:500])
            else:
                part["rows"].append(row)
                write()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    code = process.wait()
    reader.join(GRACE)  # not for ever: a process that has left the command's group may hold the pipe open
    if code == 0:
        return {"result": "ok"}
    result = f"failed with code {code}"
    if stopped:
        result = f"stopped from outside by {stopped[0]}"
    elif code in (124, 128 + signal.SIGKILL) and time.monotonic() - started >= limit:
        result = f"cut off at {limit:g} s"
    return {"result": result, "tail": list(tail)}


def row_of(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
