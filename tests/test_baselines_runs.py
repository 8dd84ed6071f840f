"""Whole runs of every method: what they count and log, resumed bit for bit, and branched from one warm-up."""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

import sasr
from baselines import METHODS
from data import Grade, knights_knaves
from data.batch import shuffled
from model import Transformer, read_config
from run.checkpoint import RunFolder
from run.lifecycle import Stopped
from run.setup import Setup

SMALL = {
    "task": "knights-knaves:train_size=60,test_size=12,demonstrations=30",  # the first half of the prompts have one
    "ood_task": "none",
    "hidden_size": 32,
    "layers": 1,
    "heads": 2,
    "vocab_size": 300,
    "warmup_steps": 2,
    "steps": 20,
    "sft_batch_size": 4,
    "prompts_per_step": 2,
    "group_size": 4,
    "max_new_tokens": 20,
    "eval_every": 0,
    "eval_examples": 4,
    "save_every": 0,
    "lr_schedule": "constant",
    "lr_warmup_steps": 0,
    "device": "cpu",
    "gate": 1,
    "buffer": 3,
}
QUICK = ("relift", "hpt", "srft", "uft")  # the others differ less from SASR


def nightly_unless(quick, *values):
    return pytest.param(*values, marks=() if quick else pytest.mark.nightly)


METHODS_TO_RUN = [nightly_unless(name in QUICK, name) for name in METHODS]
WHOLE = ("parallel", "chord-mu", "chord-phi")  # SFT has a part in each of their steps
BY_PROMPT = ("relift", "rft", "hpt", "luffy", "srft", "uft")


def config(out, **changes):
    return sasr.Config(**(SMALL | {"out": str(out)} | changes))


def by_length(text, example):
    """About a third of what an untrained model writes is right, so that groups and prompts differ."""
    right = text == example.demonstration or len(text) % 3 == 2
    return Grade(1.0 if right else len(text) % 3 / 2, right, True)


@pytest.fixture(autouse=True)
def rewards_that_differ(monkeypatch):
    monkeypatch.setattr(knights_knaves, "grade", by_length)


