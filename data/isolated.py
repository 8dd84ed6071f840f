"""A verifier in a process of its own: it may raise, hang or die, and the run goes on.

For rewards that are not ours, or that take what time they take (a user's function, math-verify, regular expressions).
Parent and child exchange a line of JSON per completion. The time-out is the parent's: it waits for the answer, and
where none comes it kills the child's whole process group and starts another one. No signals, so any thread may ask.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

from .task import Example, Grade, load_reward

CHILD = "import sys; sys.path.insert(0, {root!r}); from data.isolated import serve; serve({description!r})"
SHOWN = 5  # failures that are printed, of a run


class IsolatedVerifier:
    """Called like any verifier, with a completion and its example."""

    def __init__(self, task: str, options: dict, reward: str, *, seconds: float, on_error: str):
        """The grade of a task with its options, or the user's `reward` (`load_reward`).

        seconds: how long one completion may take. on_error: the reward of a completion whose verifier fails, a number,
        or "stop", to raise RuntimeError. `failures` counts them.
        """
        self.description = json.dumps({"task": task, "options": options, "reward": reward})
        self.name, self.seconds, self.on_error = reward or options.get("verifier", task), seconds, on_error
        self.failures = 0
        self.child: subprocess.Popen | None = None

    def __call__(self, completion: str, example: Example) -> Grade:
        request = {"completion": completion, "example": dataclasses.asdict(example)}
        try:
            answer = self._ask(json.dumps(request).encode() + b"\n")
        except (TimeoutError, OSError) as error:
            self.close()
            answer = {"error": str(error)}
        if "error" not in answer:
            return Grade(**answer)
        self.failures += 1
        message = f"the verifier {self.name} {answer['error']} for the completion {completion[:200]!r}"
        if self.on_error == "stop":
            raise RuntimeError(message)
        if self.failures <= SHOWN:
            more = "; further ones are only counted" if self.failures == SHOWN else ""
            print(f"{message}; it counts as {self.on_error}{more}", file=sys.stderr)
        return Grade(float(self.on_error), correct=False, well_formed=False)

    def _ask(self, request: bytes) -> dict:
        if self.child is None:
            self.start()
        deadline = time.monotonic() + self.seconds
        self.child.stdin.write(request)
        self.child.stdin.flush()
        return self._answer(deadline)

    def start(self) -> None:
        """Raises ValueError where the reward cannot be loaded."""
        root = str(Path(__file__).resolve().parents[1])
        code = CHILD.format(root=root, description=self.description)
        self.child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        ready = self._answer(time.monotonic() + 60 + self.seconds)  # imports may take a while
        if "error" in ready:
            self.close()
            raise ValueError(ready["error"])

    def _answer(self, deadline: float) -> dict:
        line = b""
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.child.stdout], [], [], left)[0]:
                raise TimeoutError(f"took more than {self.seconds:g} s")
            part = os.read(self.child.stdout.fileno(), 65536)
            if not part:
                raise OSError(f"ended its process (exit code {self.child.wait()})")
            line += part
        return json.loads(line)

    def close(self) -> None:
        if self.child is not None:
            with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
                os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()
            self.child.stdin.close()
            self.child.stdout.close()
            self.child = None

    def __del__(self):
        self.close()


def serve(description: str) -> None:
    """The child: answer each line until there are no more. What the verifier prints goes to standard error."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    os.close(0)
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()

    def reply(answer: dict) -> None:
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()

    wanted = json.loads(description)
    try:
        if wanted["reward"]:
            verify = load_reward(wanted["reward"])
        else:
            from . import TASKS

            verify = partial(TASKS[wanted["task"]].grade, **wanted["options"])
    except ValueError as error:
        reply({"error": str(error)})
        return
    reply({})
    for line in requests:
        request = json.loads(line)
        try:
            grade = dataclasses.asdict(verify(request["completion"], Example(**request["example"])))
            if not math.isfinite(grade["reward"]):
                raise ValueError(f"returned the reward {grade['reward']}")
            reply(grade | {"reward": float(grade["reward"])})
        except BaseException as error:  # a foreign function may even call sys.exit
            reply({"error": f"raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"})


def end_with(parent: int) -> None:
    """Do not outlive the parent, however it ends, in the middle of a request that never does."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
