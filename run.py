"""A run's folder and a run's life: metrics, checkpoints, signals, the progress line. Nothing of learning.

    OUT/config.json       the configuration, enough to start the run again
    OUT/metrics.jsonl     one JSON object a training step
    OUT/samples.jsonl     the answers of the last evaluation, with their grades
    OUT/checkpoint/       everything a resume needs: tensors.safetensors, state.json; checkpoint.old/ is the one before
    OUT/model/            the trained model in Hugging Face layout
    OUT/summary.json      the closing numbers

Every file but the metrics is written beside its name, flushed to the disk and renamed into place, so a reader finds
the old one or the new one and never half of one. The metrics are appended, a line in one write; a checkpoint remembers
how long the file was, and resuming cuts it back there, so that no step is logged twice.

A checkpoint lists its files with their SHA-256. One that was torn, or changed on the disk, is told apart by that, and
the one before it is used; the damaged one is set aside as checkpoint.damaged/. While a process trains into a folder it
holds the lock of it, which the system takes back when the process ends, however it does.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


class RunFolder:
    def __init__(self, out: str | Path):
        self.path = Path(out)
        self.metrics = self.path / "metrics.jsonl"

    def check_unused(self) -> None:
        """Raises ValueError if the path is a file, or a folder with anything in it: nothing is ever overwritten."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--out {self.path}: a file is in the way")
        found = sorted(set(os.listdir(self.path)) - {"lock"}) if self.path.exists() else []
        if found:
            resumable = f", or --resume {self.path}" if {"config.json", "metrics.jsonl"} <= set(found) else ""
            raise ValueError(f"--out {self.path} is not empty, it holds {found[0]}; name another{resumable}")

    def create(self, config: dict) -> None:
        """Start a run here. Raises ValueError if another one is here already."""
        self.check_unused()
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_json("config.json", config)
        self.metrics.touch()

    def write_json(self, name: str, value: dict) -> None:
        self._write(name, json.dumps(value, indent=2) + "\n")

    def write_jsonl(self, name: str, records: list[dict]) -> None:
        self._write(name, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))

    def _write(self, name: str, text: str) -> None:
        target, beside = self.path / name, self.path / f"{name}.tmp"
        with naming(target):
            try:
                beside.write_text(text, encoding="utf-8")
                _flush(beside)
                os.replace(beside, target)
            except BaseException:
                beside.unlink(missing_ok=True)
                raise
            _flush(self.path)

    @contextlib.contextmanager
    def locked(self):
        """The one way to write into a folder: one process at a time, and to files of its own only.

        Raises ValueError naming the process that holds the lock, or what is a link, a pipe or a device.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = self.path / "lock"
        check_plain(lock)
        with lock.open("a+", encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise ValueError(f"{self.path}: process {file.read() or '?'} is writing into this folder") from None
            for found in sorted(self.path.rglob("*")):  # not before: the files of a run at work come and go
                check_plain(found)
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def read_json(self, name: str) -> dict:
        file = self.path / name
        if not file.is_file():
            raise ValueError(f"{file}: no such file; is {self.path} the folder of a run?")
        try:
            value = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: not valid JSON ({error})") from None
        if not isinstance(value, dict):
            raise ValueError(f"{file}: expected a JSON object, got {type(value).__name__}")
        return value

    def log(self, record: dict) -> None:
        """Append one line, in a single write, or nothing. JSON has no NaN or infinity: they become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        line = (json.dumps(finite) + "\n").encode()
        with naming(self.metrics), self.metrics.open("ab", buffering=0) as file:
            length = file.tell()
            try:
                written = file.write(line)
                if written < len(line):
                    raise OSError(f"only {written} of {len(line)} bytes could be written")
            except OSError:
                file.truncate(length)  # a full disk takes half a line
                raise

    def replace_folder(self, name: str, write, *, keep_old: bool = False) -> None:
        """Let `write(path)` fill a fresh folder, then put it in the place of OUT/name, once called OUT/name.old."""
        target, beside, old = (self.path / f"{name}{suffix}" for suffix in ("", ".tmp", ".old"))
        with naming(target):
            remove(beside)
            try:
                beside.mkdir()
                write(beside)
                for file in (*beside.iterdir(), beside):
                    _flush(file)
            except BaseException:
                remove(beside)  # what did not fit must not stay in the way
                raise
        if target.exists():  # if not, `old` is the only good one: a crash came between these two renames
            remove(old)
            os.rename(target, old)
        os.rename(beside, target)
        _flush(self.path)
        if not keep_old:
            remove(old)

    def save_checkpoint(self, tensors: dict[str, torch.Tensor], state: dict) -> None:
        """Tensors and JSON, nothing pickled; `state` gains the present length of the metrics in bytes."""
        _flush(self.metrics)
        state = state | {"metrics_bytes": self.metrics.stat().st_size}

        def write(folder: Path) -> None:
            save_file(
                {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / "tensors.safetensors"
            )
            (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            sums = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
            listed = "".join(f"{digest}  {name}\n" for name, digest in sums.items())  # as `sha256sum -c` reads it
            (folder / SUMS).write_text(listed, encoding="utf-8")

        self.replace_folder("checkpoint", write, keep_old=True)

    def find_checkpoint(self) -> Checkpoint | None:
        """The last checkpoint that is whole; None if the run stopped before its first one.

        One that is not is named on standard error, and passed over. Raises ValueError if there are only such ones.
        """
        problems = []
        for folder in (self.path / "checkpoint", self.path / "checkpoint.old"):
            if not folder.exists():
                continue
            try:
                check_sums(folder)
                state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
                if type(state["metrics_bytes"]) is not int or state["metrics_bytes"] < 0:
                    raise ValueError(f"state.json: metrics_bytes {state['metrics_bytes']!r}")
            except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
                problems.append(f"{folder}: the checkpoint cannot be used ({error})")
                continue
            for problem in problems:
                say(f"{problem}; going on from the one before it")
            return Checkpoint(folder, state)
        if problems:
            raise ValueError("; ".join([*problems, "to begin again from the configuration, move them away"]))
        return None

    def rewind(self, checkpoint: Checkpoint | None) -> None:
        """Undo what was written after a checkpoint (None: after the start): lines of the metrics, and a later
        checkpoint that is damaged, which is set aside, lest the next one take the place of the one that is whole.
        """
        later = self.path / "checkpoint"
        if checkpoint and checkpoint.folder != later and later.exists():
            remove(self.path / "checkpoint.damaged")
            os.rename(later, self.path / "checkpoint.damaged")
        length = checkpoint.state["metrics_bytes"] if checkpoint else 0
        self.metrics.touch()
        if self.metrics.stat().st_size < length:
            say(f"{self.metrics}: lines of steps before the checkpoint are missing; going on without them")
            length = self.metrics.read_bytes().rfind(b"\n") + 1
        os.truncate(self.metrics, length)

    def branch_to(self, other: RunFolder, checkpoint: Checkpoint | None) -> Checkpoint | None:
        """Copy checkpoint and metrics into a new run's folder, to go on there; this one stays as it is."""
        other.check_unused()
        other.path.mkdir(parents=True, exist_ok=True)
        if checkpoint:
            copy = partial(shutil.copytree, checkpoint.folder, dirs_exist_ok=True)
            other.replace_folder("checkpoint", copy)
            checkpoint = Checkpoint(other.path / "checkpoint", checkpoint.state)
        if self.metrics.exists():
            shutil.copy(self.metrics, other.metrics)
        return checkpoint


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    state: dict

    def tensors(self) -> dict[str, torch.Tensor]:
        """On the CPU."""
        return load_file(self.folder / "tensors.safetensors")


SUMS = "SHA256SUMS"


@contextlib.contextmanager
def naming(path: Path):
    """An error of the disk names the file; neither write() nor safetensors knows it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "filename", None):
            raise
        raise OSError(f"{path}: {error}") from error


def check_plain(path: Path) -> None:
    """Raises ValueError for a link, a pipe or a device: to write there would change something else."""
    if path.is_symlink() or (path.exists() and not path.is_file() and not path.is_dir()):
        raise ValueError(f"{path}: a link, or no plain file; a run's folder has only files of its own")


def remove(path: Path) -> None:
    """Whatever is there; of a link, the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Out of the system's memory and onto the disk: a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check_sums(folder: Path) -> None:
    """Raises ValueError naming a file that is not as it was written."""
    listed = folder / SUMS
    if not listed.is_file():
        raise ValueError(f"it has no {SUMS}")
    lines = listed.read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in ("state.json", "tensors.safetensors"):
        if name not in sums:
            raise ValueError(f"{SUMS} does not list {name}")
        if _sha256(folder / name) != sums[name]:
            raise ValueError(f"{name} has changed since it was written")


class Interrupt:
    """Turns the first SIGINT, SIGTERM or SIGHUP into a flag, so that the step in hand can end; the second one kills."""

    def __init__(self):
        self.signal: int | None = None
        self.waits = True

    def __enter__(self) -> Interrupt:
        in_main = threading.current_thread() is threading.main_thread()  # elsewhere Python allows no handlers
        watched = [signal.SIGINT, signal.SIGTERM] if in_main else []
        if in_main and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as it is under nohup
            watched.append(signal.SIGHUP)
        self.previous = {s: signal.signal(s, self._on_signal) for s in watched}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self):
        """Where nothing is half done: a signal raises Stopped on the spot, and so does one that came before."""
        self.waits = False
        try:
            if self.signal:
                raise Stopped(self.signal)
            yield
        finally:
            self.waits = True

    def _on_signal(self, number, frame) -> None:
        self.signal = number
        for s in self.previous:  # a terminal that closes may send SIGHUP twice
            signal.signal(s, signal.SIG_IGN if s == signal.SIGHUP else signal.SIG_DFL)
        with contextlib.suppress(RuntimeError):  # it came in the middle of another line's write
            say("\nfinishing this step, then saving; a second signal stops at once")
        if not self.waits:
            raise Stopped(number)


class Stopped(Exception):
    """A run ends early on a signal."""

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by signal {signal_number}")
        self.signal = signal_number


class Fault(Exception):
    """A run cannot go on, through no fault of its input."""


class Progress:
    """One line that rewrites itself on a terminal; into a pipe or file, a fresh line every 10 seconds."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stderr
        self.live, self.last = self.stream.isatty(), float("-inf")
        self.open = False  # whether the line on the terminal has not ended

    def show(self, text: str, *, last: bool = False) -> None:
        now = time.monotonic()
        if not last and now - self.last < (0.1 if self.live else 10):
            return
        self.last = now
        width = shutil.get_terminal_size().columns - 1
        self._write("\r" + text[:width].ljust(width) if self.live else text + "\n")
        self.open = self.live

    def say(self, text: str) -> None:
        """Lines that stay."""
        self._write(("\n" if self.open else "") + text + "\n")
        self.open = False

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a closed pipe or terminal: nobody listens, which is no reason to stop
            self.stream.write(text)
            self.stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        if self.open:
            self._write("\n")
            self.open = False


def say(text: str) -> None:
    Progress().say(text)


def clock(seconds: float) -> str:
    """90 -> '1:30'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def provenance(device: torch.device) -> dict:
    """What produced a result: versions, machine and commit."""
    ask = ["git", "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(
            ask, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        commit = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in ("torch", "numpy", "tokenizers", "safetensors")},
        "device": f"{device.type} ({name}, {torch.get_num_threads()} threads)",
        "git_commit": commit,
    }
