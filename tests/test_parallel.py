"""Two processes beside one: the same completions, rewards and decisions, and the same gradients up to rounding.

All cases of the suite share one launch of torchrun, and so do all others (nightly); `ranks.py` is what is launched.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
from ranks import ROOT, STEPS, TINY
from test_adapters import write_base

import sasr
from run import parallel
from run.checkpoint import RunFolder

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
ALONE = os.environ | {"OMP_NUM_THREADS": "1"}
QUICK = ("sasr",)
SHARD = {
    "plain": {"controller": "chord-mu", "kl_coef": 0.1},
    "adapters": {"controller": "chord-mu", "kl_coef": 0.1, "lora_rank": 3, "gradient_checkpointing": True},
    "untied": {"controller": "hpt", "gradient_checkpointing": True, "prompts_per_step": 1, "sft_batch_size": 1},
    "moments": {"controller": "alternate", "separate_moments": True, "inner_updates": 2, "sft_loss": "dft"},
}


def launched(folder: Path, cases: dict[str, dict]) -> dict[str, list]:
    """What both ranks have of each case."""
    for name, case in cases.items():
        torch.save(case, folder / f"{name}.pt")
    command = [*TORCHRUN, str(ROOT / "tests/ranks.py"), str(folder), *cases]
    done = subprocess.run(command, env=ALONE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: [torch.load(folder / f"{name}.{r}.pt", weights_only=False) for r in (0, 1)] for name in cases}


def steps_case(name: str, folder: Path) -> dict:
    flags = STEPS[name] | ({"replay": str(folder / "replayed")} if name == "replay" else {})
    return {"function": "steps_from", "flags": flags, "steps": ranks.steps_alone(flags, 20)}


def shard_case(name: str, folder: Path) -> dict:
    flags = SHARD[name]
    if name in ("adapters", "untied"):
        family = "qwen2" if name == "adapters" else "llama"
        flags = flags | {"model": str(write_base(folder / family, family)), "vocab_size": 1024}
    return {"function": "steps_free", "flags": flags | {"shard": True, "warmup_steps": 1}, "steps": 3}


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> dict[str, list]:
    folder = tmp_path_factory.mktemp("quick")
    cases = {name: steps_case(name, folder) for name in QUICK} | {"plain": shard_case("plain", folder)}
    cases["short"] = {"function": "out_of_memory_once", "flags": {"controller": "alternate"}, "steps": 4}
    flags = {"controller": "sft", "out": str(folder / "stopped")}
    cases["stopped"] = {"function": "stopped_while_rank_0_writes", "flags": flags}
    flags = {
        "controller": "alternate",
        "out": str(folder / "run"),
        "steps": 4,
        "decay_fraction": 0.0,
        "reward": f"{reward_file(folder)}:score",
    }
    cases["run"] = {"function": "whole_run", "flags": flags}
    return {"cases": cases, **launched(folder, cases)}


@pytest.fixture(scope="module")
def thorough(tmp_path_factory) -> dict[str, list]:
    folder = tmp_path_factory.mktemp("thorough")
    sasr.train(sasr.Config(**TINY | {"out": str(folder / "replayed"), "controller": "random"}))
    cases = {name: steps_case(name, folder) for name in STEPS if name not in QUICK}
    cases |= {name: shard_case(name, folder) for name in SHARD if name != "plain"}
    return {"cases": cases, **launched(folder, cases)}


def reward_file(folder: Path) -> Path:
    file = folder / "rewards.py"
    file.write_text("def score(completion, example):\n    return len(completion) % 3 / 2\n")
    return file


# ----------------------------------------------------------------------------- the same steps


def check_steps(alone: list[dict], together: list[dict]) -> None:
    for number, (one, two) in enumerate(zip(alone, together, strict=True), start=1):
        for key in ("kind", "alpha", "tokens", "reward_mean", "signal_groups", "tokens_trained"):
            assert one["record"].get(key) == two["record"].get(key), (number, key)
        for group, other in zip(one["seen"], two["seen"], strict=True):
            assert group[:2] == other[:2]
            assert [(t, r) for t, _, r in group[2]] == [(t, r) for t, _, r in other[2]], number
        difference = (one["gradient"] - two["gradient"]).norm()
        assert difference <= 1e-5 * one["gradient"].norm(), number
        for key, value in one["record"].items():
            close = key not in ("padding_fraction", "tokens_read") and isinstance(value, float)
            assert not close or two["record"][key] == pytest.approx(value, rel=1e-4, abs=1e-6), (number, key)
        assert two["scores"] == pytest.approx(one["scores"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.nightly) for name in STEPS]
)
def test_two_processes_take_the_same_steps_as_one(request, name):
    found = request.getfixturevalue("quick" if name in QUICK else "thorough")
    for of_rank in found[name]:
        check_steps(found["cases"][name]["steps"], of_rank)
    steps = found["cases"][name]["steps"]
    assert any(len(step["gradient"]) and step["record"]["phase"] == "adaptive" for step in steps)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "plain" else pytest.mark.nightly) for name in SHARD]
)
def test_a_model_in_shards_trains_like_a_whole_one(request, name):
    found = request.getfixturevalue("quick" if name == "plain" else "thorough")
    case = found["cases"][name]
    whole = ranks.steps_free(case["flags"] | {"shard": False}, case["steps"])
    for of_rank in found[name]:
        check_steps(whole["steps"], of_rank["steps"])
        assert whole["tensors"].keys() == of_rank["tensors"].keys()
        for key, tensor in whole["tensors"].items():  # Adam divides small gradients, and their rounding, by themselves
            assert (of_rank["tensors"][key] - tensor).norm() <= 1e-3 * tensor.norm(), key


def test_where_one_rank_runs_out_of_memory_all_go_on_with_smaller_pieces(quick):
    case = quick["cases"]["short"]
    alone = ranks.steps_free(case["flags"], case["steps"])
    for rank, of_rank in enumerate(quick["short"]):
        assert of_rank["failed"] == [True] * rank
        assert of_rank["tokens"] == TINY["tokens_per_microbatch"] // 2
        check_steps(alone["steps"], of_rank["steps"])


def test_a_lack_of_memory_while_the_others_wait_is_not_tried_again(monkeypatch):
    """Another try begins with another message, and the others would wait for the first one."""
    monkeypatch.setattr(sasr.parallel, "RANKS", 2)
    monkeypatch.setattr(torch, "cat", lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("8 GB")))
    with pytest.raises(sasr.parallel.RankFailed, match="no memory to add up with: 8 GB"):
        sasr.parallel.add_up([torch.zeros(2)])


def test_after_a_signal_no_rank_ends_before_the_checkpoint_is_written(quick):
    """Torchrun takes that for a failure, and 30 seconds later kills the writing."""
    written = quick["stopped"][0]["written"]
    assert [of_rank["ended"] >= written for of_rank in quick["stopped"]] == [True, True]


def test_a_run_of_two_processes_goes_on_in_one(quick, tmp_path):
    out = Path(quick["cases"]["run"]["flags"]["out"])
    alone = sasr.train(sasr.Config(**TINY | quick["cases"]["run"]["flags"] | {"out": str(tmp_path / "alone")}))
    together, other = quick["run"]
    for key in ("sft_steps", "grpo_steps", "grpo_skipped", "accuracy_final", "config_hash", "g_warmup"):
        assert together[key] == other[key] == pytest.approx(alone[key]), key
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (tmp_path / "alone").iterdir())
    records, expected = (RunFolder(folder).records() for folder in (out, tmp_path / "alone"))
    assert [r["step"] for r in records] == list(range(1, 7))  # a line a step, by one process
    for record, other in zip(records, expected, strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=1e-5)
        assert (record["kind"], record["tokens"]) == (other["kind"], other["tokens"])
    summary = sasr.resume(str(out), {"steps": 6})
    assert summary["sft_steps"] + summary["grpo_steps"] == 6


@pytest.mark.parametrize("count", range(9))
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_shares_are_all_there_is_in_order_and_differ_by_one_at_most(monkeypatch, count, processes):
    monkeypatch.setattr(parallel, "RANKS", processes)
    shares = []
    for rank in range(processes):
        monkeypatch.setattr(parallel, "RANK", rank)
        shares.append(parallel.share(list(range(count))))
    assert [item for share in shares for item in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("kind", ["configuration", "checkpoint", "demonstrations"])
def test_ranks_that_begin_with_other_files_say_which(tmp_path, monkeypatch, kind):
    """A machine may have an older copy of the run, or of the data: each rank would go on from its own."""

    def gather(mine):
        return [mine, mine | {kind: "another"}] if isinstance(mine, dict) else [mine]

    monkeypatch.setattr(sasr.parallel, "gather", gather)
    with pytest.raises(ValueError, match=f"rank 1 has another {kind} than rank 0"):
        sasr.train(sasr.Config(**TINY | {"out": str(tmp_path / "run")}))
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------- whole runs

RUN = ["--task", "countdown:train_size=40,test_size=6", "--ood-task", "none", "--device", "cpu", "--layers", "2"]
RUN += ["--hidden-size", "16", "--heads", "2", "--vocab-size", "300", "--warmup-steps", "4", "--group-size", "4"]
RUN += ["--prompts-per-step", "3", "--max-new-tokens", "12", "--eval-examples", "5", "--save-every", "5"]
RUN += ["--controller", "alternate", "--decay-fraction", "0", "--eval-every", "0"]


def torchrun(*flags, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ALONE}
    return subprocess.Popen([*TORCHRUN, str(ROOT / "sasr.py"), *map(str, flags)], **pipes | options)


def own_lines(stderr: str) -> list[str]:
    """Without torchrun's own, which have a time or a frame."""
    return [line for line in stderr.splitlines() if line.startswith("sasr.py:")]


