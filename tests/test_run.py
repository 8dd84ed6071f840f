"""A run's folder and life: files that are never half-written, resume that changes nothing, the command line."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

import run.checkpoint
import run.evaluation
import run.report
import sasr
from data import Grade, knights_knaves
from data.tokenizer import Codec
from model import Transformer
from run.checkpoint import Checkpoint, RunFolder
from run.config import flag_name, parse_command_line
from run.lifecycle import Interrupt, Stopped
from run.report import (
    Progress,
    clock,
    closing_table,
    headline,
    progress_line,
    provenance,
    published_means,
    seconds_left,
)
from run.setup import load_task_spec, load_tasks

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT.parent / "shared/data"

SMALL = {
    "task": "knights-knaves:train_size=60,test_size=16",
    "ood_task": "knights-knaves:width=3,train_size=1,test_size=16",
    "hidden_size": 32,
    "layers": 1,
    "heads": 2,
    "warmup_steps": 4,
    "steps": 10,
    "sft_batch_size": 4,
    "prompts_per_step": 2,
    "group_size": 3,
    "max_new_tokens": 12,
    "eval_examples": 4,
    "eval_every": 4,
    "save_every": 3,
    "kl_coef": 0.05,
    "lr_schedule": "constant",
    "device": "cpu",
}


def flags(**changes):
    merged = SMALL | changes
    return [part for name, value in merged.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def config(out, **changes):
    return sasr.Config(**(SMALL | {"out": str(out)} | changes))


def by_length(text, example):
    return Grade(len(text) % 3 / 2, text == example.demonstration, False)


@pytest.fixture(autouse=True)
def rewards_that_differ(monkeypatch):
    """An untrained model solves nothing, and GRPO skips a step without signal: reward something else instead."""
    monkeypatch.setattr(knights_knaves, "grade", by_length)


def begin(folder):
    """What a run has written before its first step."""
    folder.path.mkdir(exist_ok=True)
    folder.write_json("config.json", {})
    folder.metrics.touch()


def lines(out):
    """The metrics, without what a clock decides."""
    records = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def weights(out):
    return Transformer.from_pretrained(Path(out) / "model").state_dict()


# ---- Files -----------------------------------------------------------------------------------------------------------


def test_a_run_writes_what_the_design_promises(tmp_path):
    summary = sasr.train(config(tmp_path / "x"))
    assert summary == json.loads((tmp_path / "x/summary.json").read_text())
    for stage in ("before", "warmup", "final"):
        assert 0 <= summary[f"accuracy_{stage}"] <= 1
        assert 0 <= summary[f"accuracy_{stage}_ood"] <= 1
    assert summary["sft_steps"] + summary["grpo_steps"] == 10
    assert summary["seconds"] > 0
    records = lines(tmp_path / "x")
    assert [r["step"] for r in records] == list(range(1, 15))
    assert [r["phase"] for r in records] == ["warmup"] * 4 + ["adaptive"] * 10
    everywhere = {"step", "phase", "kind", "loss", "grad_norm", "lr", "tokens", "padding_fraction", "tokens_read"}
    everywhere |= {"tokens_trained"}
    adaptive = {"p_sft", "alpha", "sft_norm", "sft_norm_age"}
    grpo = {"reward_mean", "reward_std", "zero_variance_fraction", "completion_length", "truncated_fraction"}
    grpo |= {"kl", "entropy", "clip_fraction", "clip_low_fraction", "clip_high_fraction", "ratio_mean", "ratio_max"}
    grpo |= {"sampler_gap", "reward_failures", "all_right_fraction", "all_wrong_fraction", "unparsed_fraction"}
    grpo |= {"prompts_drawn", "signal_groups"}
    for record in records:
        wanted = everywhere | (adaptive if record["phase"] == "adaptive" else set())
        wanted |= grpo if record["kind"] == "grpo" else set()
        if record["step"] in (4, 8, 12, 14):
            wanted |= {f"eval/accuracy{part}{domain}" for part in ("", "_low", "_high") for domain in ("", "_ood")}
        wanted |= {"eval/kl"} if record["step"] in (8, 12, 14) else set()  # the reference is the model of step 4
        assert set(record) == wanted
    assert {r["kind"] for r in records if r["phase"] == "adaptive"} == {"sft", "grpo"}
    assert json.loads((tmp_path / "x/config.json").read_text())["group_size"] == 3
    tokenizer = Tokenizer.from_file(str(tmp_path / "x/model/tokenizer.json"))
    assert len(weights(tmp_path / "x")["model.embed_tokens.weight"]) == tokenizer.get_vocab_size()
    assert not list((tmp_path / "x").glob("*.tmp"))


def test_evaluations_measure_the_distance_to_the_reference_policy_once_there_is_one(tmp_path):
    sasr.train(config(tmp_path / "x"))
    kl = {r["step"]: r["eval/kl"] for r in lines(tmp_path / "x") if "eval/kl" in r}
    assert 0 < kl[8] < kl[14]


def test_a_kl_of_zero_weight_is_measured_too_without_a_change_to_the_run(tmp_path):
    flags = {"kl_coef": 0.0, "controller": "alternate", "lr": 1e-2}
    for name, more in (("without", {}), ("with", {"eval_kl": True}), ("reference", {"kl_coef": 1e-30})):
        sasr.train(config(tmp_path / name, **flags | more))
    torch.testing.assert_close(weights(tmp_path / "with"), weights(tmp_path / "without"), rtol=0, atol=0)
    without, measured, reference = (
        [record.get("eval/kl") for record in lines(tmp_path / name) if "eval/accuracy" in record]
        for name in ("without", "with", "reference")
    )
    assert without == [None] * 4
    assert measured[0] is reference[0] is None  # with the last step of the warm-up
    assert measured[1:] == pytest.approx(reference[1:], rel=1e-2)  # its updates hold all samples, and round otherwise
    assert min(measured[1:]) > 0


def test_transformers_reads_the_saved_model_and_its_tokenizer_as_we_do(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task = {"task": "countdown:train_size=60,test_size=16", "ood_task": "none"}  # digits: where splitting rules differ
    sasr.train(config(tmp_path / "x", steps=0, **task))
    ours, codec = Transformer.from_pretrained(tmp_path / "x/model"), Codec.from_pretrained(tmp_path / "x/model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "x/model")
    auto = AutoTokenizer.from_pretrained(tmp_path / "x/model")
    assert (auto.eos_token_id,) == codec.stop_token_ids
    for text in ("numbers 50 98 3 target 51\n", "98 - 50 = 48, 48 + 3 = 51 yes\n<answer> (98 - 50) + 3 </answer>"):
        ids = codec.encode(text)
        assert auto(text)["input_ids"] == ids
        assert auto.decode(ids) == text
        logits = ours.logits(ours(torch.tensor([ids])))
        torch.testing.assert_close(theirs(torch.tensor([ids])).logits, logits, rtol=1e-4, atol=1e-4)


def test_provenance_does_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance(torch.device("cpu"))["git_commit"] is None


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    sasr.train(config(tmp_path / "x", steps=0))
    before = (tmp_path / "x/metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"is not empty, it holds checkpoint; name another, or --resume .*/x$"):
        sasr.train(config(tmp_path / "x"))
    assert (tmp_path / "x/metrics.jsonl").read_bytes() == before


def test_a_checkpoint_that_fails_to_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    begin(folder)
    folder.save_checkpoint({"w": torch.ones(2)}, {"state": 1})

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        folder.save_checkpoint({"w": torch.zeros(2)}, {"state": 2})
    checkpoint = folder.find_checkpoint()
    assert checkpoint.tensors()["w"].tolist() == [1, 1]
    assert checkpoint.state["state"] == 1


def test_a_crash_between_the_two_renames_leaves_a_checkpoint(tmp_path):
    folder = RunFolder(tmp_path)
    begin(folder)
    folder.save_checkpoint({"w": torch.ones(2)}, {})
    os.rename(tmp_path / "checkpoint", tmp_path / "checkpoint.old")
    assert folder.find_checkpoint().tensors()["w"].tolist() == [1, 1]
    folder.save_checkpoint({"w": torch.zeros(2)}, {})
    assert folder.find_checkpoint().tensors()["w"].tolist() == [0, 0]
    shutil.rmtree(tmp_path / "checkpoint")
    assert folder.find_checkpoint().tensors()["w"].tolist() == [1, 1]  # the last two are kept


def test_a_broken_checkpoint_is_named(tmp_path):
    folder = RunFolder(tmp_path)
    begin(folder)
    folder.save_checkpoint({"w": torch.ones(2)}, {})
    (tmp_path / "checkpoint/tensors.safetensors").write_bytes(b"\0" * 5)
    with pytest.raises(ValueError, match=r"tensors\.safetensors has changed since it was written"):
        folder.find_checkpoint()


def test_the_progress_line_rewrites_itself_on_a_terminal_only():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, expected in ((Terminal(), "\r"), (io.StringIO(), "\n")):
        progress = Progress(stream)
        progress.show("step 1")
        progress.show("too soon to show")
        progress.show("the end", last=True)
        assert "the end" in stream.getvalue()
        assert expected in stream.getvalue()
        assert "too soon" not in stream.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (90, "1:30"), (3725, "1:02:05")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_the_time_left_counts_steps_and_evaluations_still_to_come():
    config = sasr.Config(warmup_steps=10, steps=10, eval_every=0, controller="alternate")
    seconds = {"warmup": 10.0, "sft": 2.0, "grpo": 6.0, "mixed": 0.0, "eval": 8.0}
    state = sasr.State(step=14, sft_steps=2, grpo_steps=2, seconds=seconds)  # 1 s an SFT step, 3 s a GRPO step
    assert seconds_left(config, state) == pytest.approx(6 * 2 + 4)  # 6 steps at 2 s, one evaluation at 4 s
    state = sasr.State(step=1, seconds={"warmup": 1.0, "sft": 0.0, "grpo": 0.0, "mixed": 0.0, "eval": 60.0})
    assert seconds_left(config, state) < 9 + 10 * 8 + 2 * 60 + 1


def test_steps_that_learnt_nothing_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(knights_knaves, "grade", lambda text, example: Grade(0.0, text == example.demonstration, False))
    summary = sasr.train(config(tmp_path / "x", controller="alternate", eval_every=0, ood_task="none"))
    assert (summary["grpo_steps"], summary["grpo_skipped"]) == (5, 5)
    table = closing_table(summary)
    assert re.search(r"\nsteps +4 +5 +5 +14\nof these without signal +5\n", table)
    assert table.split("what looks wrong")[1].splitlines()[1:] == [f"- {line}" for line in summary["diagnosis"]]
    state = sasr.State(
        step=14, sft_steps=5, grpo_steps=5, grpo_skipped=3, seconds=dict.fromkeys(sasr.State().seconds, 1.0)
    )
    assert " skipped 3 " in progress_line(config(tmp_path), state, {"kind": "grpo", "loss": 0.0, "p_sft": 0.5})
    state.grpo_skipped = 0
    assert "skipped" not in progress_line(config(tmp_path), state, {"kind": "grpo", "loss": 0.0, "p_sft": 0.5})


def test_a_run_of_the_study_is_put_beside_it(tmp_path, monkeypatch):
    """With the same configuration but for what leaves training alone; a run with another rate stands alone."""
    mine = config(tmp_path / "x", steps=2, ood_task="none")
    like = dataclasses.asdict(mine) | {"seed": 5, "out": "y", "eval_every": 1, "ood_task": "auto"}
    del like["template_date"]  # of the day of the run
    other = like | {"controller": "sft", "lr": 0.5}
    runs = [("sasr", like, 0.25), ("sasr", like, 0.5), ("sft", other, 0.125)]
    lines = [{"stage": "default", "name": n, "config": c, "summary": {"accuracy_final": a}} for n, c, a in runs]
    lines.append(lines[0] | {"stage": "D"})
    (tmp_path / "methods.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(run.report, "STUDY", tmp_path / "methods.jsonl")
    found = "in the study, mean of (seeds): sasr 37.5% (2), sft 12.5% (1)"
    assert published_means(mine) == found
    assert f"\n{found}\n" in closing_table(sasr.train(mine))
    assert published_means(dataclasses.replace(mine, lr=0.1)) == ""
    monkeypatch.setattr(run.report, "STUDY", tmp_path / "none")
    assert published_means(mine) == ""


def test_a_line_of_the_metrics_that_cannot_be_read_is_told_and_left_out(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo\n[1]\n{"step": 4}\n')
    assert RunFolder(tmp_path).records() == [{"step": 1}, {"step": 4}]
    assert "metrics.jsonl:2: no JSON object, so not looked at (such lines: 2)" in capsys.readouterr().err


def test_a_closed_terminal_or_pipe_does_not_stop_a_run(tmp_path, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", Closed())
    assert sasr.train(config(tmp_path / "x"))["grpo_steps"] > 0


def test_a_line_that_stays_does_not_begin_behind_the_progress():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    with Progress(Terminal()) as progress:
        progress.show("step 1")
        progress.say("something happened")
    assert progress.stream.getvalue().split("\n")[1:] == ["something happened", ""]


# ---- Resume ----------------------------------------------------------------------------------------------------------


class Crash(Exception):
    pass


def crash_at(monkeypatch, step):
    """The process dies after this step is logged and before anything else happens."""
    original = RunFolder.log

    def log(self, record):
        original(self, record)
        if record["step"] == step:
            raise Crash

    monkeypatch.setattr(RunFolder, "log", log)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("run") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knights_knaves, "grade", by_length)
        sasr.train(config(out))
    return out


@pytest.mark.parametrize("step", [1, 4, 6, 11])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, monkeypatch, whole, step):
    with monkeypatch.context() as patch:
        crash_at(patch, step)
        with pytest.raises(Crash):
            sasr.train(config(tmp_path / "cut"))
    folder = RunFolder(tmp_path / "cut")
    sasr.resume(tmp_path / "cut")
    assert lines(tmp_path / "cut") == lines(whole)
    uncut, cut = weights(whole), weights(tmp_path / "cut")
    assert all(torch.equal(uncut[name], cut[name]) for name in uncut)
    saved, again = RunFolder(whole).find_checkpoint().tensors(), folder.find_checkpoint().tensors()
    assert set(saved) == set(again)
    assert any(name.startswith("reference.") for name in saved)
    assert all(torch.equal(saved[name], again[name]) for name in saved)


def test_with_resampled_groups_too_a_resumed_run_draws_the_same_prompts(tmp_path, monkeypatch):
    few = {"controller": "grpo", "resample_groups": 2, "kl_coef": 0.0, "eval_every": 0, "ood_task": "none", "steps": 6}
    sasr.train(config(tmp_path / "whole", **few))
    with monkeypatch.context() as patch:
        crash_at(patch, 8)
        with pytest.raises(Crash):
            sasr.train(config(tmp_path / "cut", **few))
    sasr.resume(tmp_path / "cut")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    drawn = [record["prompts_drawn"] for record in lines(tmp_path / "whole")[4:]]
    state = RunFolder(tmp_path / "whole").find_checkpoint().state["state"]
    assert 2 * (state["grpo_steps"] + state["extra_rollouts"]) == sum(drawn) > 2 * 6


def test_a_checkpoint_has_keys_that_stay(whole):
    """Runs outlive the code that began them, so what is in their files keeps its names."""
    checkpoint = RunFolder(whole).find_checkpoint()
    keys = {"state", "controller", "fingerprint", "config", "config_hash", "metrics_bytes"}
    assert set(checkpoint.state) == keys | {"method"}
    state = "step sft_steps grpo_steps norm_step bad_steps bad_in_a_row reward_failures seconds accuracy scores reward"
    state += " grpo_skipped extra_rollouts mixed_steps warmup_sft unlogged"
    assert set(checkpoint.state["state"]) == set(state.split())
    assert set(checkpoint.state["state"]["seconds"]) == {"warmup", "sft", "grpo", "mixed", "eval"}
    assert set(checkpoint.state["controller"]) == {"g_warmup", "g_last", "warmup_norms"}
    values = checkpoint.state["config"]
    date = {"template_date": values["template_date"]}  # when it began
    assert values == json.loads((whole / "config.json").read_text()) == dataclasses.asdict(config(whole)) | date
    sorted_values = json.dumps(values | {"out": "", "template_date": ""}, sort_keys=True)
    assert checkpoint.state["config_hash"] == hashlib.sha256(sorted_values.encode()).hexdigest()[:16]
    names = {name.partition(".model.")[0] for name in checkpoint.tensors()}
    assert names == {"model", "optimizer.step", "optimizer.exp_avg", "optimizer.exp_avg_sq", "reference"}


def test_the_same_seed_gives_the_same_run_and_another_seed_does_not(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        sasr.train(config(tmp_path / name, seed=seed))
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert lines(tmp_path / "a") != lines(tmp_path / "c")


def test_a_decay_branch_starts_from_a_stable_checkpoint(tmp_path):
    """A constant-rate run is branched: the same steps up to there, then a fall that ends the branch."""
    sasr.train(
        config(tmp_path / "stable", lr_schedule="wsd", decay_fraction=0.0, lr_warmup_steps=0, sft_lr=0.0, save_every=0)
    )
    before = lines(tmp_path / "stable")
    sasr.resume(tmp_path / "stable", {"out": str(tmp_path / "branch"), "steps": 15, "decay_fraction": 1 / 3})
    records = lines(tmp_path / "branch")
    assert records[:14] == before
    assert lines(tmp_path / "stable") == before
    lr = json.loads((tmp_path / "branch/config.json").read_text())["lr"]
    assert [r["lr"] for r in records[14:]] == pytest.approx([lr, 0.8 * lr, 0.6 * lr, 0.4 * lr, 0.2 * lr])


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"group_size": 4}, "--group-size 4"),
        ({"controller": "grpo"}, "--controller grpo"),
        ({"steps": 2}, "--steps 2"),
        ({"lr_schedule": "cosine"}, "--lr-schedule"),
    ],
    ids=str,
)
def test_resuming_with_flags_that_contradict_the_past_is_refused(tmp_path, overrides, named):
    sasr.train(config(tmp_path / "x"))
    with pytest.raises(ValueError, match=named):
        sasr.resume(tmp_path / "x", overrides)


@pytest.mark.parametrize(("controller", "overrides"), [("sft-then-grpo", {"steps": 20}), ("cosine", {"steps": 20})])
def test_resuming_may_not_move_a_schedule_under_steps_already_taken(tmp_path, controller, overrides):
    sasr.train(config(tmp_path / "x", controller=controller))
    with pytest.raises(ValueError, match=f"--steps 20: would change the {controller} schedule"):
        sasr.resume(tmp_path / "x", overrides)


def test_what_is_refused_leaves_the_run_as_it_was(tmp_path, capsys):
    sasr.train(config(tmp_path / "x"))
    before = {file: file.read_bytes() for file in (tmp_path / "x").rglob("*") if file.is_file()}
    for changed in (
        ["--device", "abacus"],
        ["--data", "nowhere"],
        ["--out", str(tmp_path / "y"), "--device", "abacus"],
    ):
        assert sasr.main(["--resume", str(tmp_path / "x"), "--steps", "20", *changed]) == 2
    assert {file: file.read_bytes() for file in (tmp_path / "x").rglob("*") if file.is_file()} == before
    assert not (tmp_path / "y").exists()


def test_a_configuration_changed_by_hand_is_held_to_the_same_rules(tmp_path, capsys):
    sasr.train(config(tmp_path / "x"))
    file = tmp_path / "x/config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"gamma": 2.0}))
    with pytest.raises(ValueError, match=r"--gamma 2.0: a resumed run keeps its 1.0"):
        sasr.resume(tmp_path / "x")
    file.write_text(json.dumps(values | {"steps": 11}))
    sasr.resume(tmp_path / "x")
    assert "resuming with --steps 11\n" in capsys.readouterr().err
    assert len(lines(tmp_path / "x")) == 15


def test_a_finished_run_refuses_flags_that_would_do_nothing(tmp_path, capsys):
    sasr.train(config(tmp_path / "x"))
    with pytest.raises(ValueError, match=r"--eval-samples 4: the run has finished.* --eval-only --model .*x/model"):
        sasr.resume(tmp_path / "x", {"eval_samples": 4})
    sasr.resume(tmp_path / "x", {"save_dtype": "bfloat16"})
    assert {tensor.dtype for tensor in load_file(tmp_path / "x/model/model.safetensors").values()} == {torch.bfloat16}


def test_a_checkpoint_of_another_version_is_named(tmp_path):
    sasr.train(config(tmp_path / "x", steps=0))
    folder = RunFolder(tmp_path / "x")
    checkpoint = folder.find_checkpoint()
    for broken in ({"state": {"stepz": 1}}, {"config": {"gammaz": 1}}, {"config": None}):
        folder.save_checkpoint(checkpoint.tensors(), checkpoint.state | broken)
        with pytest.raises(ValueError, match="x/checkpoint does not fit this run: "):
            sasr.resume(tmp_path / "x")


def test_a_run_without_its_metrics_goes_on(tmp_path, capsys):
    sasr.train(config(tmp_path / "x"))
    (tmp_path / "x/metrics.jsonl").unlink()
    sasr.resume(tmp_path / "x", {"steps": 12})
    assert "lines of steps before the checkpoint are missing" in capsys.readouterr().err
    assert [record["step"] for record in lines(tmp_path / "x")] == [15, 16]


def test_a_run_that_is_being_trained_is_neither_resumed_nor_branched(tmp_path):
    sasr.train(config(tmp_path / "x", steps=0))
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import run.checkpoint, time\n"
    code += (
        f"with run.checkpoint.RunFolder({str(tmp_path / 'x')!r}).locked(): print('locked', flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        for overrides in ({}, {"out": str(tmp_path / "y")}):
            with pytest.raises(ValueError, match=f"process {other.pid} is writing into this folder"):
                sasr.resume(tmp_path / "x", overrides)
        other.kill()
    assert not (tmp_path / "y").exists()


def test_data_that_moved_can_be_named_anew(tmp_path):
    for split, count in (("train", 5), ("test", 4)):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(COUNTDOWN) + "\n" for _ in range(count)))
    sasr.train(config(tmp_path / "x", **FEW | {"task": "countdown", "data": str(tmp_path)}))
    shutil.copytree(tmp_path, tmp_path / "moved", ignore=lambda *_: ["x", "moved"])
    sasr.resume(tmp_path / "x", {"data": str(tmp_path / "moved"), "steps": 4})
    assert len(lines(tmp_path / "x")) == 6


def test_resuming_with_other_data_is_refused(tmp_path, monkeypatch):
    sasr.train(config(tmp_path / "x"))
    monkeypatch.setattr(knights_knaves, "terse_trace", lambda *_: "so k k k")
    with pytest.raises(ValueError, match=r"x/checkpoint does not fit this run: other training examples .* --task kni"):
        sasr.resume(tmp_path / "x")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"stepz": 3}', "config.json: unknown setting 'stepz'"),
        ('{"steps": "3"}', "config.json: --steps '3'"),
        ("{", "JSON"),
    ],
)
def test_a_broken_configuration_is_named(tmp_path, text, named):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(named)):
        sasr.resume(tmp_path)


def test_lost_lines_of_the_metrics_are_reported(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    begin(folder)
    folder.log({"step": 1, "loss": float("nan")})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    folder.rewind(Checkpoint(tmp_path / "checkpoint", {"metrics_bytes": 1000}))
    assert "lines of steps before the checkpoint are missing" in capsys.readouterr().err
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None}


@pytest.mark.parametrize("only_the_old_checkpoint", [False, True])
def test_a_run_that_was_moved_can_still_be_branched(tmp_path, only_the_old_checkpoint):
    sasr.train(config(tmp_path / "x"))
    os.rename(tmp_path / "x", tmp_path / "moved")
    if only_the_old_checkpoint:
        shutil.rmtree(tmp_path / "moved/checkpoint.old")
        os.rename(tmp_path / "moved/checkpoint", tmp_path / "moved/checkpoint.old")
    before = lines(tmp_path / "moved")
    sasr.resume(tmp_path / "moved", {"out": str(tmp_path / "x"), "steps": 11})
    assert lines(tmp_path / "moved") == before
    assert len(lines(tmp_path / "x")) == len(before) + 1


def test_resuming_a_finished_run_with_more_steps_goes_on(tmp_path):
    sasr.train(config(tmp_path / "whole", steps=12))
    sasr.train(config(tmp_path / "x"))
    sasr.resume(tmp_path / "x", {"steps": 12})

    def training(out):
        return [{k: v for k, v in r.items() if not k.startswith("eval/")} for r in lines(out)]

    assert training(tmp_path / "x") == training(tmp_path / "whole")


def test_a_signal_ends_the_step_saves_and_can_be_resumed(tmp_path, monkeypatch, whole):
    original = RunFolder.log

    def log(self, record):
        original(self, record)
        if record["step"] == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", log)
        with pytest.raises(Stopped) as stopped:
            sasr.train(config(tmp_path / "x"))
    assert stopped.value.signal == signal.SIGTERM
    assert len(lines(tmp_path / "x")) == 7
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    sasr.resume(tmp_path / "x")
    assert lines(tmp_path / "x") == lines(whole)


@pytest.mark.parametrize("step", [0, 4, 12, 14])
def test_a_signal_ends_an_evaluation_at_once_and_it_is_done_again(tmp_path, monkeypatch, whole, step):
    original = run.evaluation.draw_answers

    def answers(trainer, *arguments):
        if trainer.state.step == step:
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("went on")
        return original(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run.evaluation, "draw_answers", answers)
        with pytest.raises(Stopped):
            sasr.train(config(tmp_path / "x"))
    assert len(lines(tmp_path / "x")) == max(step - 1, 0)
    sasr.resume(tmp_path / "x")
    assert lines(tmp_path / "x") == lines(whole)
    uncut, cut = weights(whole), weights(tmp_path / "x")
    assert all(torch.equal(uncut[name], cut[name]) for name in uncut)


def test_an_evaluation_that_fails_loses_no_step(tmp_path, monkeypatch, whole):
    original = run.evaluation.draw_answers

    def answers(trainer, *arguments):
        if trainer.state.step == 8:
            raise RuntimeError("the verifier raised")
        return original(trainer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run.evaluation, "draw_answers", answers)
        with pytest.raises(RuntimeError):
            sasr.train(config(tmp_path / "x", save_every=0))
    assert RunFolder(tmp_path / "x").find_checkpoint().state["state"]["step"] == 8
    sasr.resume(tmp_path / "x")
    assert lines(tmp_path / "x") == lines(whole)


def test_a_terminal_that_closes_stops_a_run_unless_it_was_told_not_to():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)  # it may come twice
        assert interrupt.signal == signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
        assert interrupt.signal == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- The command line, as a user meets it ----------------------------------------------------------------------------


def command(*arguments, cwd=ROOT):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, str(ROOT / "sasr.py"), *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_train_evaluate_and_resume_from_the_command_line(tmp_path, capsys, monkeypatch):
    done = command(*flags(out=tmp_path / "x"))
    assert done.returncode == 0, done.stderr
    assert re.search(r"in domain +\d+\.\d% +\d+\.\d% +\d+\.\d%", done.stdout)
    assert re.search(r"out of domain +\d+\.\d%", done.stdout)
    assert f"written to {tmp_path / 'x'}" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80 + len(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    arguments = ["--eval-only", "--model", str(tmp_path / "x/model"), "--task", SMALL["task"], "--device", "cpu"]
    assert sasr.main(arguments) == 0
    final = json.loads((tmp_path / "x/summary.json").read_text())["accuracy_final"]
    assert re.search(rf"accuracy +{final:.1%}", capsys.readouterr().out)
    assert (tmp_path / "runs/eval-knights-knaves-0/samples.jsonl").exists()
    assert sasr.main([*arguments, "--out", "runs/eval-knights-knaves-0"]) == 2
    assert capsys.readouterr().err == (
        "sasr.py: --out runs/eval-knights-knaves-0 is not empty, it holds samples.jsonl; name another\n"
    )
    assert sasr.main(["--resume", str(tmp_path / "x"), "--steps", "12"]) == 0
    assert len(lines(tmp_path / "x")) == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group-size", "0"], "--group-size 0: must be a whole number from 1 to 10000000"),
        (["--task", "sudoku"], "unknown task 'sudoku'"),
        (["--task", "knights-knaves:people=1"], "people"),
        (["--data", "no/such/folder"], "no/such/folder: no such folder; it should have train.jsonl"),
        (["--model", "no/such/model"], "--model no/such/model: no such directory"),
        (["--resume", "no/such/run"], "no/such/run/config.json: no such file"),
        (["--device", "abacus"], "--device abacus: not available here"),
        (["--device", "meta"], "--device meta: not available here"),
        (["--eval-only"], "--eval-only needs --model"),
        (["--resume", ""], "--resume '': name the folder of a run"),
        (["--seed", str(2**64)], f"--seed {2**64}: must be a whole number from 0 to {2**63 - 1}"),
        (["--temperature", "1e-40"], "--temperature 1e-40: must be a number from 0.001 to 10000000"),
        (
            ["--task", "countdown:seed=1"],
            "task 'countdown:seed=1': seed is given twice, or has a flag of its own, --seed",
        ),
        (["--task", "countdown:path=x"], "path is given twice, or has a flag of its own, --data"),
        (["--task", "math:verifier=rules", "--verifier", "rules"], "verifier is given twice, or has a flag of its own"),
        (["--task", "countdown:low=1,low=2"], "low is given twice"),
        (["--task", "countdown:low=x"], "task countdown: low must be a whole number, got 'x'"),
        (["--ood-task", "math"], "--ood-task math: only generated tasks can serve here: knights-knaves, countdown"),
        (["--warmup-task", "sudoku"], "--warmup-task sudoku: only generated tasks can serve here"),
        (["--data", __file__], "test_run.py: a file, not a folder"),
        (["--task", "countdown:train_size=0,test_size=0"], "task countdown: there are no examples"),
        (["--vocab-size", str(10**23)], f"--vocab-size {10**23}: must be a whole number from 257 to 10000000"),
        (["--rollout-memory", "1e300"], "--rollout-memory 1e+300: must be a number from 0.0 to 10000000"),
        (["--out", __file__], "test_run.py: a file is in the way"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sasr.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("sasr.py: ")
    assert message in captured.err
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("*.json"))


@pytest.mark.parametrize(
    ("task", "harder"),
    [
        ("knights-knaves", "width=3,train_size=1"),
        ("knights-knaves:people=4,train_size=9,test_size=3", "people=4,width=3,train_size=1"),
        ("knights-knaves:wording=natural,format=logic-rl", "wording=natural,format=logic-rl,width=3,train_size=1"),
        ("knights-knaves:train_size=9,demonstrations=4,swapped=2", "width=3,train_size=1"),
        ("countdown:numbers=2,high=20,train_size=9,demonstrations=4", "numbers=4,high=20,train_size=1"),
        ("knights-knaves:width=3,train_size=9", None),  # is that task
        ("countdown:numbers=5,train_size=9,test_size=3", None),  # is harder
        ("knights-knaves:people=2,train_size=9,test_size=3", None),  # two people cannot be named in a claim of three
        ("countdown:numbers=2,low=9,high=10,train_size=4,test_size=1", None),  # too few of four numbers
    ],
)
def test_the_out_of_domain_task_keeps_the_options_of_the_task(task, harder):
    found = load_tasks(sasr.Config(task=task))[2]
    if harder is None:
        assert found == []
    else:
        expected = load_task_spec(f"{task.partition(':')[0]}:{harder}", "", 0)
        assert [(ood.test, ood.verify.keywords) for ood in found] == [(expected.test, expected.verify.keywords)]


def test_there_may_be_two_tasks_out_of_domain(tmp_path):
    wider, larger = (f"knights-knaves:{option},train_size=1,test_size=4" for option in ("width=3", "people=4"))
    mode, values = parse_command_line(sasr.Config, ["--ood-task", wider, "--ood-task", larger])
    assert (mode, values["ood_task"]) == ("train", f"{wider} {larger}")
    summary = sasr.train(config(tmp_path / "x", ood_task=values["ood_task"], steps=2))
    numbers = [f"accuracy_{at}{suffix}" for at in ("before", "warmup", "final") for suffix in ("", "_ood", "_ood2")]
    assert set(numbers) <= set(summary)
    answers = (tmp_path / "x/samples.jsonl").read_text().splitlines()
    assert {json.loads(answer)["split"] for answer in answers} == {"test", "ood", "ood2"}
    assert "out of domain 2" in closing_table(summary)


def test_a_task_without_a_harder_variant_is_told(tmp_path):
    trainer = sasr.Trainer(config(tmp_path / "x", task="countdown:numbers=4,train_size=9,test_size=3", ood_task="auto"))
    assert "there is no harder variant of countdown:numbers=4,train_size=9,test_size=3" in headline(trainer, tmp_path)


def test_task_specs():
    task = load_task_spec("countdown:numbers=4,train_size=5,test_size=2", "", 0)
    assert (task.name, len(task.train), len(task.test)) == ("countdown", 5, 2)
    with pytest.raises(ValueError, match="'peple'"):
        load_task_spec("knights-knaves:peple=3", "", 0)
    with pytest.raises(ValueError, match="key=value"):
        load_task_spec("countdown:4", "", 0)
    with pytest.raises(ValueError, match="unknown task 'sudoku'"):
        load_task_spec("sudoku", "", 0)


def test_help_explains_every_flag_with_its_default(capsys):
    with contextlib.suppress(SystemExit):
        sasr.main(["--help"])
    text = "".join(capsys.readouterr().out.split())  # lines are broken at blanks, and after hyphens
    for spec in dataclasses.fields(sasr.Config):
        assert flag_name(spec.name) in text
        assert "".join(f"(default {spec.default!r})".split()) in text


def test_importing_the_algorithm_has_no_side_effect(tmp_path):
    code = "import torch as t; a = t.get_rng_state(); import sasr; assert t.equal(a, t.get_rng_state())"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.nightly
def test_the_default_job_learns_at_least_ten_points_after_the_warmup(tmp_path):
    """What the README shows, for a seed that it does not show. Minutes long."""
    line = [sys.executable, str(ROOT / "sasr.py"), "--seed", "3", "--out", str(tmp_path / "x")]
    subprocess.run(line, check=True)
    summary = json.loads((tmp_path / "x/summary.json").read_text())
    assert summary["accuracy_before"] < 0.05
    assert summary["accuracy_final"] >= summary["accuracy_warmup"] + 0.1
    assert summary["accuracy_final_ood"] >= summary["accuracy_warmup_ood"] + 0.05
    assert min(summary["sft_steps"], summary["grpo_steps"]) > 0


# ---- Published records -----------------------------------------------------------------------------------------------

KK = {
    "quiz": 'You meet 2 inhabitants: Zoey, and Ethan. Zoey said, "Ethan is a knave". Ethan said, "Zoey is a knave".',
    "names": ["Zoey", "Ethan"],
    "solution": [True, False],
    "solution_text_format": "(1) Zoey is a knight\n(2) Ethan is a knave",
    "cot_head": "Let's think step by step.",
    "cot_repeat_steps": ["Assume Zoey is a knight.", "Ethan must be a knave."],
    "cot_foot": "This leads to a feasible solution.",
}
COUNTDOWN = {"numbers": [4, 9, 35], "target": 22, "answer": "9 + 4 = 13\n35 - 13 = 22\n<answer> 35 - (9 + 4) </answer>"}
FEW = {"warmup_steps": 2, "steps": 3, "ood_task": "none", "eval_every": 0, "max_new_tokens": 20}


def run_on(data, task, out, capsys):
    assert sasr.main(flags(task=task, data=data, out=out, **FEW)) == 0
    assert len(lines(out)) == 5
    assert "out of domain" in capsys.readouterr().out


@pytest.mark.parametrize(("task", "record"), [("knights-knaves", KK), ("countdown", COUNTDOWN)])
def test_the_main_job_runs_on_records_from_a_folder(tmp_path, task, record, capsys):
    for split, count in (("train", 5), ("test", 4)):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for _ in range(count)))
    run_on(tmp_path, task, tmp_path / "x", capsys)


@pytest.mark.shared_data
@pytest.mark.parametrize(("task", "folder"), [("knights-knaves", "knights_knaves/people3"), ("countdown", "countdown")])
def test_the_main_job_runs_on_the_published_records(tmp_path, task, folder, capsys):
    if not (PUBLISHED / folder).is_dir():
        pytest.skip(f"{PUBLISHED / folder} is not here")
    run_on(PUBLISHED / folder, task, tmp_path / "x", capsys)