@contextlib.contextmanager
def signalled_at(step):
    """A SIGTERM comes as this step is logged: it is the last one, and saved."""
    original = RunFolder.log

    def log(self, record):
        original(self, record)
        if record["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "log", log)
        with pytest.raises(Stopped):
            yield


def lines(out):
    """The metrics, without what a clock decides."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def adaptive_lines(out):
    return [record for record in lines(out) if record["phase"] == "adaptive"]


def assert_same(out, expected, *, metrics=lines):
    """Metrics, weights, moments, frozen policies, counters, controller and the method's memory."""
    assert metrics(out) == metrics(expected)
    ours, theirs = (RunFolder(path).find_checkpoint() for path in (out, expected))
    for key in ("state", "controller", "method"):
        assert without_seconds(ours.state[key]) == without_seconds(theirs.state[key])
    ours, theirs = ours.tensors(), theirs.tensors()
    assert set(ours) == set(theirs)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def without_seconds(values):
    return {key: value for key, value in values.items() if key != "seconds"}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A SASR run, whose p_t another run may replay."""
    out = tmp_path_factory.mktemp("recorded") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knights_knaves, "grade", by_length)
        sasr.train(config(out))
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory, recorded):
    """Of a method: a run that nothing interrupts, and its summary; each is trained once."""

    @functools.cache
    def train(controller):
        out = tmp_path_factory.mktemp(controller) / "whole"
        return out, sasr.train(config(out, controller=controller, replay=str(recorded)))

    return train


# ---- Every method ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("controller", METHODS_TO_RUN)
def test_a_method_trains(controller, whole):
    out, summary = whole(controller)
    records, method = adaptive_lines(out), METHODS[controller]
    counts = {kind: sum(record["kind"] == kind for record in records) for kind in ("sft", "grpo", "mixed")}
    assert counts == {kind: summary[f"{kind}_steps"] for kind in counts}
    assert sum(counts.values()) == 20
    assert counts["mixed"] == (20 if method.mixes else 0)
    if not method.mixes:
        assert min(counts["sft"], counts["grpo"]) > 0
    assert all(math.isfinite(record[key]) for record in records for key in ("loss", "grad_norm", "lr"))
    assert [record["grad_norm"] for record in records].count(0) == summary["grpo_skipped"] < 10
    assert summary["bad_steps"] == summary["reward_failures"] == 0
    tensors = RunFolder(out).find_checkpoint().tensors()
    began = dict(sasr.Trainer(config(out, controller=controller, replay=str(out))).model.named_parameters())
    assert not any(torch.equal(tensors[f"model.{name}"], weights) for name, weights in began.items())


@pytest.mark.parametrize("controller", METHODS_TO_RUN)
def test_what_sft_adds_to_a_mixed_step_is_logged_apart(controller, whole):
    records = adaptive_lines(whole(controller)[0])
    found = ["loss_sft" in record for record in records]
    for record in records:
        assert ("grad_norm_sft" in record) == ("loss_sft" in record)
        if "loss_sft" in record:
            assert math.isfinite(record["loss_sft"])
            assert record["grad_norm_sft"] > 0
            assert 0 < record["tokens_sft"] <= record["tokens_trained"]
        assert ("sft_share" in record) == (
            record["kind"] == "mixed" or (controller, record["kind"]) == ("relift", "grpo")
        )
    shares = [record.get("sft_share") for record in records]
    if controller in WHOLE:
        assert all(found)
    elif controller in ("replay", "relift", "luffy"):  # a demonstration in a group is no SFT
        assert not any(found)
    elif controller == "chord-reward":
        expected = [min(max(0.5 - record["reward_mean"], 0.0), 1.0) for record in records]
        assert shares == pytest.approx(expected, abs=1e-6)
        assert found == [weight > 0 for weight in expected]
        assert len(set(found)) == 2
    elif controller == "rft":
        assert any(found)
        assert [record["grad_norm"] > 0 for record in records] == found
    elif controller in ("hpt", "srft"):
        assert found == [share > 0 for share in shares]
        assert 0 < sum(found) < 20
    else:  # uft: no hint after 0.6 of the steps
        assert any(found[:12])
        assert not any(found[12:])
        assert not any(shares[12:])


@pytest.mark.parametrize("controller", [nightly_unless(name in QUICK, name) for name in BY_PROMPT])
def test_prompts_whose_demonstration_is_missing_are_counted(controller, whole):
    records = [record for record in adaptive_lines(whole(controller)[0]) if record["kind"] != "sft"]
    drawn = [shuffled(60, 2 * n, 2, 0, "prompts") for n in range(len(records))]
    missing = [sum(prompt >= 30 for prompt in prompts) for prompts in drawn]
    counted = [record["without_demonstration"] for record in records]
    if controller in ("luffy", "srft"):
        assert counted == missing
    elif controller == "uft":
        assert counted == missing[:12] + [0] * 8
    elif controller == "rft":
        assert not any(counted)
    else:  # those of which few samples or none are right
        assert all(count <= most for count, most in zip(counted, missing, strict=True))
        assert 0 < sum(counted) < sum(missing)


@pytest.mark.parametrize("controller", METHODS_TO_RUN)
def test_a_method_stopped_and_resumed_gives_the_same_bits(tmp_path, controller, whole, recorded):
    stop = 17 if controller == "relift" else 11
    with signalled_at(stop):
        sasr.train(config(tmp_path / "cut", controller=controller, replay=str(recorded)))
    assert len(lines(tmp_path / "cut")) == stop
    if controller == "relift":  # it has something to remember
        assert 0 < len(RunFolder(tmp_path / "cut").find_checkpoint().state["method"]["collected"]) < 3
    sasr.resume(tmp_path / "cut")
    assert_same(tmp_path / "cut", whole(controller)[0])


OTHER_FLAGS = {"srft": {"kl_coef": 0.05, "inner_updates": 2}, "uft": {"temperature": 0.8}}


@pytest.mark.parametrize(
    ("controller", "flags"),
    [nightly_unless(OTHER_FLAGS.get(c) == flags, c, flags) for c in METHODS for flags in OTHER_FLAGS.values()],
    ids=str,
)
def test_a_method_works_with_other_flags_of_grpo(tmp_path, controller, flags, recorded):
    few = {"controller": controller, "replay": str(recorded), "replay_order": "same", "steps": 8, "buffer": 2} | flags
    summary = sasr.train(config(tmp_path / "x", **few))
    records = adaptive_lines(tmp_path / "x")
    assert summary["sft_steps"] + summary["grpo_steps"] + summary["mixed_steps"] == 8
    assert summary["bad_steps"] == 0
    assert all(math.isfinite(record[key]) for record in records for key in ("loss", "grad_norm"))
    learnt = [record for record in records if record["grad_norm"] > 0]
    assert len(learnt) > 4
    kl = [record["kl"] for record in learnt if record.get("kl") is not None]
    if "kl_coef" in flags and controller != "rft":  # which has no samples in GRPO
        assert max(kl) > 0
    else:
        assert kl == []
    gaps = [record["sampler_gap"] for record in learnt if record.get("sampler_gap") is not None]
    assert max(gaps, default=0) < 1e-4  # sampled and scored at the same temperature, behind the same prompt


def test_mixed_steps_take_the_demonstrations_one_batch_after_the_other(tmp_path, monkeypatch):
    taken, demonstrations = [], sasr.demonstrations

    def watched(trainer, task, number, purpose):
        taken.append(number)
        return demonstrations(trainer, task, number, purpose)

    monkeypatch.setattr(sasr, "demonstrations", watched)
    sasr.train(config(tmp_path / "x", controller="parallel", steps=4, inner_updates=2))
    assert taken == [0, 1, 2, 3, 4, 5]


# ---- One warm-up, many branches --------------------------------------------------------------------------------------

WARM = {"warmup_steps": 4, "steps": 5, "eval_examples": 2}
BRANCHES = {
    "gamma": {"gamma": 0.3},
    "mean": {"warmup_norm": "mean", "warmup_norm_window": 3, "current_norm": "ema", "norm_ema": 0.5},
    "ema": {"warmup_norm": "ema", "norm_ema": 0.6},
    "loss": {"signal": "loss", "warmup_norm": "mean", "probe_every": 2},
    "kl": {"signal": "kl", "kl_target": 0.001},
    "eval-kl": {"eval_kl": True, "controller": "alternate"},
    "moments": {"separate_moments": True, "controller": "alternate"},
    "lr": {"lr": 2e-3, "sft_lr": 3e-3, "controller": "cosine"},
    "groups": {"group_size": 6, "prompts_per_step": 3, "temperature": 0.9, "controller": "grpo"},
    "reference": {"kl_coef": 0.05, "controller": "alternate", "inner_updates": 2},
    "initial": {"kl_coef": 0.05, "reference": "initial", "controller": "alternate"},
    "replay": {"controller": "replay"},
    "sft": {"controller": "sft"},
    "relift": {"controller": "relift"},
    "chord": {"controller": "chord-reward", "tau": 0.8},
    "srft": {"controller": "srft", "demonstrated_share": 0.5},
    "uft": {"controller": "uft", "lr_schedule": "wsd", "decay_fraction": 0.5},
    "resampled": {"controller": "random", "sft_fraction": 0.4, "resample_groups": 2},
}
QUICK_BRANCHES = {
    "mean": "half",
    "loss": "stopped",
    "kl": "ended",
    "eval-kl": "other",
    "initial": "half",
    "replay": "ended",
    "lr": "other",
}  # and their source


def of_both_stages(out):
    """The metrics, without the distance to a reference policy at evaluations of the warm-up, which has none yet."""
    return [{k: v for k, v in r.items() if r["phase"] == "adaptive" or k != "eval/kl"} for r in lines(out)]


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """Runs that end, or are stopped, with the last step of the warm-up, or before it."""
    folder = tmp_path_factory.mktemp("warm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knights_knaves, "grade", by_length)
        sasr.train(config(folder / "ended", **WARM | {"steps": 0}))
        with signalled_at(4):
            sasr.train(config(folder / "stopped", **WARM))
        with signalled_at(2):
            sasr.train(config(folder / "half", **WARM | {"controller": "srft"}))
        with signalled_at(4):
            sasr.train(config(folder / "other", **WARM | {"signal": "kl", "kl_coef": 0.1, "reference": "initial"}))
    return folder


@pytest.fixture(scope="module")
def itself(tmp_path_factory, recorded):
    """A run that did not branch off, by the name of its flags; each is trained once."""

    @functools.cache
    def train(name):
        out = tmp_path_factory.mktemp(name) / "itself"
        sasr.train(config(out, **WARM | BRANCHES[name] | ({"replay": str(recorded)} if name == "replay" else {})))
        return out

    return train


@pytest.mark.parametrize(
    ("name", "source"),
    [nightly_unless(QUICK_BRANCHES.get(b) == s, b, s) for b in BRANCHES for s in ("ended", "stopped", "half", "other")],
)
def test_a_branch_equals_a_run_that_warmed_up_itself(tmp_path, name, source, warm, recorded, itself):
    files = {file: file.read_bytes() for file in (warm / source).rglob("*") if file.is_file()}
    as_it_was = {"steps": 5, "controller": "sasr", "signal": "norm", "kl_coef": 0.0, "reference": "warmup"}
    changes = BRANCHES[name] | ({"replay": str(recorded)} if name == "replay" else {})
    sasr.resume(warm / source, as_it_was | changes | {"out": str(tmp_path / "x")})
    assert {file: file.read_bytes() for file in files} == files
    assert_same(tmp_path / "x", itself(name), metrics=of_both_stages)


def test_a_run_stopped_at_the_end_of_its_warmup_may_become_another_in_its_own_folder(tmp_path, warm, itself):
    shutil.copytree(warm / "stopped", tmp_path / "x")
    sasr.resume(tmp_path / "x", BRANCHES["chord"])
    assert_same(tmp_path / "x", itself("chord"))


def test_a_branch_is_stopped_and_resumed_like_any_run(tmp_path, warm):
    changes = BRANCHES["kl"] | {"gamma": 0.5, "kl_coef": 0.05, "reference": "initial"}
    sasr.resume(warm / "stopped", changes | {"out": str(tmp_path / "whole")})
    with signalled_at(7):
        sasr.resume(warm / "stopped", changes | {"out": str(tmp_path / "cut")})
    sasr.resume(tmp_path / "cut")
    assert_same(tmp_path / "cut", tmp_path / "whole")


def test_a_branch_that_dies_at_its_first_step_has_what_it_began_with(tmp_path, warm, monkeypatch, itself):
    with monkeypatch.context() as patch:
        patch.setattr(sasr.Trainer, "step", Mock(side_effect=RuntimeError("died")))
        with pytest.raises(RuntimeError, match="died"):
            sasr.resume(warm / "stopped", BRANCHES["chord"] | {"out": str(tmp_path / "x")})
    assert RunFolder(tmp_path / "x").find_checkpoint().state["state"]["step"] == 4
    sasr.resume(tmp_path / "x")
    assert_same(tmp_path / "x", itself("chord"))


def test_stopped_in_the_evaluation_after_the_warmup_a_run_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    flags = WARM | {"steps": 2, "kl_coef": 0.05, "signal": "kl"}
    sasr.train(config(tmp_path / "whole", **flags))
    evaluate = sasr.evaluate

    def stopped(trainer):
        if trainer.state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(sasr, "evaluate", stopped)
        with pytest.raises(Stopped):
            sasr.train(config(tmp_path / "cut", **flags))
    sasr.resume(tmp_path / "cut")
    assert_same(tmp_path / "cut", tmp_path / "whole")


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run stopped after its first adaptive step."""
    out = tmp_path_factory.mktemp("begun") / "run"
    with pytest.MonkeyPatch.context() as patch, signalled_at(5):
        patch.setattr(knights_knaves, "grade", by_length)
        sasr.train(config(out, **WARM))
    return out


@pytest.mark.parametrize("name", BRANCHES)
def test_after_an_adaptive_step_nothing_of_this_may_change(tmp_path, name, begun, recorded):
    changes = BRANCHES[name] | ({"replay": str(recorded)} if name == "replay" else {})
    flags = "|".join("--" + flag.replace("_", "-") for flag in changes)
    with pytest.raises(ValueError, match=rf"^({flags}) \S+: a resumed run keeps its "):
        sasr.resume(begun, changes | {"out": str(tmp_path / "x")})
    assert not (tmp_path / "x").exists()


def rewrite_state(out, change):
    """Let `change` edit what a checkpoint has beside tensors, and set its sums right."""
    folder = out / "checkpoint"
    saved = json.loads((folder / "state.json").read_text())
    change(saved)
    (folder / "state.json").write_text(json.dumps(saved))
    files = (folder / name for name in ("state.json", "tensors.safetensors"))
    sums = "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)
    (folder / "SHA256SUMS").write_text(sums)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -1.0, "0.5", None])
