"""Foreign programs in a process of their own: they may raise, hang or die, and the run goes on.

A user's reward, math-verify, regular expressions and chat templates are programs that are not ours, or take what time
they take. Parent and child exchange a line of JSON per request. The time-out is the parent's: it waits for the answer,
and where none comes it kills the child's whole process group and starts another one. No signals, so any thread may ask.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .task import Example, Grade, load_reward

CHILD = "import sys; sys.path.insert(0, {root!r}); from {module} import {serve}; {serve}({description!r})"
IMPORT_SECONDS = 30.0  # more, for the child to begin to serve
PR_SET_PDEATHSIG = 1  # of prctl(2)
KILLED = {"error": f"ended its process (exit code {-signal.SIGKILL})"}
SHOWN = 5  # failures that are printed, of a run


class Child:
    """A Python process that runs `serve(description)` of a module of ours, which answers requests."""

    def __init__(self, module: str, serve: str, description: str, *, seconds: float):
        root = str(Path(__file__).resolve().parents[1])
        self.code = CHILD.format(root=root, module=module, serve=serve, description=description)
        self.seconds = seconds  # for one request
        self.process: subprocess.Popen | None = None
        self.turn = threading.Lock()  # one request at a time, or threads would get each other's answers

    def ask(self, request: dict) -> dict:
        """The answer, or {"error": reason} if there is none, or none in time."""
        with self.turn:
            answer = self._ask(request)
            # Not by us. Linux also takes the thread that started it, if that has ended, for the parent that has died.
            return self._ask(request) if answer == KILLED else answer

    def _ask(self, request: dict) -> dict:
        try:
            if self.process is None or self.process.poll() is not None:  # it died while nothing was asked
                self.close()
                self.start()
            line = json.dumps(request).encode() + b"\n"
            threading.Thread(target=write, args=(self.process.stdin, line), daemon=True).start()  # it may not read
            return self._answer(self.seconds)
        except (TimeoutError, OSError, ValueError) as error:
            self.close()
            return {"error": str(error)}

    def start(self) -> None:
        """Raises ValueError where the child cannot begin to serve."""
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.code, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            ready = self._answer(IMPORT_SECONDS + self.seconds)
        except (TimeoutError, OSError) as error:
            ready = {"error": f"it did not begin to serve: {error}"}
        if "error" in ready:
            self.close()
            raise ValueError(ready["error"])

    def _answer(self, seconds: float) -> dict:
        deadline = time.monotonic() + seconds
        parts: list[bytes] = []
        while not (parts and parts[-1].endswith(b"\n")):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise TimeoutError(f"took more than {seconds:g} s")
            parts.append(os.read(self.process.stdout.fileno(), 65536))
            if not parts[-1]:
                with contextlib.suppress(subprocess.TimeoutExpired):  # it closed its output, and lives on
                    self.process.wait(left)
                raise OSError(f"ended its process (exit code {self.process.returncode})")
        return json.loads(b"".join(parts))

    def close(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process.stdout.close()
            with contextlib.suppress(OSError):  # what it did not read is lost
                self.process.stdin.close()
            self.process = None

    def __del__(self):
        self.close()


def write(file, line: bytes) -> None:
    with contextlib.suppress(OSError, ValueError):  # the child died, or was closed: the reader will tell
        file.write(line)
        file.flush()


class VerifierFailed(RuntimeError):
    """And the person wants the run to stop there."""


class IsolatedVerifier:
    """Called like any verifier, with a completion and its example."""

    def __init__(self, task: str, options: dict, reward: str, *, seconds: float, on_error: str):
        """The grade of a task with its options, or the user's `reward` (`load_reward`).

        seconds: how long one completion may take. on_error: the reward of a completion whose verifier fails, a number,
        or "stop", to raise VerifierFailed. `failures` counts them. Raises ValueError where the reward cannot be loaded.
        """
        description = json.dumps({"task": task, "options": options, "reward": reward})
        self.child = Child("data.isolated", "serve_verifier", description, seconds=seconds)
        self.name, self.on_error, self.failures = reward or options.get("verifier", task), on_error, 0
        try:
            self.child.start()
        except ValueError as error:
            named = "" if self.name in str(error) else f"the verifier {self.name}: "
            raise ValueError(f"{named}{error}") from None

    def __call__(self, completion: str, example: Example) -> Grade:
        answer = self.child.ask({"completion": completion, "example": dataclasses.asdict(example)})
        if "error" not in answer:
            return Grade(**answer)
        self.failures += 1
        message = f"the verifier {self.name} {answer['error']} for the completion {completion[:200]!r}"
        if self.on_error == "stop":
            raise VerifierFailed(message)
        if self.failures <= SHOWN:
            more = "; further ones are only counted" if self.failures == SHOWN else ""
            with contextlib.suppress(OSError):  # standard error may have been closed
                print(f"{message}; it counts as {self.on_error}{more}", file=sys.stderr)
        return Grade(float(self.on_error), correct=False, well_formed=False, failed=True)


# ----------------------------------------------------------------------------- in the other process


def answer_requests(make: Callable[[], Callable[[dict], dict]]) -> None:
    """make() gives the function that answers a request; answer each line with it, until there are no more.

    What foreign programs print goes to standard error.
    """
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    process = os.getpid()
    end_with_parent(int(sys.argv[1]))

    def reply(said: dict) -> None:
        if os.getpid() != process:  # a foreign program forked, and came back twice
            os._exit(0)
        answers.write(json.dumps(said).encode() + b"\n")
        answers.flush()

    try:
        answer = make()
    except ValueError as error:
        reply({"error": str(error)})
        return
    reply({})
    for line in requests:
        try:
            reply(answer(json.loads(line)))
        except BaseException as error:  # a foreign function may even call sys.exit
            reply({"error": f"raised {type(error).__name__}: {' '.join(str(error)[:2000].split())[:300]}"})


def end_with_parent(parent: int) -> None:
    """Do not outlive the parent, however it ends, in the middle of a request that never does: Linux sees to that.

    No thread could, since a regular expression holds Python's lock for as long as it takes.
    """
    with contextlib.suppress(AttributeError, OSError):  # another system
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def serve_verifier(description: str) -> None:
    answer_requests(partial(make_verifier, json.loads(description)))


def make_verifier(wanted: dict) -> Callable[[dict], dict]:
    if wanted["reward"]:
        verify = load_reward(wanted["reward"])
    else:
        from . import TASKS

        verify = partial(TASKS[wanted["task"]].grade, **wanted["options"])

    def grade_of(request: dict) -> dict:
        grade = dataclasses.asdict(verify(request["completion"], Example(**request["example"])))
        return grade | {"reward": float(grade["reward"])}

    return grade_of
