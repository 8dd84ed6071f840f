"""Runs that are killed, disks that fill up, files that change, steps that go wrong: nothing is lost."""

import contextlib
import dataclasses
import errno
import gc
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_rollout import PROMPTS, random_model
from test_run import begin, config, lines, weights
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import rollout
import run.checkpoint
import sasr
from data import Grade, chat, knights_knaves
from data.batch import Batch
from data.chat import ChatTemplate
from data.isolated import IsolatedVerifier
from data.task import Example, load_reward
from data.tokenizer import Codec, train_tokenizer
from model import ModelConfig, Transformer
from run.checkpoint import SUMS, RunFolder, named_tensors, remove, sha256
from run.lifecycle import Fault, Run
from run.setup import load_tasks

ROOT = Path(__file__).parents[1]

# ---- Killed ----------------------------------------------------------------------------------------------------------

# A run in a process of its own. It dies, without any chance to tidy up, when a counted event happens for the n-th time:
# the events are the calls of one function, before or after it did its work.
DYING = """
import json, os, signal, sys
sys.path.insert(0, {root!r})
import rollout, run.checkpoint, sasr
import torch
from data import Grade, knights_knaves

# An untrained model solves nothing, and GRPO skips a step without signal: reward something else.
knights_knaves.grade = lambda text, example: Grade(len(text) % 3 / 2, text == example.demonstration, False)

flags, event, count = json.loads(sys.argv[1])
left = count


def dies(owner, name):
    original = getattr(owner, name)

    def wrapper(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


places = {{
    "rollout": (rollout.Sampler, "_step"),
    "optimizer": (torch.optim.AdamW, "step"),
    "metrics": (run.checkpoint.RunFolder, "log"),
    "tensors": (run.checkpoint, "save_file"),
    "flush": (run.checkpoint, "flush"),
    "rename": (os, "rename"),
    "rmtree": (run.checkpoint.shutil, "rmtree"),
}}
if event:
    dies(*places[event])
sys.exit(sasr.main(flags))
"""