def wait_for_step(out: Path, step: int) -> None:
    """Until so many lines are in the metrics."""
    for _ in range(1200):
        if (out / "metrics.jsonl").is_file() and len(RunFolder(out).records()) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} after a minute")


def same_steps(out: Path, other: Path) -> None:
    found = [[{k: v for k, v in r.items() if k != "seconds"} for r in RunFolder(o).records()] for o in (out, other)]
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    run = torchrun(*RUN, "--steps", 30, "--out", out)
    stdout, stderr = run.communicate()
    assert run.returncode == 0, stderr
    assert stdout.count("written to") == 1  # rank 0 alone speaks
    return out


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--gamma", "-1"], "sasr.py: --gamma -1.0: must be"),
        (["--data", "/nowhere", "--task", "gsm8k"], "sasr.py: "),
        (["--shard", "--compile"], "sasr.py: --compile: not with --shard"),
    ],
)
def test_bad_input_is_one_line_of_one_process(tmp_path, flags, line):
    run = torchrun(*flags, "--device", "cpu", "--out", tmp_path / "x")
    _, stderr = run.communicate()
    found = own_lines(stderr)
    assert len(found) == 1, stderr
    assert found[0].startswith(line)
    assert run.returncode != 0
    assert not (tmp_path / "x").exists()


