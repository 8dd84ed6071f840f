"""The run's folder: its files, and how a run is saved there and taken up again.

    OUT/config.json       the configuration, enough to start the run again
    OUT/metrics.jsonl     one JSON object per training step
    OUT/samples.jsonl     the answers of the last evaluation, with their grades; sample 0 is the greedy one
    OUT/checkpoint/       what a resume needs: tensors.safetensors, state.json; checkpoint.old/ is the one before
    OUT/model/            the trained model in Hugging Face layout, written with each checkpoint
    OUT/adapter/          with --lora-rank, what is trained, as `peft` has it; it is merged into OUT/model
    OUT/summary.json      the closing numbers

A line of the metrics has `step`, `phase`, `kind`, `loss`, `grad_norm` (before clipping), `lr`, `seconds`, `tokens` and
`padding_fraction`. Adaptive steps add `p_sft`, `alpha`, `sft_norm` (the G_last that decided) and its age in steps,
`sft_norm_age`; steps with samples, what `sasr.draw_groups`, `report.measure_rollout` and `sasr.grpo_objective` measure;
mixed ones, `report.measure_mixing`, and of their SFT part alone, without its weight, `loss_sft` and `grad_norm_sft`;
updates, `tokens_trained`, those of completions, and `tokens_read`, prompts and padding included;
evaluations, `eval/` scores.

Every file but the metrics is written as NAME.tmp, flushed to the disk and renamed, so that a reader finds the old one
or the new one whole, whenever the process is killed. The metrics grow by a line in one write, and resuming cuts them
back to where they were at the checkpoint. A checkpoint lists the SHA-256 of its files; a damaged one is named and set
aside, and the one before it is used. The process that trains into a folder holds its lock until it ends.

A folder may come from a stranger: nothing is unpickled, no link is followed, sums and shapes are checked. But its
config.json may name a `--reward` file, and to resume the run is to run that file.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
from array import array
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.files import check_number, one_line, parse_json, read_json, short_repr

from . import parallel
from .config import RunConfig, keeps_initial, path_in
from .report import say

SUMS = "SHA256SUMS"
FROZEN = ("reference", "warmed_up")  # policies that a trainer may keep


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    folder: Path
    state: dict  # state.json

    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "tensors.safetensors")

    @contextlib.contextmanager
    def fits(self):
        """Whatever does not fit this run, from another version or a stranger, is a ValueError that names the folder."""
        try:
            yield
        except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else one_line(error)
            raise ValueError(f"{self.folder} does not fit this run: {reason}") from None


class RunFolder:
    def __init__(self, out: str | Path):
        self.path = Path(os.path.expanduser(out))
        self.metrics = self.path / "metrics.jsonl"

    @parallel.on_rank_0
    def check_unused(self) -> None:
        """Raises ValueError if the path is a file, or a folder with anything in it: nothing is overwritten."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--out {self.path}: a file is in the way")
        found = sorted(set(os.listdir(self.path)) - {"lock"}) if self.path.exists() else []
        if found:
            resumable = f", or --resume {self.path}" if {"config.json", "metrics.jsonl"} <= set(found) else ""
            raise ValueError(f"--out {self.path} is not empty, it holds {found[0]}; name another{resumable}")

    def write_json(self, name: str, value: dict) -> None:
        self.write(name, json.dumps(value, indent=2) + "\n")

    def write_jsonl(self, name: str, records: list[dict]) -> None:
        self.write(name, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))

    @parallel.on_rank_0
    def write(self, name: str, text: str) -> None:
        with written_beside(self.path / name) as beside:
            beside.write_text(text, encoding="utf-8")
        os.replace(beside, self.path / name)
        flush(self.path)

    @contextlib.contextmanager
    def locked(self, *, new: bool = False):
        """The one way to write here. ValueError names a process that does, a link or, for `new`, what is in the way."""
        if parallel.RANK > 0:
            yield
            return
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
            if new:
                self.check_unused()
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    @parallel.on_rank_0
    def log(self, record: dict) -> None:
        """Append one line, in a single write, or nothing. JSON has no NaN or infinity: they become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        line = (json.dumps(finite) + "\n").encode()
        with naming(self.metrics), self.metrics.open("ab", buffering=0) as file:
            length, written = file.tell(), file.write(line)
            if written < len(line):  # a full disk takes half a line
                file.truncate(length)
                raise OSError(f"only {written} of {len(line)} bytes could be written")

    def records(self) -> list[dict]:
        """The lines of the metrics. Those that cannot be read are left out, and counted on standard error."""
        records, bad = [], []
        for number, line in enumerate(self.metrics.read_bytes().splitlines(), start=1):
            try:
                records.append(dict(parse_json(line)))
            except (ValueError, TypeError):
                bad.append(number)
        if bad:
            say(f"{self.metrics}:{bad[0]}: no JSON object, so not looked at (such lines: {len(bad)})")
        return records

    @parallel.on_rank_0
    def replace_folder(self, name: str, fill, *, keep_old: bool = False) -> None:
        """Let `fill(path)` fill a fresh folder, then rename it to OUT/name, and the one that was there to name.old."""
        target, old = self.path / name, self.path / f"{name}.old"
        with written_beside(target) as beside:
            beside.mkdir()
            fill(beside)
        if target.exists():  # if not, `old` is the only good one: a crash came between these two renames
            remove(old)
            os.rename(target, old)
        os.rename(beside, target)
        flush(self.path)
        if not keep_old:
            remove(old)

    @parallel.on_rank_0
    def save_checkpoint(self, tensors: dict[str, Tensor], state: dict) -> None:
        """Tensors and JSON, nothing pickled; `state` gains the present length of the metrics in bytes."""
        flush(self.metrics)
        state = state | {"metrics_bytes": self.metrics.stat().st_size}

        def fill(folder: Path) -> None:
            plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
            save_file(plain, folder / "tensors.safetensors")
            (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            sums = "".join(f"{sha256(file)}  {file.name}\n" for file in sorted(folder.iterdir()))
            (folder / SUMS).write_text(sums, encoding="utf-8")  # as `sha256sum -c` reads it

        self.replace_folder("checkpoint", fill, keep_old=True)

    def find_checkpoint(self) -> Checkpoint | None:
        """The last checkpoint that is whole; None if the run stopped before its first one.

        A damaged one is named on standard error, and passed over. Raises ValueError if there are only damaged ones.
        """
        problems = []
        for folder in filter(Path.exists, (self.path / "checkpoint", self.path / "checkpoint.old")):
            try:
                check_sums(folder)
                state = read_json(folder / "state.json")
                check_number("state.json: metrics_bytes", state.get("metrics_bytes"), 0, math.inf)
            except (OSError, ValueError) as error:
                problems.append(f"{folder}: the checkpoint cannot be used ({error})")
                continue
            for problem in problems:
                say(f"{problem}; going on from the one before it")
            return Checkpoint(folder, state)
        if problems:
            raise ValueError("; ".join([*problems, "to begin again from the configuration, move them away"]))
        return None

    @parallel.on_rank_0
    def rewind(self, checkpoint: Checkpoint | None, source: Self | None = None) -> None:
        """Cut off the metrics after a checkpoint (None: all), and set aside a later one that is damaged.

        source: the folder that this one branches off, whose metrics go on here.
        """
        if source and source.metrics.exists():
            shutil.copy(source.metrics, self.metrics)
        later, damaged = self.path / "checkpoint", self.path / "checkpoint.damaged"
        if checkpoint and checkpoint.folder != later and later.exists():  # else the next would replace the whole one
            remove(damaged)
            os.rename(later, damaged)
        length = checkpoint.state["metrics_bytes"] if checkpoint else 0
        self.metrics.touch()
        if self.metrics.stat().st_size < length:
            say(f"{self.metrics}: lines of steps before the checkpoint are missing; going on without them")
            length = self.metrics.read_bytes().rfind(b"\n") + 1
        os.truncate(self.metrics, length)
        (self.path / "summary.json").unlink(missing_ok=True)  # of a run that was finished, and is no longer


def default_out(config: RunConfig, kind: str) -> str:
    """runs/KIND-TASK-SEED, with a number behind it if that is taken."""
    base = f"runs/{kind}-{config.task.partition(':')[0]}-{config.seed}"
    return next(out for n in itertools.count(1) if not Path(out := f"{base}-{n}" if n > 1 else base).exists())


# ----------------------------------------------------------------------------- saving and restoring a trainer


def save(trainer, folder: RunFolder, fingerprint: dict[str, str]) -> None:
    """The model first: a run whose last checkpoint says that it has finished has its last model, too."""
    save_weights(trainer, folder)
    state = dataclasses.asdict(trainer.state)
    state["unlogged"] = state.pop("pending")  # its name in files
    saved = {"state": state, "controller": trainer.controller.state_dict(), "method": trainer.method.memory}
    saved |= {"config": dataclasses.asdict(trainer.config), "config_hash": trainer.config.hash()}
    folder.save_checkpoint(parallel.collect(named_tensors(trainer)), saved | {"fingerprint": fingerprint})
    parallel.gather("saved")  # of a rank that ends before, after a signal, torchrun thinks that it failed: it ends all


def save_weights(trainer, folder: RunFolder) -> None:
    """OUT/model, and OUT/adapter. With --shard every rank helps to put the weights together."""
    model, shard = trainer.model, trainer.config.shard
    weights = parallel.collect(dict(model.merged_parameters())) if shard else None
    folder.replace_folder("model", partial(save_model, trainer, weights=weights))
    if model.adapter:
        weights = parallel.collect(dict(model.trained_parameters())) if shard else None
        folder.replace_folder("adapter", partial(model.save_adapter, base=trainer.config.model, weights=weights))


def save_model(trainer, path: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Weights and tokenizer in Hugging Face layout."""
    dtype = trainer.config.save_dtype
    dtype = trainer.model.stored_dtype if dtype == "same" else getattr(torch, dtype)
    trainer.model.save_pretrained(path, dtype=dtype, weights=weights)
    trainer.codec.save(path)


