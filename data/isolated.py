"""Foreign programs in a process of their own, as they may raise, hang or die: rewards, regular expressions, templates.

Parent and child exchange a line of JSON per request. Where none comes in time, the parent kills the process group.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from .files import one_line
from .task import Example, Grade, load_reward

IMPORT_SECONDS = 30.0  # in addition, until the child begins to serve
MAX_PRINTED_FAILURES = 5  # of a run


class Child:
    """A Python process that answers requests with the function that MODULE.CALL returns."""

    def __init__(self, module: str, call: str, *, seconds: float):
        root = str(Path(__file__).resolve().parents[1])
        self.code = f"import sys; sys.path.insert(0, {root!r}); import data.isolated, {module}; "
        self.code += f"data.isolated.answer_requests(lambda: {module}.{call})"
        self.seconds = seconds  # for one request
        self.process: subprocess.Popen | None = None
        self.turn = threading.Lock()  # one request at a time, or threads would get each other's answers

    def ask(self, **request) -> dict:
        """Raises ValueError with the reason where there is no answer, or none in time."""
        with self.turn:
            if self.process is None or self.process.poll() is not None:  # it died while nothing was asked
                self.start()
            return self._answer(json.dumps(request).encode() + b"\n", self.seconds)

    def start(self, context: str = "it did not begin to serve: ") -> None:
        """Raises ValueError where the child cannot begin to serve."""
        self.close()
        self.channel, theirs = socket.socketpair()
        command = [sys.executable, "-c", self.code]
        with theirs:  # both ways are on its output; its input, where nothing comes, ends when we end
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=theirs, start_new_session=True)
        self._answer(b"", IMPORT_SECONDS + self.seconds, context)

    def _answer(self, request: bytes, seconds: float, context: str = "") -> dict:
        deadline, answer = time.monotonic() + seconds, b""
        try:
            self.channel.settimeout(seconds)
            self.channel.sendall(request)
            while not answer.endswith(b"\n"):
                self.channel.settimeout(deadline - time.monotonic())  # ValueError once that is past
                answer += self.channel.recv(2**16) or b"\n"
            answer = json.loads(answer)
        except TimeoutError:
            reason = f"took more than {seconds:g} s"
        except (OSError, ValueError):  # nothing was left to read
            with contextlib.suppress(subprocess.TimeoutExpired):  # it may have closed its output, and live on
                self.process.wait(1)
            reason = f"ended its process (exit code {self.process.returncode})"
        else:
            if "error" in answer:
                raise ValueError(answer["error"])
            return answer
        self.close()
        raise ValueError(context + reason)

    def close(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process.stdin.close()
            self.channel.close()
            self.process = None


class VerifierFailed(RuntimeError):
    """A verifier failed, and the user wants the run to stop there."""


class IsolatedVerifier:
    """Called like any verifier, with a completion and its example. `failures` counts those without a grade."""

    def __init__(self, task: str, options: dict, reward: str, *, seconds: float, on_error: str):
        """The user's `reward`, or the grade of a task with its options. ValueError where it cannot be loaded.

        seconds: for one completion. on_error: its reward where the verifier fails, or "stop", to raise VerifierFailed.
        """
        self.name, self.on_error, self.failures = reward or options.get("verifier", task), on_error, 0
        self.child = Child("data.isolated", f"make_verifier({task!r}, {options!r}, {reward!r})", seconds=seconds)
        self.child.start(f"the verifier {self.name}: it did not begin to serve: ")

    def __call__(self, completion: str, example: Example) -> Grade:
        try:
            return Grade(**self.child.ask(completion=completion, example=vars(example)))
        except (ValueError, RecursionError) as error:  # the latter from a record that is nested too deeply
            message = f"the verifier {self.name} {error} for the completion {completion[:200]!r}"
        self.failures += 1
        if self.on_error == "stop":
            raise VerifierFailed(message)
        if self.failures <= MAX_PRINTED_FAILURES:
            more = "; further ones are only counted" if self.failures == MAX_PRINTED_FAILURES else ""
            with contextlib.suppress(OSError):  # standard error may have been closed
                print(f"{message}; it counts as {self.on_error}{more}", file=sys.stderr)
        return Grade(float(self.on_error), correct=False, well_formed=False, failed=True)


def answer_requests(make: Callable[[], Callable[..., dict]]) -> None:
    """In the child: answer with the function that make() gives. What others print goes to standard error."""
    if os.fork() == 0:
        if os.fork() == 0:  # a guard, and no child of ours, for which the foreign program might wait
            os.close(1)
            os.read(0, 1)  # until the parent ends, however it does
            os.killpg(0, signal.SIGKILL)
        os._exit(0)
    os.wait()
    channel, process = socket.socket(fileno=os.dup(1)), os.getpid()
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    requests = channel.makefile("rb")
    with contextlib.suppress(OSError):  # the parent has closed the channel
        try:
            answer_to, answer = make(), {}
        except ValueError as error:
            answer = {"error": str(error)}
        while os.getpid() == process:  # else a foreign program forked, and came back twice
            channel.sendall(json.dumps(answer).encode() + b"\n")
            line = requests.readline()
            try:
                answer = answer_to(**json.loads(line))
            except BaseException as error:  # a foreign function may even call sys.exit
                answer = {"error": f"raised {type(error).__name__}: {one_line(error, 300)}"}
    os._exit(0)


def make_verifier(task: str, options: dict, reward: str) -> Callable[..., dict]:
    from . import task_module

    verify, options = (load_reward(reward, alone=True), {}) if reward else (task_module(task).grade, options)
    return lambda completion, example: vars(verify(completion, Example(**example), **options))
