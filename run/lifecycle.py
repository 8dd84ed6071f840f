"""A run's life: how it begins, goes on and ends, whatever happens.

    Ctrl-C, SIGTERM, a closed terminal    finishes the step (an evaluation is left at once, and done again later), saves
                                          and says how to resume; a second signal stops at once
    SIGKILL, a crash, a full disk         what was saved last is whole (`checkpoint.py`)
    loss, gradient or sampler not finite, drops the step, says so and counts it (`Run.drop`); G_last stays as it is;
    or the verifier failed everywhere     --max-bad-steps in a row stop the run and leave OUT/bad_batch.json
    out of memory                         halves the micro-batch, or the chunk of a rollout, and takes the step again
    a --reward raises, hangs, or returns  it runs in a process of its own (`data/isolated.py`), killed after
    no number                             --reward-seconds; the completion counts as --reward-on-error, and as a failure
    a --reward cannot be loaded           one line, before anything is written

An error is one line on standard error. Exit codes: 0 done, 2 bad input, 1 a fault, 130, 143 or 129 stopped by a signal.
"""

import contextlib
import dataclasses
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from data.files import one_line, read_json
from data.isolated import VerifierFailed
from model import resolve_checkpoint

from . import parallel
from .checkpoint import Checkpoint, RunFolder, default_out, fingerprint_of, read_state, restore, save, save_weights
from .config import RunConfig, check_resume, flag_name, keeps_initial, path_in, today
from .diagnosis import diagnose
from .report import headline, progress_line, say, summarise


@dataclasses.dataclass
class Run:
    """One run in its folder. Nothing is written before `begin`, so that an error leaves the disk untouched."""

    config: RunConfig
    folder: RunFolder
    source: RunFolder | None = None  # of the run that goes on: `folder` itself, or one that this run branches off
    source_lock: contextlib.ExitStack | None = None
    checkpoint: Checkpoint | None = None  # the last one, if there is any, and the state of the run at it
    state: object = None

    @contextlib.contextmanager
    def begin(self, trainer) -> Iterator[None]:
        """Take up the checkpoint, if there is one; then heed signals and show progress until the run stops."""
        self.trainer, self.fingerprint, folder = trainer, fingerprint_of(trainer), self.folder
        branch = self.source not in (None, folder)
        if self.checkpoint:
            with self.checkpoint.fits():
                restore(trainer, self.checkpoint, self.state, self.fingerprint)
        begun = {"checkpoint": repr(self.checkpoint and self.checkpoint.state), "configuration": self.config.hash()}
        parallel.check_alike(begun | self.fingerprint)  # and all have read what will now be written over
        with folder.locked(new=True) if self.source is not folder else contextlib.nullcontext():
            folder.rewind(self.checkpoint, self.source if branch else None)
            if branch:
                if self.checkpoint:
                    save(trainer, folder, self.fingerprint)  # before config.json, without which none resumes here
                self.source_lock.close()  # others may go on there
            folder.write_json("config.json", dataclasses.asdict(self.config) | {"out": str(folder.path)})
            with trainer.interrupt, trainer.progress:
                trainer.progress.say(headline(trainer, folder.path))
                if trainer.state.step == self.config.total_steps and not trainer.state.pending:  # no step will save it
                    save_weights(trainer, folder)
                try:
                    yield
                except Stopped:
                    again = f"python sasr.py --resume {shlex.quote(str(folder.path))}"
                    trainer.progress.say(f"stopped after step {trainer.state.step}; go on with: {again}")
                    raise

    def drop(self, bad) -> dict:
        """Count and report a bad step, and give its record. Raises Fault after too many in a row, or a fatal one."""
        state, step = self.trainer.state, self.trainer.state.step + 1
        state.bad_steps += 1
        state.bad_in_a_row += 1
        if bad.fatal or state.bad_in_a_row >= self.config.max_bad_steps:
            decode, batch = self.trainer.codec.tokenizer.decode_batch, bad.batch
            texts = {"step": step, "prompt_ids": batch.prompts, "completion_ids": batch.completions}
            texts["prompts"] = decode(batch.prompts, skip_special_tokens=False)
            texts["completions"] = decode(batch.completions, skip_special_tokens=False)
            texts["advantages"] = None if batch.advantages is None else batch.advantages.tolist()
            self.folder.write_json("bad_batch.json", texts)
            many = "" if bad.fatal else f" (bad steps in a row: {state.bad_in_a_row})"
            raise Fault(f"step {step}: {bad.reason}{many}; its batch is in {self.folder.path / 'bad_batch.json'}")
        self.trainer.progress.say(f"step {step} is dropped: {bad.reason} (bad steps so far: {state.bad_steps})")
        return bad.record

    @contextlib.contextmanager
    def save_on_interrupt(self) -> Iterator[None]:
        """An evaluation that is interrupted, or fails, loses no step: on resuming only the evaluation is done again.

        Of several processes one that fails does so alone, and cannot save what all have a part of.
        """
        try:
            yield
        except (Stopped, RuntimeError) as error:
            if isinstance(error, Stopped) or parallel.RANKS == 1:
                save(self.trainer, self.folder, self.fingerprint)
            raise

    def log(self, scores: dict[str, float]) -> None:
        """The line of the step that has come to its end, if there is one, and the answers behind its scores."""
        state, config = self.trainer.state, self.config
        if state.pending:
            record = {"step": state.step} | state.pending | {f"eval/{name}": value for name, value in scores.items()}
            self.folder.log(record)
            state.pending = None
            self.trainer.progress.show(progress_line(config, state, record), last=state.step == config.total_steps)
        if scores:
            self.folder.write_jsonl("samples.jsonl", self.trainer.answers)

    def save_if_due(self) -> None:
        """Save where that is due; after a signal save, and raise Stopped."""
        step, every = self.trainer.state.step, self.config.save_every
        signal_number = self.trainer.interrupt.agreed()
        last = step == self.config.total_steps
        if last or signal_number or (every and step % every == 0):
            save(self.trainer, self.folder, self.fingerprint)
        if signal_number and not last:
            raise Stopped(signal_number)

    def finish(self) -> dict:
        """The summary, also written to the folder."""
        summary = summarise(self.trainer, self.folder.path)
        summary["diagnosis"] = diagnose(self.folder.records(), summary) if parallel.RANK == 0 else []
        self.folder.write_json("summary.json", summary)
        return summary