def test_a_measure_of_the_warmup_that_cannot_be_one_is_named(tmp_path, broken, warm):
    shutil.copytree(warm / "stopped", tmp_path / "x")
    rewrite_state(tmp_path / "x", lambda saved: saved["state"]["warmup_sft"][-1].update(grad_norm=broken))
    with pytest.raises(ValueError, match="x/checkpoint does not fit this run: "):
        sasr.resume(tmp_path / "x")


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        ({"collected": [10**9]}, "collected 1000000000: must be a whole number from 0 to 59"),
        ({"collected": [-1]}, "collected -1: must be"),
        ({"collected": [3, 59]}, "collected: 59: that prompt has no demonstration"),
        ({"collected": "abc"}, "collected 'a': must be"),
        ({"collected": 5}, "not iterable"),
        ({"p": [0.5, 2.0]}, "p 2.0: must be a number from 0.0 to 1.0"),
        ({"p": [math.nan]}, "p nan: must be"),
        ([], "no attribute"),
    ],
    ids=str,
)
def test_what_a_method_cannot_have_kept_is_named(tmp_path, kept, reason, begun):
    shutil.copytree(begun, tmp_path / "x")
    rewrite_state(tmp_path / "x", lambda saved: saved.update(method=kept))
    with pytest.raises(ValueError, match=f"x/checkpoint does not fit this run: .*{reason}"):
        sasr.resume(tmp_path / "x")