def named_tensors(trainer) -> dict[str, Tensor]:
    """Weights, Adam's moments and the frozen policies, each under its own prefix; of adapters not what is frozen."""
    named = {f"model.{name}": p for name, p in trainer.model.trained_parameters()}
    for prefix, optimizer in optimizers(trainer).items():
        for name, parameter in trainer.model.trained_parameters():
            for key, value in optimizer.state[parameter].items():  # step, exp_avg, exp_avg_sq
                named[f"{prefix}.{key}.{name}"] = value
    for prefix in FROZEN:
        if (frozen := getattr(trainer, prefix)) is not None:
            named |= {f"{prefix}.{name}": p for name, p in frozen.trained_parameters()}
    return named


def optimizers(trainer) -> dict[str, torch.optim.Optimizer]:
    """By their prefix in files; the second only with --separate-moments."""
    apart = trainer.grpo_optimizer is not trainer.optimizer
    return {"optimizer": trainer.optimizer} | ({"grpo_optimizer": trainer.grpo_optimizer} if apart else {})


def fingerprint_of(trainer) -> dict[str, str]:
    """SHA-256 of all that goes into the steps, by kind; causes stand before their effects."""
    codec, chat, reward = trainer.codec, trainer.codec.chat, path_in("reward", trainer.config.reward)
    trained = dict.fromkeys((trainer.task, trainer.warmup_task))  # often the same
    tested = [trainer.task, *trainer.ood_tasks.values()]
    kinds = {
        "reward": [Path(reward).read_bytes()] if reward else [],
        "training examples": (example for task in trained for example in task.source.train),
        "test examples": (example for task in tested for example in task.source.test),
        "verifier": [getattr(trainer.task.source.verify, "keywords", {})],
        "tokenizer (tokenizer.json)": [codec.tokenizer.to_str()],
        "chat template": [chat and chat.source],
        "special tokens (tokenizer_config.json)": [chat and chat.special_tokens],
        "stop tokens (generation_config.json)": [codec.stops],
        "model (config.json)": [trainer.model.config.to_dict()],
        "training prompts": (ids for task in trained for ids in task.train_prompts),
        "demonstrations": (ids for task in trained for pair in task.demonstrations for ids in pair),
        "evaluation prompts": (ids for task in tested for ids in task.eval_prompts),
    }
    if trainer.model.adapter:  # what a checkpoint does not hold
        for kind, folder in {"weights": trainer.checkpoint, "adapter": trainer.config.adapter}.items():
            kinds[f"{kind} (*.safetensors)"] = map(sha256, sorted(Path(folder).glob("*.safetensors")) if folder else [])
    return {kind: sum_of(items) for kind, items in kinds.items()}