def new_run(config: RunConfig) -> Run:
    config = dataclasses.replace(config, template_date=config.template_date or parallel.gather(today())[0])
    folder = RunFolder(config.out or default_out(config, config.controller))
    folder.check_unused()  # before anything takes time
    return Run(config, folder)


@contextlib.contextmanager
def resumed_run(
    out: str | Path, overrides: dict, config_class: type, state_class: type, learning_rate: Callable
) -> Iterator[Run]:
    """Go on with a run from its last checkpoint, or from its beginning if it has none.

    overrides: fields of its configuration that are to change; with another `out`, the run goes on there, as a branch.
    Whatever can be refused is refused before anything is written. Raises ValueError naming flag or file.
    """
    source = RunFolder(out)
    file = source.path / "config.json"
    if not file.is_file():
        raise ValueError(f"{file}: no such file; is {source.path} the folder of a run?")
    with contextlib.ExitStack() as lock:
        lock.enter_context(source.locked())
        written = config_class.from_json(read_json(file), file)
        written.out = str(source.path)  # it may have been moved
        checkpoint = source.find_checkpoint()
        old, state = written, state_class()
        if checkpoint:
            with checkpoint.fits():
                old = config_class(**checkpoint.state["config"] | {"out": written.out})
                state = read_state(checkpoint, state_class)
        config = dataclasses.replace(written, **overrides)
        changed = check_resume(old, config, state, overrides, learning_rate)
        if changed:
            say(f"resuming with {changed}")
        config = with_files(config, source, overrides, checkpoint)
        same = RunFolder(config.out).path.resolve() == source.path.resolve()
        folder = source if same else RunFolder(config.out)  # another one is a branch
        if not same:
            folder.check_unused()
        yield Run(config, folder, source, lock, checkpoint, state)