def test_the_run_that_is_replayed_may_move_but_not_become_another(tmp_path, recorded):
    shutil.copytree(recorded, tmp_path / "source")
    flags = WARM | {"controller": "replay", "replay": str(tmp_path / "source")}
    sasr.train(config(tmp_path / "whole", **flags))
    with signalled_at(6):
        sasr.train(config(tmp_path / "cut", **flags))
    os.rename(tmp_path / "source", tmp_path / "moved")
    with pytest.raises(ValueError, match=r"^--replay .*/source: no such file or folder; --replay names its new place"):
        sasr.resume(tmp_path / "cut")
    (tmp_path / "other").mkdir()
    metrics = (tmp_path / "moved/metrics.jsonl").read_text()
    (tmp_path / "other/metrics.jsonl").write_text(metrics.replace('"p_sft": 0.', '"p_sft": 0.0'))
    with pytest.raises(ValueError, match=r"--replay .*/other: its p_t are not those that the run keeps, of .*/source"):
        sasr.resume(tmp_path / "cut", {"replay": str(tmp_path / "other")})
    sasr.resume(tmp_path / "cut", {"replay": str(tmp_path / "moved")})
    assert_same(tmp_path / "cut", tmp_path / "whole")
    with pytest.raises(ValueError, match=r"^--steps 6: a replay keeps the p_t, and the 5 steps, that it began with"):
        sasr.resume(tmp_path / "cut", {"steps": 6})