def start(flags: list[str], event: str = "", count: int = 0) -> subprocess.CompletedProcess:
    code = DYING.format(root=str(ROOT))
    return subprocess.run(
        [sys.executable, "-c", code, json.dumps([flags, event, count])],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


def flags_of(out: Path) -> list[str]:
    values = dataclasses.asdict(config(out)) | {"save_every": 3}
    flags = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags += [flag] if value else []
        else:
            flags += [flag, str(value)]
    return flags


def same_run(a: Path, b: Path) -> None:
    assert lines(a) == lines(b)
    for file in ("model/model.safetensors", "samples.jsonl"):
        assert (a / file).read_bytes() == (b / file).read_bytes()
    found = [RunFolder(out).find_checkpoint() for out in (a, b)]
    saved, again = (checkpoint.tensors() for checkpoint in found)
    assert set(saved) == set(again)
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    assert found[0].state["controller"] == found[1].state["controller"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    done = start(flags_of(out))
    assert done.returncode == 0, done.stderr
    return out


def survive(out: Path, kills: list[tuple[str, int]]) -> int:
    """Start, and resume after each kill; how many there were."""
    killed, arguments = 0, flags_of(out)
    for event, count in kills:
        done = start(arguments, event, count)
        if done.returncode == 0:
            return killed
        assert done.returncode == -signal.SIGKILL, done.stderr
        killed += 1
        if (out / "model").exists():
            assert weights(out)  # loads, although the run has not come to its end
        metrics = out / "metrics.jsonl"
        if metrics.exists():
            text = metrics.read_text()
            assert text == "" or text.endswith("\n")  # never half a line
            steps = [json.loads(line)["step"] for line in text.splitlines()]
            assert steps == list(range(1, len(steps) + 1))  # never a step twice
        if (out / "config.json").exists():
            arguments = ["--resume", str(out)]
    done = start(arguments)
    assert done.returncode == 0, done.stderr
    return killed


def test_killed_in_rollout_optimizer_and_checkpoint_a_run_ends_as_if_nothing_had_happened(tmp_path, whole):
    assert survive(tmp_path / "run", [("optimizer", 2), ("rollout", 40), ("rename", 5)]) == 3
    same_run(tmp_path / "run", whole)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_points_a_run_ends_as_if_nothing_had_happened(tmp_path, whole, seed):
    rng = random.Random(seed)
    most = {"rollout": 60, "optimizer": 6, "metrics": 6, "tensors": 2, "flush": 30, "rename": 4, "rmtree": 4}
    kills = [(event, rng.randint(1, most[event])) for event in rng.choices(list(most), k=7)]
    assert survive(tmp_path / "run", kills) >= 5
    same_run(tmp_path / "run", whole)


# ---- Files -----------------------------------------------------------------------------------------------------------


def two_checkpoints(out: Path) -> RunFolder:
    folder = RunFolder(out)
    begin(folder)
    for value in (1.0, 2.0):
        folder.save_checkpoint({"w": torch.full((50,), value)}, {"value": value})
    return folder


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", SUMS])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink, lambda file: file.write_bytes(b"foreign")])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, capsys, name, damage):
    folder = two_checkpoints(tmp_path / "run")
    damage(tmp_path / "run/checkpoint" / name)
    checkpoint = folder.find_checkpoint()
    assert (checkpoint.tensors()["w"][0], checkpoint.state["value"]) == (1, 1)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert str(tmp_path / "run/checkpoint") in err
    damage(tmp_path / "run/checkpoint.old" / name)
    with pytest.raises(ValueError, match="checkpoint cannot be used") as error:
        folder.find_checkpoint()
    assert "\n" not in str(error.value)


def test_a_damaged_checkpoint_never_takes_the_place_of_the_one_that_is_whole(tmp_path):
    folder = two_checkpoints(tmp_path / "run")
    flip_a_bit(tmp_path / "run/checkpoint/tensors.safetensors")
    folder.rewind(folder.find_checkpoint())
    assert (tmp_path / "run/checkpoint.damaged").is_dir()
    folder.save_checkpoint({"w": torch.full((50,), 3.0)}, {"value": 3})
    for value in (3, 1):
        assert folder.find_checkpoint().state["value"] == value
        shutil.rmtree(tmp_path / "run/checkpoint", ignore_errors=True)


def test_checksums_are_those_of_sha256sum(tmp_path):
    two_checkpoints(tmp_path / "run")
    done = subprocess.run(["sha256sum", "-c", SUMS], cwd=tmp_path / "run/checkpoint", check=False)
    assert done.returncode == 0


class FullDisk:
    """After so many bytes, writing ends in the middle, as on a disk that is full."""

    def __init__(self, monkeypatch, room: int):
        self.room = room
        original = run.checkpoint.save_file

        def save_file(tensors, path):
            size = sum(tensor.nbytes for tensor in tensors.values())
            if size > self.room:
                Path(path).write_bytes(b"\0" * self.room)
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            self.room -= size
            original(tensors, path)

        monkeypatch.setattr(run.checkpoint, "save_file", save_file)


def test_a_full_disk_ends_the_run_with_one_line_and_the_last_checkpoint_intact(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    arguments = flags_of(out)
    size = sum(t.nbytes for t in named_tensors(sasr.Trainer(config(tmp_path / "unused"))).values())
    with monkeypatch.context() as patch:
        FullDisk(patch, 4 * size)  # the first checkpoints have moments, so one fits, or two
        assert sasr.main(arguments) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sasr.py: ")]
    assert len(errors) == 1
    assert "No space left" in errors[0]
    assert not (out / "checkpoint.tmp").exists()
    assert RunFolder(out).find_checkpoint() is not None
    assert sasr.main(["--resume", str(out)]) == 0


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_what_the_system_refuses_to_write_is_named_and_tidied_up(tmp_path, name):
    """A limit on the size of files: real errors, of safetensors and of Python."""
    folder = two_checkpoints(tmp_path)
    tensors = {"w": torch.ones(50_000 if name == "tensors.safetensors" else 1)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match=re.escape(str(tmp_path / "checkpoint"))):
            folder.save_checkpoint(tensors, {"value": "x" * 200_000})
        with pytest.raises(OSError, match=re.escape(str(tmp_path / "summary.json"))):
            folder.write_json("summary.json", {"value": "x" * 200_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob("*.tmp"))
    assert folder.find_checkpoint().state["value"] == 2


def test_scores_are_shown_although_they_cannot_be_written(tmp_path, monkeypatch, capsys):
    sasr.train(config(tmp_path / "x", steps=0))
    capsys.readouterr()

    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunFolder, "write", full_disk)
    task = config(tmp_path).task
    arguments = ["--eval-only", "--model", str(tmp_path / "x/model"), "--task", task, "--out", str(tmp_path / "y")]
    assert sasr.main([*arguments, "--eval-examples", "4", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert "accuracy" in captured.out
    assert captured.err.splitlines()[-1] == "sasr.py: [Errno 28] No space left on device"


@pytest.mark.parametrize("name", ["model/notes.txt", "checkpoint.tmp/x", "samples.jsonl", "notes.txt"])
def test_nothing_that_lies_in_the_folder_is_overwritten(tmp_path, capsys, name):
    mine = tmp_path / "run" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    sasr.train(config(tmp_path / "x", steps=0))
    model = str(tmp_path / "x/model")
    for arguments in (
        flags_of(tmp_path / "run"),
        ["--resume", str(tmp_path / "x"), "--steps", "1", "--out", str(tmp_path / "run")],
        ["--eval-only", "--model", model, "--device", "cpu", "--out", str(tmp_path / "run")],
    ):
        assert sasr.main(arguments) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line == f"sasr.py: --out {tmp_path / 'run'} is not empty, it holds {name.split('/')[0]}; name another"
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("name", ["model", "model.old", "checkpoint.tmp", "checkpoint.old"])
def test_a_link_in_the_way_is_put_away_and_what_it_leads_to_stays(tmp_path, name):
    folder = two_checkpoints(tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("mine")
    remove(folder.path / name)
    (folder.path / name).symlink_to(tmp_path / "mine")
    for value in (3, 4, 5):
        folder.save_checkpoint({"w": torch.ones(1)}, {"value": value})
        folder.replace_folder("model", lambda path: (path / "x").write_text("x"))
    assert folder.find_checkpoint().state["value"] == 5
    assert (tmp_path / "mine/file").read_text() == "mine"


def test_half_a_line_of_the_metrics_is_taken_back(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    begin(folder)
    folder.log({"step": 1})

    class Small:
        """A file that takes three bytes."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            return self.file.write(content[:3])

        def __getattr__(self, name):
            return getattr(self.file, name)

    original = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *args, **kwargs: Small(original(path, *args, **kwargs)))
        with pytest.raises(OSError, match="only 3 of"):
            folder.log({"step": 2})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_only_one_process_trains_into_a_folder(tmp_path):
    folder = RunFolder(tmp_path)
    begin(folder)
    with folder.locked():
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import run.checkpoint\n"
        code += f"with run.checkpoint.RunFolder({str(tmp_path)!r}).locked(): pass"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
        assert f"process {os.getpid()} is writing into this folder" in done.stderr
    with folder.locked():  # given back
        pass


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_is_dropped_and_counted(tmp_path, monkeypatch):
    trainer = sasr.Trainer(config(tmp_path / "x"))
    trainer.state.finish_step(trainer.step(), 0.0)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    norm = trainer.controller.g_last
    original = sasr.accumulate_gradient
    for bad in ({"loss": math.nan}, {"grad_norm": math.inf}):
        with monkeypatch.context() as patch:
            patch.setattr(sasr, "accumulate_gradient", lambda *args, bad=bad: original(*args) | bad)
            with pytest.raises(sasr.BadStep, match="loss or gradient not finite"):
                trainer.step()
        assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert trainer.controller.g_last == norm

    # In a run, the second and the third step are such.
    results = iter([{}, {"loss": math.nan}, {"grad_norm": math.inf}])
    counts, log = [], Run.log
    monkeypatch.setattr(sasr, "accumulate_gradient", lambda *args: original(*args) | next(results, {}))

    def spy(self, scores):
        counts.append((self.trainer.state.bad_steps, self.trainer.state.bad_in_a_row))
        log(self, scores)

    monkeypatch.setattr(Run, "log", spy)
    assert sasr.train(config(tmp_path / "x", steps=0))["bad_steps"] == 2
    assert counts[1:] == [(0, 0), (1, 1), (2, 2), (2, 0)]  # the first is before any step
    assert [record["grad_norm"] is None for record in lines(tmp_path / "x")] == [False, True, True, False]


def test_a_warmup_of_which_every_step_is_dropped_leaves_the_yardstick_to_a_probe(tmp_path, monkeypatch, capsys):
    original = sasr.accumulate_gradient
    left = 2

    def bad_at_first(*arguments):
        nonlocal left
        left -= 1
        return original(*arguments) | ({"grad_norm": math.nan} if left >= 0 else {})

    monkeypatch.setattr(sasr, "accumulate_gradient", bad_at_first)
    summary = sasr.train(config(tmp_path / "x", warmup_steps=2))
    assert summary["bad_steps"] == 2
    assert summary["g_warmup"] > 0
    monkeypatch.setattr(sasr, "accumulate_gradient", lambda *arguments: original(*arguments) | {"grad_norm": math.nan})
    assert sasr.main([*flags_of(tmp_path / "y"), "--warmup-steps", "2"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "step 3: no SFT gradient has been finite so far, so p_t has no yardstick; its batch is in" in line


@pytest.mark.parametrize("controller", ["sft", "grpo"])
def test_too_many_bad_steps_stop_the_run_and_keep_the_batch(tmp_path, monkeypatch, capsys, controller):
    original = sasr.after_step

    def poisoned(trainer):
        if trainer.state.step == 6:
            with torch.no_grad():
                trainer.model.head.fill_(math.nan)
        return original(trainer)

    monkeypatch.setattr(sasr, "after_step", poisoned)
    out = tmp_path / "run"
    arguments = [*flags_of(out), "--controller", controller, "--max-bad-steps", "3", "--eval-every", "0"]
    assert sasr.main(arguments) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sasr.py: ")]
    assert len(errors) == 1
    reason = "loss or gradient not finite" if controller == "sft" else "the sampler's probabilities are not finite"
    assert f"step 9: {reason} (bad steps in a row: 3)" in errors[0]
    batch = json.loads((out / "bad_batch.json").read_text())
    assert batch["step"] == 9
    assert len(batch["prompts"]) == len(batch["completion_ids"]) > 0
    records = lines(out)
    assert [r["grad_norm"] for r in records[6:]] == [None, None]


def test_logits_that_are_no_numbers_still_give_tokens_of_the_vocabulary():
    uniform = torch.full((3,), 0.5)
    logits = torch.stack([torch.zeros(7), torch.full((7,), math.nan), torch.full((7,), -math.inf)])
    tokens, logprobs = rollout.sample_tokens(logits, uniform, rollout.SamplingParams(4))
    assert ((tokens >= 0) & (tokens < 7)).all()
    assert logprobs.isfinite().tolist() == [True, False, False]


# ---- Memory ----------------------------------------------------------------------------------------------------------


def test_out_of_memory_in_the_update_halves_the_micro_batch_and_gives_the_same_step(tmp_path, monkeypatch):
    whole, cut = (sasr.Trainer(config(tmp_path / name, controller="alternate")) for name in "ab")
    limit = 150  # tokens a micro-batch that fit
    original = sasr.completion_logprobs

    def scarce(model, micro, temperature):
        if model is cut.model and micro.prompts.numel() + micro.completions.numel() > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(model, micro, temperature)

    monkeypatch.setattr(sasr, "completion_logprobs", scarce)
    for trainer in (whole, cut):
        for _ in range(8):
            trainer.state.finish_step(trainer.step(), 0.0)
            sasr.after_step(trainer)
    assert 0 < cut.budget.tokens <= limit
    for a, b in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_out_of_memory_with_a_single_sequence_is_an_error(tmp_path, monkeypatch):
    trainer = sasr.Trainer(config(tmp_path / "x"))

    def never(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sasr, "completion_logprobs", never)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.step()


class NewStorages(TorchDispatchMode):
    """Refers weakly to the memory of every tensor that an operation returns within."""

    def __init__(self, model):
        super().__init__()
        self.known = {p.untyped_storage()._cdata for p in model.parameters()}
        self.references = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                self.references.append(StorageWeakRef(tensor.untyped_storage()))
        return found

    def alive(self, patience=5.0):
        """How many are left, after some seconds: what belongs to a thread goes a moment after it is joined."""
        deadline = time.monotonic() + patience
        while True:
            gc.collect()
            left = sum(not reference.expired() for reference in self.references)
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.05)


@pytest.mark.parametrize("call", [2, 0, 3])
def test_after_out_of_memory_nothing_of_the_gradient_stays_in_memory(call):
    """A circle through autograd is out of gc's sight: the retry would have that much less.

    Memory runs out in a call of the first layer's MLP (prompts, completions, in backward again: completions, prompts),
    or, where the call is 0, as backward begins.
    """
    model, calls, failed = random_model(), [], []
    model.gradient_checkpointing = True
    batch = Batch([[1, 2, 3]] * 4 + [[4, 5]] * 4, [[5, 6, 7, 8]] * 8)

    def fail(at):
        if at == call:
            failed.append(at)
            raise torch.OutOfMemoryError("CUDA out of memory")

    def objective(batch, micro, logprobs, *_):
        logprobs.register_hook(lambda _: fail(0))
        return logprobs.sum(), {}

    def count_calls(*_):
        calls.append(1)
        fail(len(calls))

    def attempt():
        with storages, contextlib.suppress(torch.OutOfMemoryError):
            sasr.accumulate_gradient(model, [sasr.Part(batch, objective)], sasr.Config(), 1000)

    model.model["layers"][0].mlp.register_forward_pre_hook(count_calls)
    storages = NewStorages(model)
    # On a CPU what autograd had ready to run waits in a queue of the thread; that of a CUDA device is emptied at once.
    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    model.zero_grad()  # what backward had got to, which the next attempt begins by dropping
    assert failed == [call]
    assert len(storages.references) > 50
    assert storages.alive() == 0


def test_out_of_memory_in_the_rollout_shrinks_the_chunk_and_draws_the_same(monkeypatch):
    model, params = random_model(), rollout.SamplingParams(12)
    expected = rollout.generate(model, PROMPTS, params, group_size=4, generator=torch.Generator().manual_seed(3))
    original = rollout.Sampler.__init__

    def scarce(self, model, params, total, slots):
        if total > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(self, model, params, total, slots)

    monkeypatch.setattr(rollout.Sampler, "__init__", scarce)
    found = rollout.generate(model, PROMPTS, params, group_size=4, generator=torch.Generator().manual_seed(3))
    assert found.completions == expected.completions
    assert found.chunks > expected.chunks


# ---- Rewards ---------------------------------------------------------------------------------------------------------

REWARD = """
import os, time

def reward(completion, example):
    if completion == "raise":
        raise KeyError("two\\nlines")
    if completion == "hang":
        while True:
            pass
    if completion == "sleep":
        time.sleep(100)
    if completion == "die":
        os._exit(7)
    if completion == "leave":
        raise SystemExit(3)
    if completion == "close":
        os.closerange(3, 100)
        time.sleep(100)
    print("noise on standard output")
    return {"nan": float("nan"), "list": [1, 2], "text": "1", "none": None}.get(completion, len(example.prompt))
"""


@pytest.fixture
def reward_file(tmp_path) -> str:
    (tmp_path / "reward.py").write_text(REWARD)
    return f"{tmp_path / 'reward.py'}:reward"


def isolated(reward: str, on_error: str = "-1", seconds: float = 1.0) -> IsolatedVerifier:
    return IsolatedVerifier("countdown", {}, reward, seconds=seconds, on_error=on_error)


EXAMPLE = Example("four", "a")


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("raise", "raised KeyError"),
        ("hang", "took more than 1 s"),
        ("sleep", "took more than 1 s"),
        ("die", "exit code 7"),
        ("leave", "raised SystemExit"),
        ("close", "ended its process (exit code None)"),
        ("nan", "1e+09, got nan"),
        ("list", "1e+09, got [1, 2]"),
        ("text", "1e+09, got '1'"),
        ("none", "1e+09, got None"),
    ],
)
def test_a_reward_that_fails_is_reported_with_its_completion_and_counted(reward_file, capsys, completion, reason):
    verify = isolated(reward_file)
    started = time.monotonic()
    assert verify("fine", EXAMPLE).reward == 4
    grade = verify(completion, EXAMPLE)
    assert (grade.reward, grade.correct, verify.failures) == (-1, False, 1)
    assert verify("fine", EXAMPLE).reward == 4  # and the next one is served
    assert time.monotonic() - started < 20
    err = capsys.readouterr().err
    assert reason in err
    assert f"{completion!r}" in err
    assert err.count("it counts as -1") == 1


HOLDING = """
import os, re, sys, time
def reward(completion, example):
    print(os.getpid(), file=sys.stderr, flush=True)
    return re.match(r"(a+)+$", "a" * 60 + "b")  # for years, and with Python's lock in its hand
"""


def test_a_reward_is_given_all_fields_of_its_record(tmp_path):
    (tmp_path / "reward.py").write_text("def reward(completion, example):\n    return eval(completion)(example)\n")
    (tmp_path / "data").mkdir()
    record = {"prompt": "1 + 1?", "answer": 2, "points": {"full": 3, "half": [1.5, None]}, "text": "\u4e2d\ud800"}
    (tmp_path / "data/test.jsonl").write_text(json.dumps(record))
    spec = {"task": "jsonl", "data": str(tmp_path / "data"), "reward": f"{tmp_path / 'reward.py'}:reward"}
    task, _, _ = load_tasks(sasr.Config(**spec))
    (example,) = task.test
    assert example.record == record
    for completion in ("lambda e: e.record['points']['half'][0]", f"lambda e: 1.5 * (e.record == {record!r})"):
        assert task.grade(completion, example) == Grade(1.5, correct=True, well_formed=True)
    (without,) = load_tasks(sasr.Config(**spec | {"reward": ""}))[0].test
    assert without.record == {}  # it would take memory for nothing


def test_a_record_nested_too_deeply_to_be_passed_on_is_a_failure_and_no_crash(tmp_path, capsys, reward_file):
    """Python reads about a thousand levels, and one more is too many."""
    nested: list = []
    for _ in range(5000):
        nested = [nested]
    verify = isolated(reward_file)
    assert verify("", dataclasses.replace(EXAMPLE, record={"nested": nested})).failed
    assert "recursion" in capsys.readouterr().err
    assert not verify("", EXAMPLE).failed


def test_a_reward_does_not_outlive_a_run_that_is_killed(tmp_path):
    (tmp_path / "reward.py").write_text(HOLDING)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom data.isolated import IsolatedVerifier\n"
    code += f"verify = IsolatedVerifier('x', {{}}, {str(tmp_path / 'reward.py:reward')!r}, seconds=100, on_error='0')\n"
    code += "from data import Example; verify('x', Example('x', 'x'))"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) as other:
        child = int(other.stderr.readline())
        other.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def test_a_reward_that_forks_answers_once(tmp_path):
    (tmp_path / "reward.py").write_text(
        "import os\ndef reward(completion, example):\n    os.fork()\n    return len(completion)\n"
    )
    verify = isolated(f"{tmp_path / 'reward.py'}:reward", seconds=5)
    assert [verify("x" * n, EXAMPLE).reward for n in range(30)] == list(range(30))
    assert verify.failures == 0


def test_a_time_limit_holds_for_the_whole_answer_however_slowly_it_comes(tmp_path):
    """A reward that finds the channel and writes a byte to it now and then."""
    (tmp_path / "reward.py").write_text(
        "import os, stat, time\n"
        "def reward(completion, example):\n"
        "    while True:\n"
        "        for fd in range(3, 20):\n"
        "            try:\n"
        "                stat.S_ISSOCK(os.fstat(fd).st_mode) and os.write(fd, b' ')\n"
        "            except OSError:\n"
        "                pass\n"
        "        time.sleep(0.1)\n"
    )
    started = time.monotonic()
    assert isolated(f"{tmp_path / 'reward.py'}:reward")("x", EXAMPLE).failed
    assert time.monotonic() - started < 10


def test_a_reward_may_wait_for_all_of_its_children(tmp_path):
    (tmp_path / "reward.py").write_text(
        "import os\n"
        "def reward(completion, example):\n"
        "    os.fork() or os._exit(0)\n"
        "    try:\n"
        "        while True:\n"
        "            os.wait()\n"
        "    except ChildProcessError:\n"
        "        return 4\n"
    )
    assert isolated(f"{tmp_path / 'reward.py'}:reward")("x", EXAMPLE).reward == 4


def test_a_parent_that_ends_while_it_is_answered_leaves_no_traceback(tmp_path):
    (tmp_path / "reward.py").write_text(
        "import os, time\n"
        "def reward(completion, example):\n"
        "    os.kill(os.getppid(), 2)\n"
        "    time.sleep(0.2)\n"
        "    return 1\n"
    )
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom data.isolated import IsolatedVerifier\n"
    code += f"verify = IsolatedVerifier('x', {{}}, {str(tmp_path / 'reward.py:reward')!r}, seconds=9, on_error='0')\n"
    code += "from data import Example\ntry:\n    verify('x', Example('x', 'x'))\n"
    code += "except KeyboardInterrupt:\n    verify.child.channel.close()\nimport time\ntime.sleep(0.5)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_verifier_outlives_the_thread_that_started_it(tmp_path):
    (tmp_path / "reward.py").write_text(
        "import time\ndef reward(completion, example):\n    time.sleep(len(completion))\n    return 1\n"
    )
    verify, grades, ends = isolated(f"{tmp_path / 'reward.py'}:reward", seconds=5), [], threading.Event()
    verify.child.close()

    def first():
        grades.append(verify("", EXAMPLE))
        ends.wait()

    def second():
        grades.append(verify("x", EXAMPLE))

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    while not grades:
        time.sleep(0.01)
    threads[1].start()
    time.sleep(0.3)
    ends.set()
    for thread in threads:
        thread.join()
    assert [grade.reward for grade in grades] == [1, 1]
    assert verify.failures == 0


def test_a_verifier_that_died_between_two_questions_is_started_again(reward_file):
    verify = isolated(reward_file)
    verify.child.process.kill()
    verify.child.process.wait()
    assert verify("fine", EXAMPLE).reward == 4
    assert verify.failures == 0


@pytest.mark.parametrize("grade", ["Grade(0.5, 'yes', None)", "More(0.5, True, False, extra=3)"])
def test_a_grade_of_the_users_becomes_a_plain_one(tmp_path, grade):
    (tmp_path / "reward.py").write_text(
        "import dataclasses\nfrom data import Grade\n"
        "@dataclasses.dataclass(frozen=True)\nclass More(Grade):\n    extra: int = 0\n"
        f"def reward(completion, example): return {grade}\n"
    )
    found = isolated(f"{tmp_path / 'reward.py'}:reward")("x", EXAMPLE)
    assert (found.reward, found.correct, found.well_formed, found.flexible) == (0.5, True, False, None)


GRADED = "from data import Example\nfrom data.task import Grade\n"


@pytest.mark.parametrize(
    ("files", "source"),
    [
        ({"data.py": "MARK = 7"}, "import data\ndef reward(c, e): return data.MARK"),
        ({"data.py": "MARK = 7"}, "def reward(c, e):\n    import data\n    return data.MARK"),
        (
            {"data/__init__.py": "", "data/task.py": "MARK = 7"},
            "from data.task import MARK\ndef reward(c, e): return MARK",
        ),
        ({"data/mine.py": "MARK = 7"}, "from data.mine import MARK\ndef reward(c, e): return MARK"),
        ({"data/mine.py": "MARK = 7"}, "def reward(c, e):\n    from data.mine import MARK\n    return MARK"),
        (
            {"data/train.jsonl": "{}", "data/make.py": "MARK = 7"},  # records and what made them
            "from data.task import Grade\nfrom data import gsm8k\nfrom data.make import MARK\n"
            "def reward(c, e): return Grade(MARK, True, gsm8k.strict_number('#### 7') == 7)",
        ),
        ({"kernels/mine.py": "MARK = 7"}, "def reward(c, e):\n    from kernels.mine import MARK\n    return MARK"),
        ({"run.py": "MARK = 7"}, "import run\ndef reward(c, e): return run.MARK"),
        ({"model.py": "MARK = 7"}, "def reward(c, e):\n    import model\n    return model.MARK"),
        (
            {"rollout.py": "import model", "model.py": "MARK = 7"},
            "import rollout as r\ndef reward(c, e): return r.model.MARK",
        ),
        ({}, GRADED + "def reward(c, e): return Grade(7.0, isinstance(e, Example), True)"),
        (
            {"data/train.jsonl": "{}", "model.py": ""},
            GRADED + "def reward(c, e): return Grade(7.0, isinstance(e, Example), True)",
        ),
        ({}, "def reward(c, e):\n    from data.latex import __name__ as name\n    import baselines\n    return 7"),
    ],
)
def test_what_stands_beside_a_reward_comes_before_ours(tmp_path, monkeypatch, files, source):
    monkeypatch.chdir(ROOT)  # from where ours can be imported, too
    for name, text in (files | {"reward.py": source}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    verify = isolated(f"{tmp_path / 'reward.py'}:reward", on_error="stop")
    assert verify("x", EXAMPLE) == verify("x", EXAMPLE) == Grade(7.0, correct=True, well_formed=True)


def test_what_stands_beside_a_module_comes_before_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.py").write_text("def reward(c, e): return 7")
    (tmp_path / "own.py").write_text("from data import reward")
    for module in ("own", "data"):
        assert isolated(f"{module}:reward", on_error="stop")("x", EXAMPLE).reward == 7


def test_a_reward_beside_a_copy_of_these_files_returns_the_grade_of_that_copy(tmp_path):
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "reward.py").write_text(GRADED + "def reward(c, e): return Grade(0.5, True, False, flexible=True)")
    found = isolated(f"{tmp_path / 'reward.py'}:reward", on_error="stop")("x", EXAMPLE)
    assert found == Grade(0.5, correct=True, well_formed=False, flexible=True)


def test_a_reward_in_this_process_leaves_what_is_loaded_here(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    loaded = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "data"}
    (tmp_path / "data.py").write_text("MARK = 7")
    (tmp_path / "reward.py").write_text("def reward(c, e): return 7")
    assert load_reward(f"{tmp_path / 'reward.py'}:reward")("x", EXAMPLE).reward == 7
    assert {name: sys.modules[name] for name in loaded} == loaded


def test_the_time_out_works_off_the_main_thread(reward_file):
    grades = []
    thread = threading.Thread(target=lambda: grades.append(isolated(reward_file)("hang", EXAMPLE)))
    thread.start()
    thread.join(30)
    assert [grade.reward for grade in grades] == [-1]


def test_failures_are_counted_in_metrics_and_summary(tmp_path, capsys):
    (tmp_path / "reward.py").write_text(
        "def reward(completion, example):\n    return None if len(completion) % 2 else len(completion)\n"
    )
    out, spec = tmp_path / "run", f"{tmp_path / 'reward.py'}:reward"
    assert sasr.main([*flags_of(out), "--reward", spec, "--controller", "grpo", "--eval-samples", "4"]) == 0
    counts = [record["reward_failures"] for record in lines(out) if record["kind"] == "grpo"]
    assert 0 < sum(counts) < 6 * len(counts)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["reward_failures"] > sum(counts)  # evaluations, too
    stdout = capsys.readouterr().out
    assert f"completions for which the verifier failed: {summary['reward_failures']}\n" in stdout
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {len(s["completion"]) % 2 == 1 for s in samples if s["split"] == "test" and s["failed"]} == {True}


def test_a_reward_that_always_fails_stops_the_run(tmp_path, capsys):
    (tmp_path / "reward.py").write_text("def reward(completion, example):\n    return completion.length\n")
    arguments = ["--reward", f"{tmp_path / 'reward.py'}:reward", "--controller", "grpo", "--max-bad-steps", "2"]
    assert sasr.main([*flags_of(tmp_path / "run"), *arguments]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert "step 5 is dropped: the verifier failed for every completion (bad steps so far: 1)" in errors
    assert errors[-1].startswith("sasr.py: step 6: the verifier failed for every completion (bad steps in a row: 2)")
    assert "'str' object has no attribute 'length'" in "".join(errors)


def test_a_reward_that_does_not_load_in_time_is_named(tmp_path, monkeypatch):
    (tmp_path / "reward.py").write_text("import time\ntime.sleep(100)\n")
    monkeypatch.setattr("data.isolated.IMPORT_SECONDS", 0.5)
    with pytest.raises(ValueError, match=r"reward.py:f: it did not begin to serve: took more than 1.5 s"):
        isolated(f"{tmp_path / 'reward.py'}:f")


def test_a_reward_replaces_the_puzzles_verifier_and_so_the_harder_variant(tmp_path, reward_file):
    plain = sasr.Config(device="cpu")
    assert load_tasks(plain)[2]
    assert not load_tasks(dataclasses.replace(plain, reward=reward_file))[2]


def test_a_reward_may_be_asked_to_stop_the_run(reward_file):
    with pytest.raises(RuntimeError, match="raised KeyError"):
        isolated(reward_file, "stop")("raise", EXAMPLE)


def test_a_reward_that_cannot_be_loaded_is_an_error_before_training(tmp_path, capsys):
    assert sasr.main([*flags_of(tmp_path / "run"), "--reward", f"{tmp_path}/none.py:f"]) == 2
    assert "no such file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["nan", "x", "", "inf", "1e300"])
def test_reward_on_error_is_a_number_or_stop(value):
    with pytest.raises(ValueError, match="--reward-on-error"):
        sasr.Config(reward_on_error=value)


def test_a_reward_of_the_users_trains(tmp_path, reward_file):
    out = tmp_path / "run"
    assert sasr.main([*flags_of(out), "--reward", reward_file, "--steps", "4", "--controller", "grpo"]) == 0
    assert all(record["reward_mean"] > 4 for record in lines(out) if record["kind"] == "grpo")


# ---- Messages --------------------------------------------------------------------------------------------------------


def test_a_fault_is_one_line_and_exit_code_1_and_debug_shows_where(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise ZeroDivisionError("what nobody thought of")

    monkeypatch.setattr(sasr, "sft_step", broken)
    assert sasr.main(flags_of(tmp_path / "a")) == 1
    err = capsys.readouterr().err
    assert "sasr.py: ZeroDivisionError: what nobody thought of (--debug shows where)" in err
    assert "Traceback" not in err
    assert sasr.main([*flags_of(tmp_path / "b"), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_fault_names_itself(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise Fault("the sky is falling")

    monkeypatch.setattr(sasr, "sft_step", broken)
    assert sasr.main(flags_of(tmp_path / "a")) == 1
    assert "the sky is falling" in capsys.readouterr().err


def test_the_summary_names_the_configuration_wherever_it_was_kept(tmp_path):
    hashes = {
        json.loads((Path(sasr.train(config(tmp_path / name, seed=seed))["out"]) / "summary.json").read_text())[
            "config_hash"
        ]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    }
    assert len(hashes) == 2


# ---- Edges -----------------------------------------------------------------------------------------------------------


def test_a_vocabulary_of_one_token_has_one_thing_to_say():
    model = random_model(vocab_size=1)
    drawn = rollout.generate(model, [[0], [0, 0]], rollout.SamplingParams(3), group_size=2)
    assert drawn.completions == [[0, 0, 0]] * 4
    assert all(logprob == 0 for row in drawn.logprobs for logprob in row)
    batch = Batch([[0]], [[0, 0]], advantages=torch.zeros(1))
    stats = sasr.accumulate_gradient(model.requires_grad_(), [sasr.Part(batch, sasr.sft_objective)], sasr.Config(), 100)
    assert (stats["loss"], stats["grad_norm"]) == (0, 0)
    stats = sasr.accumulate_gradient(model, [sasr.Part(batch, sasr.grpo_objective)], sasr.Config(), 100)
    assert (stats["loss"], stats["grad_norm"], stats["entropy"]) == (0, 0, 0)


@pytest.mark.parametrize("advantage", ["zscore", "centered", "median"])
def test_groups_that_all_agree_teach_nothing_and_are_no_fault(tmp_path, advantage, monkeypatch):
    monkeypatch.setattr(knights_knaves, "grade", lambda text, example: Grade(0.5, text == example.demonstration, True))
    summary = sasr.train(config(tmp_path / "x", controller="grpo", advantage=advantage, eval_every=0))
    records = [record for record in lines(tmp_path / "x") if record["kind"] == "grpo"]
    assert {(record["loss"], record["grad_norm"], record["zero_variance_fraction"]) for record in records} == {
        (0, 0, 1)
    }
    assert (summary["bad_steps"], summary["grpo_skipped"]) == (0, summary["grpo_steps"])
    assert "100% of groups have no signal (0% are all right, 100% all wrong)" in "".join(summary["diagnosis"])


def test_a_group_size_of_one_is_refused_before_anything_is_written(tmp_path, capsys):
    assert sasr.main([*flags_of(tmp_path / "x"), "--group-size", "1"]) == 2
    assert "--group-size 1: a sample alone in its group" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_an_empty_demonstration_teaches_to_stop(tmp_path):
    record = {"prompt": "Say nothing.", "answer": "nothing", "demonstration": ""}
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(record) + "\n")
    arguments = [*flags_of(tmp_path / "run"), "--task", "jsonl", "--data", str(tmp_path), "--ood-task", "none"]
    assert sasr.main(arguments) == 2  # a demonstration without text is most likely a mistake
    trainer = sasr.Trainer(config(tmp_path / "x"))
    batch = Batch([[1, 2]], [list(trainer.codec.stop_token_ids)])
    stats = sasr.accumulate_gradient(trainer.model, [sasr.Part(batch, sasr.sft_objective)], trainer.config, 100)
    assert 0 < stats["grad_norm"] < math.inf


@pytest.fixture
def determinism_put_back():
    yield
    torch.use_deterministic_algorithms(False)


def determinism():
    """Off, or what is done about an operation that has no deterministic form."""
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    return ("warns" if warns else "refuses") if torch.are_deterministic_algorithms_enabled() else "off"


def test_the_same_seed_gives_the_same_bits_with_deterministic_algorithms(tmp_path, determinism_put_back):
    for name in "ab":
        sasr.train(config(tmp_path / name, deterministic=True, steps=4, warmup_steps=2))
    same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("deterministic", [True, False])
def test_only_gradients_are_strictly_deterministic(deterministic, tmp_path, monkeypatch, determinism_put_back):
    """The sampler's cumulative sums have no deterministic form on CUDA, and a warning does not change attention's."""
    modes = {"sampling": set(), "forward": set(), "backward": set()}
    logprobs, step = sasr.completion_logprobs, rollout.Sampler._step

    def forward(model, *args):
        modes["forward"].add(determinism())
        found = logprobs(model, *args)
        found[0].register_hook(lambda _: modes["backward"].add(determinism()))
        return found

    monkeypatch.setattr(sasr, "completion_logprobs", forward)
    monkeypatch.setattr(rollout.Sampler, "_step", lambda *args: modes["sampling"].add(determinism()) or step(*args))
    sasr.train(config(tmp_path / "x", deterministic=deterministic, controller="grpo", steps=2, warmup_steps=1))
    strict, lenient = ({"refuses"}, {"warns"}) if deterministic else ({"off"}, {"off"})
    assert modes == {"sampling": lenient, "forward": strict, "backward": strict}


def test_after_an_error_in_the_gradient_sampling_is_lenient_again(tmp_path, monkeypatch, determinism_put_back):
    trainer = sasr.Trainer(config(tmp_path / "x", deterministic=True))
    monkeypatch.setattr(sasr, "completion_logprobs", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.step()
    assert determinism() == "warns"


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_equal_steps_on_a_card_have_the_same_gradients_to_the_bit(checkpointing, tmp_path, determinism_put_back):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    gradients = []
    for name in "ab":
        changes = {"deterministic": True, "device": "cuda", "gradient_checkpointing": checkpointing}
        trainer = sasr.Trainer(config(tmp_path / name, **changes))
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(40, (n,), generator=generator).tolist() for n in (70, 33, 5)]
        completions = [torch.randint(40, (n,), generator=generator).tolist() for n in (300, 201, 17) * 8]
        batch = Batch([prompt for prompt in prompts for _ in range(8)], completions)
        for kind in (batch, Batch(prompts, completions[:3])):  # with prompts that are shared, and sequences read whole
            sasr.accumulate_gradient(trainer.model, [sasr.Part(kind, sasr.sft_objective)], trainer.config, 10_000)
            gradients.append({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
    for first, again in zip(gradients[:2], gradients[2:], strict=True):
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert all(gradient.isfinite().all() and gradient.any() for gradient in first.values())


def test_a_run_that_goes_on_has_no_summary_until_it_is_finished_again(tmp_path, monkeypatch):
    sasr.train(config(tmp_path / "x", steps=4, lr_schedule="constant"))

    def broken(*_):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(sasr, "adaptive_step", broken)
        with pytest.raises(ZeroDivisionError):
            sasr.resume(tmp_path / "x", {"steps": 6})
    assert not (tmp_path / "x/summary.json").exists()
    sasr.resume(tmp_path / "x")
    assert (tmp_path / "x/summary.json").exists()


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_a_stream_that_was_closed_is_no_reason_to_fail(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sys, name, None)
    assert sasr.main(flags_of(tmp_path / "x")) == 0
    assert (tmp_path / "x/summary.json").exists()


def test_a_resume_says_what_it_changes(tmp_path, capsys):
    sasr.train(config(tmp_path / "x", steps=4, lr_schedule="constant"))
    sasr.resume(tmp_path / "x", {"steps": 5, "save_every": 1, "group_size": 3})
    assert "resuming with --steps 5, --save-every 1\n" in capsys.readouterr().err


values = st.one_of(st.integers(), st.floats(), st.text(max_size=5), st.booleans(), st.none(), st.just("1:2"))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from([spec.name for spec in dataclasses.fields(sasr.Config)]), values, max_size=4))
def test_any_configuration_is_one_or_names_its_flag(changes):
    reason = None
    try:
        sasr.make_method(sasr.Config(**changes))
    except ValueError as error:
        reason = str(error)
    assert reason is None or any(f"--{name.replace('_', '-')}" in reason for name in changes)


# ---- Chat templates that are no good ---------------------------------------------------------------------------------


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {}, Path("chat_template.jinja"))


ASKED = [[{"role": "user", "content": "?"}]]


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{{ m(n) ~ m(n) }}{% endmacro %}{{ m(1) }}",
        "{{ 'a' * 10**10 }}",
        "{% set ns = namespace(a='a') %}{% for i in range(60) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}",
        "{{ lipsum(n=10**9) }}",
        "{{ '%0999999999999d'|format(1) }}",
        "{{ 'a'|center(10**11) }}",
        "{{ 9 ** (9 ** (9 ** 9)) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch escaped') }}",
        "{{ lipsum.__globals__['os'].system('touch escaped') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_a_template_that_escapes_or_explodes_is_one_line(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chat.renderer(), "seconds", 1.0)
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"^chat_template.jinja: the chat template (raised|took|ended)") as error:
        template(source).render(ASKED, add_generation_prompt=True)
    assert "\n" not in str(error.value)
    assert time.monotonic() - started < 10
    assert not list(tmp_path.iterdir())
    assert template("{{ messages[0].content }}!").render(ASKED, add_generation_prompt=True) == ["?!"]  # still served


def test_a_long_conversation_is_no_explosion_and_a_page_for_a_word_is_one():
    marked = (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}<|eot_id|>{% endfor %}"
    )
    conversation = [{"role": "user", "content": "ok"}] * 2000
    assert template(marked).render([conversation], add_generation_prompt=True)[0].count("ok") == 2000
    with pytest.raises(ValueError, match="makes 30000 characters of a conversation of 1"):
        template("{{ 'x' * 30000 }}").render(ASKED, add_generation_prompt=True)


def test_a_template_of_novel_length_is_refused():
    with pytest.raises(ValueError, match="200000 characters, more than 100000"):
        template("a" * 200_000)


def test_many_conversations_are_rendered_in_order():
    asked = [[{"role": "user", "content": str(i)}] for i in range(2500)]
    texts = template("{{ messages[0].content }}").render(asked, add_generation_prompt=True)
    assert texts == [str(i) for i in range(2500)]


def test_threads_that_render_at_once_get_their_own_answers():
    rendered = {}

    def ask(name):
        for _ in range(30):
            asked = [[{"role": "user", "content": name}]]
            texts = template("{{ messages[0].content }}").render(asked, add_generation_prompt=True)
            rendered.setdefault(name, set()).update(texts)

    threads = [threading.Thread(target=ask, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rendered == {name: {name} for name in "abc"}


# ---- A run's folder of a stranger ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory) -> Path:
    """Of 4 steps, with moments, a reference policy, and more steps to come."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    sasr.train(config(out, warmup_steps=1, steps=3))
    return out


def with_checkpoint(source: Path, out: Path, change) -> RunFolder:
    """A copy whose checkpoint `change` has put its hands on: one with valid sums."""
    shutil.copytree(source, out)
    folder = RunFolder(out)
    found = folder.find_checkpoint()
    tensors, state = found.tensors(), found.state
    change(tensors, state)
    remove(out / "checkpoint.old")
    folder.save_checkpoint(tensors, state)
    shutil.rmtree(out / "checkpoint.old")
    return folder


NAME = "layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, state: tensors.update({"optimizer.exp_avg.model." + NAME: torch.zeros(1)}),
        lambda tensors, state: tensors.update({"optimizer.exp_avg_sq.model." + NAME: torch.zeros(0)}),
        lambda tensors, state: tensors.update({"optimizer.step.model." + NAME: torch.zeros(3)}),
        lambda tensors, state: tensors.update({"model.model." + NAME: torch.zeros(1, 1)}),
        lambda tensors, state: tensors.update({"reference.model." + NAME: torch.zeros(())}),
        lambda tensors, state: tensors.pop("model.model." + NAME),
        lambda tensors, state: tensors.pop("optimizer.exp_avg.model." + NAME),
        lambda tensors, state: tensors.pop("reference.model." + NAME),
        *(
            lambda tensors, state, name=name, value=value: state["state"].update({name: value})
            for name in ("step", "sft_steps", "norm_step", "bad_in_a_row", "reward_failures")
            for value in ("5", 5.5, math.nan, None, -5, [], True)
        ),
        *(
            lambda tensors, state, name=name, value=value: state["state"].update({name: value})
            for name in ("seconds", "accuracy", "scores", "unlogged", "reward")
            for value in (3 if name != "reward" else [3], {"x": None} if name != "unlogged" else [1], "x")
        ),
        *(
            lambda tensors, state, name=name, value=value: state["controller"].update({name: value})
            for name in ("g_warmup", "g_last", "warmup_norms")
            for value in (math.nan, -1.0, "x", [math.inf])
        ),
        *(
            lambda tensors, state, name=name, value=value: state.update({name: value})
            for name in ("state", "controller", "config", "fingerprint")
            for value in (None, [], 3)
        ),
        *(
            lambda tensors, state, name=name: state.pop(name)
            for name in ("state", "controller", "config", "fingerprint")
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named_and_nothing_is_written(stopped_run, tmp_path, capsys, change):
    folder = with_checkpoint(stopped_run, tmp_path / "run", change)
    before = {file: file.read_bytes() for file in folder.path.rglob("*") if file.is_file()}
    assert sasr.main(["--resume", str(folder.path), "--steps", "4"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"sasr.py: {folder.path / 'checkpoint'} does not fit this run: ")
    assert {file: file.read_bytes() for file in folder.path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("length", [-5, "x", None, 1.5])
def test_a_checkpoint_with_an_impossible_length_of_the_metrics_is_not_used(stopped_run, tmp_path, capsys, length):
    folder = with_checkpoint(stopped_run, tmp_path / "run", lambda tensors, state: None)
    file = folder.path / "checkpoint/state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"metrics_bytes": length}))
    resum(folder.path / "checkpoint")
    assert sasr.main(["--resume", str(folder.path)]) == 2
    assert f"metrics_bytes {length!r}" in capsys.readouterr().err


def resum(folder: Path) -> None:
    sums = [f"{sha256(folder / name)}  {name}\n" for name in ("state.json", "tensors.safetensors")]
    (folder / SUMS).write_text("".join(sums))


@pytest.mark.parametrize(
    ("name", "content"), [("state.json", b"[" * 100_000), ("tensors.safetensors", b"\xff" * 8), ("state.json", b"5")]
)
def test_a_checkpoint_of_garbage_with_valid_sums_is_one_line(stopped_run, tmp_path, capsys, name, content):
    folder = with_checkpoint(stopped_run, tmp_path / "run", lambda tensors, state: None)
    (folder.path / "checkpoint" / name).write_bytes(content)
    resum(folder.path / "checkpoint")
    assert sasr.main(["--resume", str(folder.path), "--steps", "4"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"sasr.py: {folder.path / 'checkpoint'}")


def test_a_link_for_a_lock_changes_nothing_elsewhere(tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/lock").symlink_to(tmp_path / "mine")
    assert sasr.main(flags_of(tmp_path / "run")) == 2
    assert f"{tmp_path / 'run/lock'}: a link" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("name", ["lock", "metrics.jsonl", "config.json.tmp", "checkpoint/state.json", "model"])
def test_a_link_in_a_runs_folder_changes_nothing_elsewhere(stopped_run, tmp_path, capsys, name):
    shutil.copytree(stopped_run, tmp_path / "run")
    (tmp_path / "mine").write_text("mine")
    link = tmp_path / "run" / name
    remove(link)
    link.symlink_to(tmp_path / "mine")
    assert sasr.main(["--resume", str(tmp_path / "run"), "--steps", "4"]) == 2
    assert capsys.readouterr().err.startswith(f"sasr.py: {link}: a link, or no plain file")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_pipe_in_a_runs_folder_is_named(stopped_run, tmp_path, capsys):
    shutil.copytree(stopped_run, tmp_path / "run")
    os.mkfifo(tmp_path / "run/pipe")
    assert sasr.main(["--resume", str(tmp_path / "run"), "--steps", "4"]) == 2
    assert "run/pipe: a link, or no plain file" in capsys.readouterr().err


# ---- What a run is made of -------------------------------------------------------------------------------------------

DATED = """{{ strftime_now('%A %d %B %Y, %H:%M:%S') }}
{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
SCORE = "import zlib\ndef score(completion, example): return zlib.crc32(completion.encode()) % 5 / 4\n"
KEPT = {"warmup_steps": 1, "controller": "alternate", "sft_batch_size": 2, "prompts_per_step": 2, "group_size": 3}
KEPT |= {"max_new_tokens": 8, "eval_examples": 2, "eval_every": 1, "save_every": 0, "lr_schedule": "constant"}
KEPT |= {"device": "cpu", "ood_task": "none", "task": "jsonl", "prompt_format": "chat"}
KEPT = [part for name, value in KEPT.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A folder with a model, data, a reward, the run `cut` of 2 steps begun with relative paths, and `whole`, of 4."""
    here = tmp_path_factory.mktemp("kept")
    tokenizer = train_tokenizer(["user assistant What is 17 + 25? It is <answer>42</answer>"], 300)
    torch.manual_seed(0)
    (here / "model").mkdir()
    Transformer(ModelConfig.small(tokenizer.get_vocab_size(), 32, 1, 2, 512, 0)).save_pretrained(here / "model")
    Codec(tokenizer, (0,)).save(here / "model")
    (here / "model/chat_template.jinja").write_text(DATED)
    (here / "reward.py").write_text(SCORE)
    (here / "data").mkdir()
    for split in ("train", "test"):
        records = [{"prompt": f"{split} {i} + 1?", "answer": str(i + 1)} for i in range(4)]
        records = [record | {"demonstration": f"<answer>{record['answer']}</answer>"} for record in records]
        (here / f"data/{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        begun = [*KEPT, "--model", "model", "--data", "data", "--reward", "reward.py:score"]
        assert sasr.main([*begun, "--out", "cut", "--steps", "2"]) == 0
        date = json.loads((here / "cut/config.json").read_text())["template_date"]
        assert sasr.main([*begun, "--out", "whole", "--steps", "4", "--template-date", date]) == 0
    return here


@pytest.fixture
def tomorrow(monkeypatch):
    class Tomorrow(chat.datetime):
        @classmethod
        def now(cls):
            return cls(2099, 1, 2, 3, 4, 5)

    monkeypatch.setattr(chat, "datetime", Tomorrow)
    monkeypatch.setattr(run.config, "datetime", Tomorrow)


@contextlib.contextmanager
def moved(path: Path, to: Path):
    path.rename(to)
    try:
        yield to
    finally:
        to.rename(path)


@pytest.mark.parametrize(
    "flag",
    ["", "--model", "--data", "--reward", "model gone", "model gone, killed between two renames", "model linked"],
)
def test_a_run_goes_on_from_any_directory_on_any_day_and_wherever_its_files_are(
    kept, tmp_path, monkeypatch, tomorrow, capsys, flag
):
    """Bit for bit as if it had never stopped, in place and in a branch."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(kept / "cut", tmp_path / "run")  # moved, too
    name = {"--reward": "reward.py"}.get(flag, flag.strip("-").partition(" ")[0])
    if "killed" in flag:
        (tmp_path / "run/model").rename(tmp_path / "run/model.old")
    with moved(kept / name, kept / f"new-{name}") if name else contextlib.nullcontext() as new:
        if flag == "model linked":
            (tmp_path / "link").symlink_to(new)
            new = "link"
        changed = [flag.replace("model linked", "--model"), f"{new}:score" if flag == "--reward" else str(new)]
        changed = changed if name and "gone" not in flag else []
        for place in (["--out", "branch"], []):
            assert sasr.main(["--resume", "run", "--steps", "4", *changed, *place]) == 0
            told = capsys.readouterr().err
            gone = f"--model {kept / 'model'}: no such directory"
            assert (
                f"{gone}, and not the id of a model on the hub (OWNER/NAME); going on from the run's own " in told
            ) == ("gone" in flag)
    for out in (tmp_path / "branch", tmp_path / "run"):
        same_run(out, kept / "whole")
    values = json.loads((tmp_path / "run/config.json").read_text())
    assert values["data"] == str(new if flag == "--data" else kept / "data")
    if flag == "model linked":
        assert values["model"] == str(tmp_path / "link")


def edit(*path: str, **changes):
    """A change of a JSON file, or of the last record of a file of records, or the text that is put into a file."""

    def change(here: Path) -> None:
        file = here.joinpath(*path)
        if "text" in changes:
            file.write_text(changes["text"])
        elif file.suffix == ".jsonl":
            lines = file.read_text().splitlines()
            file.write_text("\n".join([*lines[:-1], json.dumps(json.loads(lines[-1]) | changes)]) + "\n")
        else:
            file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (edit("model", "chat_template.jinja", text=DATED + " "), "chat template"),
        (edit("model", "tokenizer_config.json", bos_token="<s>"), "special tokens (tokenizer_config.json)"),
        (edit("model", "tokenizer.json", normalizer={"type": "NFC"}), "tokenizer (tokenizer.json)"),
        (edit("model", "generation_config.json", eos_token_id=[0, 7]), "stop tokens (generation_config.json)"),
        (edit("model", "config.json", rope_theta=5e5), "model (config.json)"),
        (edit("data", "train.jsonl", prompt="4 + 1?"), "training examples"),
        (edit("data", "train.jsonl", demonstration="<answer> 4</answer>"), "training examples"),
        (edit("data", "train.jsonl", answer="5"), "training examples"),
        (edit("data", "test.jsonl", answer="5"), "test examples"),
    ],
)
def test_what_changed_in_between_is_refused_by_name_and_nothing_is_written(kept, tmp_path, capsys, change, kind):
    for folder in ("model", "data", "cut"):
        shutil.copytree(kept / folder, tmp_path / folder)
    if not (tmp_path / "model/generation_config.json").exists():
        (tmp_path / "model/generation_config.json").write_text("{}")
    change(tmp_path)
    before = {file: file.read_bytes() for file in (tmp_path / "cut").rglob("*") if file.is_file()}
    places = ["--data", str(tmp_path / "data"), "--model", str(tmp_path / "model")]
    assert sasr.main(["--resume", str(tmp_path / "cut"), "--steps", "4", *places]) == 2
    flags = " ".join(["--task", "jsonl", *places])
    reason = f"{tmp_path}/cut/checkpoint does not fit this run: other {kind} than when it was written: {flags}"
    assert capsys.readouterr().err.splitlines()[-1] == f"sasr.py: {reason}"
    assert {file: file.read_bytes() for file in (tmp_path / "cut").rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("kind", ["training prompts", "demonstrations", "evaluation prompts", "verifier"])
def test_another_version_that_makes_other_tokens_of_the_same_examples_is_refused(kept, tmp_path, capsys, kind):
    change = lambda tensors, state: state["fingerprint"].update({kind: "0" * 64})  # noqa: E731
    folder = with_checkpoint(kept / "cut", tmp_path / "run", change)
    assert sasr.main(["--resume", str(folder.path), "--steps", "4"]) == 2
    assert f"does not fit this run: other {kind} than when it was written" in capsys.readouterr().err


def test_a_template_that_prints_another_date_makes_other_prompts(kept, tmp_path, capsys, tomorrow):
    """What the date in config.json is for."""
    change = lambda tensors, state: state["config"].update(template_date="")  # noqa: E731
    folder = with_checkpoint(kept / "cut", tmp_path / "run", change)
    edit("run", "config.json", template_date="")(tmp_path)
    assert sasr.main(["--resume", str(folder.path), "--steps", "4"]) == 2
    assert "does not fit this run: other training prompts than when it was written" in capsys.readouterr().err


def test_a_reward_that_changed_is_told(kept, tmp_path, capsys):
    shutil.copytree(kept / "cut", tmp_path / "run")
    (tmp_path / "reward.py").write_text(SCORE + "# mended\n")
    assert (
        sasr.main(["--resume", str(tmp_path / "run"), "--steps", "3", "--reward", f"{tmp_path}/reward.py:score"]) == 0
    )
    assert f"--reward {tmp_path}/reward.py:score: the file has changed since the checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gone", "changed", "reason"),
    [
        ("data", [], "--data {}/data: no such file or folder; --data names its new place"),
        ("reward.py", [], "--reward {}/reward.py: no such file or folder; --reward names its new place"),
        ("", ["--model", ""], "--model : a resumed run keeps its '{}/model'"),
        ("", ["--reward", ""], "--reward : a resumed run keeps its '{}/reward.py:score'"),
        ("", ["--model", "none"], "--model none: no such directory, .*; --model names its new place"),
        ("model", ["no checkpoint"], "--model {}/model: no such directory, .*; --model names its new place"),
    ],
)
def test_what_is_gone_is_named_with_its_flag(kept, tmp_path, capsys, gone, changed, reason):
    shutil.copytree(kept / "cut", tmp_path / "run")
    if changed == ["no checkpoint"]:
        shutil.rmtree(tmp_path / "run/checkpoint")
        changed = []
    with moved(kept / gone, kept / "away") if gone else contextlib.nullcontext():
        assert sasr.main(["--resume", str(tmp_path / "run"), "--steps", "4", *changed]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.match("sasr.py: " + reason.format(kept), line), line


def test_a_run_without_a_checkpoint_begins_again_on_its_first_day(kept, tmp_path, monkeypatch, tomorrow):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(kept / "cut", tmp_path / "run")
    for name in ("checkpoint", "checkpoint.old", "model"):
        remove(tmp_path / "run" / name)
    assert sasr.main(["--resume", "run", "--steps", "4"]) == 0
    same_run(tmp_path / "run", kept / "whole")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state["state"].pop("warmup_sft"), "it lacks 'warmup_sft'"),
        (lambda state: state.pop("method"), "it lacks 'method'"),
        (lambda state: state["state"]["seconds"].pop("mixed"), "seconds, accuracies, scores or the last line"),
        (lambda state: state.update(fingerprint=12345), "'int' object is not subscriptable"),
    ],
)
def test_a_checkpoint_of_another_version_is_refused_in_one_line(stopped_run, tmp_path, capsys, change, reason):
    folder = with_checkpoint(stopped_run, tmp_path / "run", lambda tensors, state: change(state))
    assert sasr.main(["--resume", str(folder.path), "--steps", "4"]) == 2
    line = f"sasr.py: {folder.path}/checkpoint does not fit this run: {reason}"
    assert capsys.readouterr().err.splitlines()[-1].startswith(line)


def test_paths_are_absolute_and_outside_the_hash_and_ids_are_neither(tmp_path, monkeypatch):
    found = []
    for name in "ab":
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "reward.py").touch()
        monkeypatch.chdir(tmp_path / name)
        monkeypatch.setenv("HOME", str(tmp_path / name))
        found.append(sasr.Config(model=f"../{name}/model/", data="~/model", reward="reward.py:f", out=name))
        assert found[-1].model == found[-1].data == str(tmp_path / name / "model")
        assert found[-1].reward == f"{tmp_path / name}/reward.py:f"
    assert found[0].hash() == found[1].hash()
    ids = sasr.Config(model="owner/name", reward="module:f", data="none")
    assert (ids.model, ids.reward, ids.data) == ("owner/name", "module:f", "none")
    hashes = {sasr.Config(**changes).hash() for changes in ({}, {"model": "owner/name"}, {"model": "owner/other"})}
    assert len({*hashes, found[0].hash()}) == 4


def test_a_date_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"^--template-date tomorrow: expected a form like 2026-12-31T09:30$"):
        sasr.Config(template_date="tomorrow")