def with_files(config: RunConfig, source: RunFolder, overrides: dict, checkpoint: Checkpoint | None) -> RunConfig:
    """For a --model that is gone, OUT/model; its weights are in the checkpoint. ValueError names what else is gone."""
    for name in ("data", "reward", "adapter", "replay"):
        if (path := path_in(name, getattr(config, name))) and not os.path.exists(path):
            raise ValueError(f"{flag_name(name)} {path}: no such file or folder; {flag_name(name)} names its new place")
    try:
        if config.model:
            resolve_checkpoint(config.model, weights=False)
        return config
    except ValueError as error:
        own = next((p for n in ("model", "model.old") if (p := source.path / n / "config.json").is_file()), None)
        begins_anew = not checkpoint or (keeps_initial(vars(config)) and not keeps_initial(checkpoint.state["config"]))
        if "model" in overrides or begins_anew or config.lora_rank or not own:
            raise ValueError(f"{error}; --model names its new place") from None
        say(f"{error}; going on from the run's own {own.parent}, and the weights of its checkpoint")
        return dataclasses.replace(config, model=str(own.parent))


# ----------------------------------------------------------------------------- signals


class Interrupt:
    """Turns the first SIGINT, SIGTERM or SIGHUP into a flag, so that the step in hand can end; the second one kills."""

    def __init__(self):
        self.signal, self.since = 0, 0.0  # its number, and when it came
        self.waits, self.previous = True, {}

    def __enter__(self) -> Self:
        in_main = threading.current_thread() is threading.main_thread()  # elsewhere Python allows no handlers
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if in_main else ():
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # as it is under nohup
                self.previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self):
        """Where nothing is half done: a signal raises Stopped on the spot, and so does one that came before."""
        self.waits = parallel.RANKS > 1  # one of several must not leave the others waiting
        try:
            self.check()
            yield
        finally:
            self.waits = True

    def agreed(self) -> int:
        """The signal that has come, to whichever process; 0: none."""
        return max(parallel.gather(self.signal))

    def check(self) -> None:
        if number := self.agreed():
            raise Stopped(number)

    def _on_signal(self, number, frame) -> None:
        again = self.signal > 0
        if again and time.monotonic() < self.since + 10:
            return  # one of several processes hears of the same one from the terminal and from torchrun
        for s in self.previous if again or parallel.RANKS == 1 else ():  # a closing terminal may send SIGHUP twice
            signal.signal(s, signal.SIG_IGN if s == signal.SIGHUP else signal.SIG_DFL)
        if again:
            signal.raise_signal(number)
        self.signal, self.since = number, time.monotonic()
        with contextlib.suppress(RuntimeError):  # it came in the middle of another line's write
            say("\nfinishing this step, then saving; a second signal stops at once")
        if not self.waits:
            raise Stopped(number)


class Stopped(Exception):
    """A run ends early on the signal of this number."""

    signal = property(lambda self: self.args[0])


class Fault(Exception):
    """A run cannot go on, through no fault of its input."""


# ----------------------------------------------------------------------------- exit codes

BAD_INPUT = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def exit_code(command: Callable[[list[str] | None], None]) -> Callable[[list[str] | None], int]:
    """Turn a command into one that returns an exit code, and says what went wrong in a line."""

    def main(argv: list[str] | None = None) -> int:
        for name in ("stdin", "stdout", "stderr"):
            if getattr(sys, name) is None:  # closed: its number would go to the next file that is opened
                setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115 (as long as the process lives)
        store = None
        try:
            store = parallel.join()
            command(argv)
            sys.stdout.flush()
            code = 0
        except Stopped as stopped:
            code = 128 + stopped.signal
        except KeyboardInterrupt:
            say("\nsasr.py: interrupted")
            code = 130
        except BrokenPipeError:  # who read our output has gone, which Python would complain of once more at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 0
        except Exception as error:
            if parallel.fails_first(store):
                report(error, debug="--debug" in (sys.argv if argv is None else argv))
            code = 2 if isinstance(error, BAD_INPUT) else 1
        return parallel.leave(code)

    return main


def report(error: Exception, debug: bool) -> None:
    """One line, below the traceback if that is asked for."""
    if debug:
        traceback.print_exception(error)
    expected = isinstance(error, (*BAD_INPUT, Fault, VerifierFailed, parallel.RankFailed, OSError))
    text = one_line(error, 1000) if expected else f"{type(error).__name__}: {error}"
    say(f"sasr.py: {text}{'' if expected or debug else ' (--debug shows where)'}")