def sum_of(items: Iterable) -> str:
    """Of one item after the other. Token ids go in as bytes, which takes a tenth of the time of their text."""
    total = hashlib.sha256()
    for item in items:
        content = array("i", item).tobytes() if isinstance(item, list) else repr(item).encode()
        total.update(len(content).to_bytes(8) + content)
    return total.hexdigest()


def check_fingerprint(trainer, saved: dict[str, str], now: dict[str, str]) -> None:
    """Raises ValueError naming the first kind that is not as it was. A reward may have been mended: that is told."""
    flags = " ".join(f"--{n} {v}" for n in ("task", "data", "model", "adapter") if (v := vars(trainer.config)[n]))
    for kind in [kind for kind in now if saved[kind] != now[kind]]:
        if kind != "reward":
            raise ValueError(f"other {kind} than when it was written: {flags}")
        say(f"--reward {trainer.config.reward}: the file has changed since the checkpoint; what it gives now counts")


def read_state(checkpoint: Checkpoint, state_class: type):
    """The state of the run at a checkpoint. Raises ValueError, KeyError or TypeError for what cannot be one."""
    values = dict(checkpoint.state["state"])
    values["pending"] = values.pop("unlogged")  # its name in files
    state = state_class(**values)
    for spec in dataclasses.fields(state):
        value = values[spec.name]
        if spec.type is int:
            check_number(spec.name, value, 0, math.inf)
    if not isinstance(state.warmup_sft, list):
        raise ValueError(f"warmup_sft: {short_repr(state.warmup_sft)} is no list")
    for measured in state.warmup_sft:
        for key in ("grad_norm", "loss"):  # one NaN, and no p_t would ever be above alpha again
            check_number(f"warmup_sft: {key}", measured[key], 0.0, sys.float_info.max)
    numbers = [*state.seconds.values(), *state.accuracy.values(), *state.scores.values(), state.reward or 0.0]
    valid = all(isinstance(number, (int, float)) for number in numbers)  # a score may well be NaN
    if not valid or set(state.seconds) != set(state_class().seconds) or not isinstance(state.pending, dict | None):
        raise ValueError(f"seconds, accuracies, scores or the last line are invalid: {numbers}, {state.pending!r}")
    return state