# ---- Flags that methods need -----------------------------------------------------------------------------------------


def test_sft_steps_have_a_learning_rate_of_their_own(tmp_path, monkeypatch):
    used, step = [], torch.optim.AdamW.step

    def watched(self, *more):
        used.append({group["lr"] for group in self.param_groups})
        return step(self, *more)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    flags = {"controller": "alternate", "steps": 6, "lr": 1e-3, "sft_lr": 1e-2, "warmup_lr": 1e-4}
    sasr.train(config(tmp_path / "x", **flags))
    rates = [record["lr"] for record in lines(tmp_path / "x")]
    assert rates == [1e-4, 1e-4, *[1e-2, 1e-3] * 3]
    assert used == [{rate} for rate in rates]
    flags |= {"controller": "parallel", "lr_schedule": "wsd", "decay_fraction": 0.5}
    sasr.train(config(tmp_path / "y", **flags))  # both at once: --lr
    assert [r["lr"] for r in adaptive_lines(tmp_path / "y")] == pytest.approx([1e-3] * 4 + [2e-3 / 3, 1e-3 / 3])


@pytest.mark.parametrize("window", [1, 2])
def test_the_loss_may_take_the_place_of_the_norm(tmp_path, window):
    flags = {"signal": "loss", "gamma": 0.7, "warmup_norm": "mean", "warmup_norm_window": window, "steps": 8}
    sasr.train(config(tmp_path / "x", **flags))
    records = lines(tmp_path / "x")
    losses = [record["loss"] for record in records[:2]]
    yardstick = latest = sum(losses[-window:]) / window
    for record in records[2:]:
        assert record["p_sft"] == pytest.approx(latest / (latest + 0.7 * yardstick))
        latest = record["loss"] if record["kind"] == "sft" else latest
    assert {record["kind"] for record in records[2:]} == {"sft", "grpo"}