@pytest.mark.nightly
def test_a_folder_in_use_is_told_by_rank_0_alone(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/file").touch()
    run = torchrun(*RUN, "--out", tmp_path / "x")
    _, stderr = run.communicate()
    assert len(own_lines(stderr)) == 1, stderr
    assert "is not empty" in own_lines(stderr)[0]
    assert os.listdir(tmp_path / "x") == ["file"]


@pytest.mark.nightly
def test_a_verifier_that_stops_one_rank_ends_the_run_with_its_line(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text("def score(completion, example):\n    return 1 / (len(completion) % 5)\n")
    flags = ["--reward", f"{file}:score", "--reward-on-error", "stop", "--eval-examples", 1, "--out", tmp_path / "x"]
    run = torchrun(*RUN, *flags)
    _, stderr = run.communicate()
    assert len(own_lines(stderr)) == 1, stderr
    assert "ZeroDivisionError" in own_lines(stderr)[0]


@pytest.mark.nightly
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_in_an_evaluation_in_shards_says_why(tmp_path, rank):
    """After a step, where one process saves; the others could not help to put the weights together."""
    file, after = tmp_path / "rewards.py", 3  # more answers than a rank has in the first evaluation
    lines = ["import os", "calls = []", "def score(completion, example):", "    calls.append(1)"]
    lines += [f"    return 1 / (os.environ['RANK'] != '{rank}' or len(calls) <= {after})"]
    file.write_text("\n".join(lines) + "\n")
    flags = ["--reward", f"{file}:score", "--reward-on-error", "stop", "--shard", "--out", tmp_path / "x"]
    run = torchrun(*RUN, *flags)
    _, stderr = run.communicate(timeout=60)
    assert len(own_lines(stderr)) == 1, stderr
    assert "ZeroDivisionError" in own_lines(stderr)[0]


@pytest.mark.nightly
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_ends_the_step_and_saves(tmp_path, undisturbed, number):
    out = tmp_path / "run"
    run = torchrun(*RUN, "--steps", 30, "--out", out, start_new_session=True)
    wait_for_step(out, 6)
    os.killpg(run.pid, number)  # as a terminal does; torchrun then sends one more to each
    _, stderr = run.communicate()
    done = RunFolder(out).find_checkpoint().state["state"]["step"]
    assert 6 <= done < 34, stderr
    assert stderr.count("stopped after step") == 1
    again = torchrun("--resume", out)
    _, stderr = again.communicate()
    assert again.returncode == 0, stderr
    same_steps(out, undisturbed)


@pytest.mark.nightly
def test_a_killed_rank_ends_all_and_the_last_checkpoint_is_whole(tmp_path, undisturbed):
    out = tmp_path / "run"
    run = torchrun(*RUN, "--steps", 30, "--out", out)
    wait_for_step(out, 8)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text(encoding="ascii").split()
    ranks_of = {re.search(r"\0RANK=(\d)", Path(f"/proc/{pid}/environ").read_text()).group(1): pid for pid in children}
    os.kill(int(ranks_of["1"]), signal.SIGKILL)
    _, stderr = run.communicate()
    assert run.returncode != 0
    assert len(own_lines(stderr)) == 1, stderr
    assert "another rank is gone" in own_lines(stderr)[0]
    assert RunFolder(out).find_checkpoint().state["state"]["step"] in (5, 10)
    again = torchrun("--resume", out)
    _, stderr = again.communicate()
    assert again.returncode == 0, stderr
    same_steps(out, undisturbed)


@pytest.mark.nightly
@pytest.mark.parametrize("shard_first", [True, False])
def test_a_run_in_shards_goes_on_whole_and_the_other_way_round(tmp_path, undisturbed, shard_first):
    out = tmp_path / "run"
    first, second = ("--shard", "--no-shard") if shard_first else ("--no-shard", "--shard")
    run = torchrun(*RUN, "--steps", 6, first, "--out", out)
    run.communicate()
    assert run.returncode == 0
    assert not list(out.rglob("*.tmp"))
    again = torchrun("--resume", out, "--steps", 30, second)
    _, stderr = again.communicate()
    assert again.returncode == 0, stderr
    records, others = RunFolder(out).records(), RunFolder(undisturbed).records()
    for record, other in zip(records[:12], others[:12], strict=True):  # then rounding takes them apart
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=1e-4)
    assert len(records) == 34
    done = subprocess.run(
        [sys.executable, ROOT / "sasr.py", "--resume", out, "--steps", "31", "--no-shard"], env=ALONE, check=False
    )
    assert done.returncode == 0


@pytest.mark.nightly
def test_two_machines_are_two_agents_that_meet(tmp_path, undisturbed):
    out, meeting = tmp_path / "run", ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    meeting += ["--rdzv-endpoint", "localhost:29517", "--rdzv-id", "test"]
    command = [sys.executable, "-m", "torch.distributed.run", *meeting, str(ROOT / "sasr.py"), *RUN]
    command += ["--steps", "30", "--out", str(out)]
    agents = [subprocess.Popen(command, env=ALONE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    for agent in agents:
        agent.communicate(timeout=120)
        assert agent.returncode == 0
    same_steps(out, undisturbed)


@pytest.mark.nightly
def test_a_run_of_one_process_goes_on_in_two(tmp_path, undisturbed):
    out = tmp_path / "run"
    flags = [*RUN, "--steps", "6", "--out", str(out)]
    assert subprocess.run([sys.executable, ROOT / "sasr.py", *flags], env=ALONE, check=False).returncode == 0
    run = torchrun("--resume", out, "--steps", 30)
    _, stderr = run.communicate()
    assert run.returncode == 0, stderr
    for record, other in zip(RunFolder(out).records()[:12], RunFolder(undisturbed).records()[:12], strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=1e-4)
    assert len(RunFolder(out).records()) == 34


@pytest.mark.nightly
def test_steps_that_are_not_finite_are_dropped_by_all_and_end_the_run(tmp_path):
    flags = ["--warmup-lr", 1e6, "--max-grad-norm", 0, "--lr-warmup-steps", 0, "--eval-examples", 1]
    run = torchrun(*RUN, *flags, "--max-bad-steps", 2, "--out", tmp_path / "x")
    _, stderr = run.communicate()
    assert run.returncode != 0
    assert len(own_lines(stderr)) == 1, stderr
    assert "not finite (bad steps in a row: 2); its batch is in" in own_lines(stderr)[0]
    assert stderr.count("is dropped") == 1
    assert (tmp_path / "x/bad_batch.json").is_file()


@pytest.mark.nightly
def test_a_full_disk_ends_all_with_the_line_of_the_one_that_writes(tmp_path):
    out = tmp_path / "x"
    command = " ".join([*TORCHRUN, str(ROOT / "sasr.py"), *RUN, "--out", str(out)])
    shell = ["bash", "-c", f"ulimit -f 40; exec {command}"]  # no file may be larger than 40 KiB
    run = subprocess.run(shell, env=ALONE, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert len(own_lines(run.stderr)) == 1, run.stderr
    assert "File too large" in own_lines(run.stderr)[0]
    assert not list(out.rglob("*.tmp"))