@torch.no_grad()
def restore(trainer, checkpoint: Checkpoint, state, fingerprint: dict[str, str]) -> None:
    """Take up a checkpoint and its state. Raises ValueError or KeyError naming what does not fit."""
    check_fingerprint(trainer, checkpoint.state["fingerprint"], fingerprint)
    saved, config, branch = checkpoint.tensors(), trainer.config, state.step <= trainer.config.warmup_steps
    prefixes = {name.partition(".")[0] for name in saved}
    frozen = prefixes & set(FROZEN)
    if branch:  # they are made anew, but for the policy before the first step
        frozen = {"reference"} if keeps_initial(vars(config)) else set()
    for prefix in frozen:
        setattr(trainer, prefix, trainer.frozen_copy())  # as yet the weights that the run began with
    for prefix, optimizer in optimizers(trainer).items():
        for _, p in trainer.model.trained_parameters() if prefix in prefixes else ():  # not before the first step
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    for name, tensor in named_tensors(trainer).items():
        if branch and name.startswith("reference.") and not keeps_initial(checkpoint.state["config"]):
            continue
        if saved[name].shape != tensor.shape:  # copy_ would repeat a smaller one
            raise ValueError(f"{name} has the shape {list(saved[name].shape)}, not {list(tensor.shape)}")
        parallel.fill(tensor, saved[name])
    trainer.state = state
    if branch:
        for measured in state.warmup_sft:
            trainer.controller.observe_warmup(measured[config.signal_key])
        if state.pending is None:  # else it is done after the evaluation that is still to come
            trainer.keep_policies()
    else:
        trainer.controller.load_state_dict(checkpoint.state["controller"])
        check_memory(trainer, checkpoint.state["config"], checkpoint.state["method"])
        trainer.method.memory |= checkpoint.state["method"]


def check_memory(trainer, before: dict, kept: dict[str, list]) -> None:
    """Raises ValueError for what a method cannot have kept, and for another run to replay than that before."""
    replay, demonstration_of = trainer.config.replay, trainer.task.demonstration_of
    for index in kept.get("collected", []):
        check_number("collected", index, 0, len(demonstration_of) - 1)
        if demonstration_of[index] is None:
            raise ValueError(f"collected: {index}: that prompt has no demonstration")
    for p in kept.get("p", []):
        check_number("p", p, 0.0, 1.0)
    if "p" in kept and replay != before["replay"] and kept["p"] != trainer.method.memory["p"]:  # moved is no other
        raise ValueError(f"--replay {replay}: its p_t are not those that the run keeps, of {before['replay']}")


# ----------------------------------------------------------------------------- files


@contextlib.contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """TARGET.tmp, to be written and then renamed: it is on the disk in the end, or, if anything fails, not there."""
    beside = target.with_name(f"{target.name}.tmp")
    remove(beside)
    with naming(target):
        try:
            yield beside
            for file in (*beside.rglob("*"), beside):
                flush(file)
        except BaseException:
            remove(beside)  # what did not fit must not stay in the way
            raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the disk names the file, as neither write() nor safetensors does."""
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


def flush(path: Path) -> None:
    """Out of the system's memory and onto the disk: a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check_sums(folder: Path) -> None:
    """Raises ValueError naming a file that is not as it was written."""
    lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    for name in ("state.json", "tensors.safetensors"):
        if f"{sha256(folder / name)}  {name}" not in lines:
            raise ValueError(f"{name} has changed since it was written, or {SUMS} has")