def test_the_kl_to_the_policy_after_the_warmup_may_take_the_place_of_the_norm(tmp_path, monkeypatch):
    drawn, measure = [], sasr.kl_of_samples

    def watched(trainer, groups):
        drawn.append([(group.prompt, sample.tokens) for group in groups for sample in group.samples])
        return measure(trainer, groups)

    monkeypatch.setattr(sasr, "kl_of_samples", watched)
    flags = {"signal": "kl", "gamma": 3.0, "save_every": 1, "lr": 3e-3}
    sasr.train(config(tmp_path / "x", steps=4, **flags))
    records = adaptive_lines(tmp_path / "x")
    assert [record["p_sft"] for record in records[:2]] == [0, 0]  # the first step compares the policy with itself
    checked = 0
    for _ in range(3):  # K of the last step, from the weights before it
        before, after = (RunFolder(tmp_path / "x").path / name for name in ("checkpoint.old", "checkpoint"))
        if adaptive_lines(tmp_path / "x")[-1]["kind"] == "grpo":
            kl = json.loads((after / "state.json").read_text())["controller"]["g_last"]
            assert kl == pytest.approx(exact_kl(before, drawn[-1]), rel=1e-4)
            checked += 1
        sasr.resume(tmp_path / "x", {"steps": len(adaptive_lines(tmp_path / "x")) + 1})
        record = adaptive_lines(tmp_path / "x")[-1]
        assert record["p_sft"] == pytest.approx(kl / (kl + 3.0 * 0.05))
        assert 0 < record["p_sft"] < 1
    assert checked


def exact_kl(checkpoint, pairs):
    """Mean over completion tokens of sum_v p(v) log(p(v) / q(v)), in float64."""
    policies, tensors = [], load_file(checkpoint / "tensors.safetensors")
    for prefix in ("model.", "warmed_up."):
        policy = Transformer(read_config(checkpoint.parent / "model")).double()
        policy.load_state_dict({name: tensors[prefix + name] for name in policy.state_dict()})
        policies.append(policy)
    total = 0.0
    with torch.no_grad():
        for prompt, completion in pairs:
            ids = torch.tensor([prompt + completion])
            p, q = (policy.logits(policy(ids))[0, len(prompt) - 1 : -1].log_softmax(-1) for policy in policies)
            total += (p.exp() * (p - q)).sum().item()
    return total / sum(len(completion) for _, completion in pairs)


def test_moments_may_be_kept_apart(tmp_path):
    flags = {"separate_moments": True, "controller": "alternate", "steps": 4, "save_every": 1}
    sasr.train(config(tmp_path / "whole", **flags))
    with signalled_at(2 + 2):
        sasr.train(config(tmp_path / "cut", **flags))
    before, after = (
        load_file(tmp_path / "cut" / name / "tensors.safetensors") for name in ("checkpoint.old", "checkpoint")
    )
    assert any(name.startswith("grpo_optimizer.exp_avg.") for name in after)
    of_sft = [name for name in after if name.startswith("optimizer.")]
    assert len(of_sft) == 3 * sum(name.startswith("model.") for name in after)
    assert all(torch.equal(before[name], after[name]) for name in of_sft)  # that step was a GRPO one
    with signalled_at(2 + 3):
        sasr.resume(tmp_path / "cut")
    before, after = (
        load_file(tmp_path / "cut" / name / "tensors.safetensors") for name in ("checkpoint.old", "checkpoint")
    )
    of_grpo = [name for name in after if name.startswith("grpo_optimizer.")]
    assert {int(after[name]) for name in of_grpo if ".step." in name} == {1}
    assert all(torch.equal(before[name], after[name]) for name in of_grpo)
    assert not any(torch.equal(before[name], after[name]) for name in of_sft)
    sasr.resume(tmp_path / "cut")
    assert_same(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.7, 1.0])
def test_the_share_of_prompts_with_a_demonstration_is_exact_over_several_batches(tmp_path, share, size):
    setup = Setup(config(tmp_path, demonstrated_share=share, prompts_per_step=size))
    batches = [setup.draw_prompts(number) for number in range(120)]
    shown = [sum(prompt < 30 for prompt in batch) for batch in batches]
    assert {len(batch) for batch in batches} == {size}
    assert max(shown) - min(shown) <= (not (share * size).is_integer())
    assert all(abs(sum(shown[:n]) - n * size * share) <= 0.5 + 1e-9 for n in range(121))
    drawn = list(itertools.chain(*batches))
    for prompts in (range(30), range(30, 60)):  # each comes as often as any other of its kind, give or take one
        counts = [drawn.count(prompt) for prompt in prompts]
        assert max(counts) - min(counts) <= 1


def test_the_share_holds_in_a_run(tmp_path):
    sasr.train(config(tmp_path / "x", controller="luffy", demonstrated_share=0.5, steps=6))
    assert [record["without_demonstration"] for record in adaptive_lines(tmp_path / "x")] == [1] * 6


@pytest.mark.parametrize(("demonstrations", "share"), [(60, 0.0), (60, 0.5), (0, 0.5), (0, 1.0)])
def test_a_share_that_no_prompt_has_is_refused(tmp_path, demonstrations, share):
    task = f"knights-knaves:train_size=60,test_size=12,demonstrations={demonstrations}"
    flags = {"controller": "grpo", "warmup_steps": 0, "task": task, "demonstrated_share": share}
    with pytest.raises(ValueError, match=rf"^--demonstrated-share {share:g}: "):
        sasr.train(config(tmp_path / "x", **flags))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("share", [-0.5, -2.0, 1.5])
def test_a_share_is_one(tmp_path, share):
    with pytest.raises(ValueError, match=rf"^--demonstrated-share {share}"):
        config(tmp_path, demonstrated_share=share)


@pytest.mark.parametrize("controller", BY_PROMPT)
def test_methods_that_decide_by_prompt_draw_no_other_groups(tmp_path, controller):
    with pytest.raises(ValueError, match=rf"^--resample-groups.*{controller}"):
        config(tmp_path, controller=controller, resample_groups=1)
