"""The pictures and tables show what the files say and name a folder that is no run; what is measured is not lost."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import transformers

import sasr
from benchmarks import compare, export, findings, kernels, methods, plot, record, rollout, step
from data import load_task


@pytest.fixture
def a_run(tmp_path):
    records = [
        {"step": 1, "phase": "warmup", "kind": "sft", "grad_norm": 2.0},
        {"step": 2, "phase": "warmup", "kind": "sft", "grad_norm": 1.0, "eval/accuracy": 0.25},
        {"step": 3, "phase": "adaptive", "kind": "grpo", "grad_norm": 9.0, "p_sft": 0.5, "reward_mean": 0.75}
        | {
            "all_right_fraction": 0.25,
            "all_wrong_fraction": 0.5,
            "truncated_fraction": 0.125,
            "unparsed_fraction": 0.75,
        },
        {"step": 4, "phase": "adaptive", "kind": "sft", "grad_norm": None, "p_sft": 0.4, "eval/accuracy": 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "summary.json").write_text(json.dumps({"g_warmup": 1.0, "accuracy_before": 0.125}))
    return tmp_path


def test_the_picture_shows_the_numbers(a_run):
    figure = plot.picture([a_run], width=1)
    decision, norms, rewards, accuracy, groups, completions = figure.axes
    assert decision.lines[1].get_xydata().tolist() == [[3, 0.5], [4, 0.4]]
    assert norms.lines[1].get_xydata().tolist() == [[1, 2.0], [2, 1.0]]  # SFT steps with a norm, not GRPO's
    assert norms.lines[2].get_ydata()[0] == 1.0
    assert rewards.lines[1].get_xydata().tolist() == [[3, 0.75]]
    assert accuracy.lines[0].get_xydata().tolist() == [[0, 12.5], [2, 25], [4, 50]]
    for axis, shares in (
        (groups, {"all right": 0.25, "all wrong": 0.5}),
        (completions, {"cut off": 0.125, "no answer": 0.75}),
    ):
        for label, share in shares.items():
            (line,) = (line for line in axis.lines if label in line.get_label())
            assert line.get_xydata().tolist() == [[3, share]]
    plt.close(figure)


def test_running_mean_by_hand():
    assert plot.smooth(plot.np.array([4.0, 2.0, 0.0, 6.0]), 2).tolist() == [4, 3, 1, 3]


def test_plot_writes_a_png(a_run, capsys):
    assert plot.main([str(a_run)]) == 0
    assert (a_run / "metrics.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.strip() == str(a_run / "metrics.png")


def test_compare_groups_seeds_and_gives_intervals_by_hand(tmp_path, capsys):
    for seed, (controller, warmup, final) in enumerate([("sasr", 0.4, 0.6), ("sasr", 0.5, 0.8), ("sft", 0.4, 0.5)]):
        summary = {"controller": controller, "task": "t", "seed": seed, "sft_steps": 10, "seconds": 60.0}
        summary |= {"accuracy_warmup": warmup, "accuracy_final": final}
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "config.json").write_text("{}")
        (tmp_path / str(seed) / "summary.json").write_text(json.dumps(summary))
    assert compare.main([str(tmp_path / name) for name in "012"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    table = json.loads(last)
    assert table["sasr on t"]["final"][0] == pytest.approx(70)
    assert table["sasr on t"]["final"][1] == pytest.approx(12.71 * 10)  # stdev of (60, 80) is 14.14, over sqrt(2) is 10
    assert table["sasr on t"]["least_gain"] == pytest.approx(20)
    assert table["sft on t"]["final"] == [pytest.approx(50), None]
    assert "70.0 ± 127.1" in lines[1]
    assert max(map(len, lines)) <= 120
    assert compare.main([str(tmp_path / name) for name in "00"]) == 2
    assert "a seed was given twice" in capsys.readouterr().err
    (tmp_path / "1/summary.json").unlink()
    assert compare.main([str(tmp_path / name) for name in "01"]) == 0
    captured = capsys.readouterr()
    assert "has not finished" in captured.err
    (tmp_path / "1/config.json").unlink()
    for left_out, reason in (({"accuracy": 0.5}, "trained nothing"), ({"controller": "sasr"}, "was not evaluated")):
        (tmp_path / "1/summary.json").write_text(json.dumps(left_out))
        assert compare.main([str(tmp_path / name) for name in "01"]) == 0
        assert f"1 {reason} and is left out" in capsys.readouterr().err
    assert compare.main([str(tmp_path / "0")]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["sasr on t"]["seeds"] == [0]


@pytest.mark.parametrize("tool", [plot, compare])
def test_a_folder_that_is_no_run_is_named(tool, tmp_path, capsys):
    assert tool.main([str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err


def test_the_phases_of_a_step_add_up_and_uncounted_steps_are_left_out():
    request = {"uncounted": 1, "device": "cpu"}
    result = step.result_of([9.0, 2.0, 4.0, 3.0], [900, 10, 20, 30], {"rollout": 3.0, "rewards": 1.5}, request)
    assert result["seconds"] == 3
    assert result["tokens"] == 20
    assert result["phases"] == pytest.approx({"rollout": 1, "rewards": 0.5, "update": 1.5})


def test_every_text_gets_a_reward_of_its_own():
    task = load_task("countdown", train_size=4, test_size=1)
    example = task.train[0]
    good, bad = (step.reward_of(task, text, example) for text in (example.demonstration, "no answer"))
    assert task.grade(example.demonstration, example).reward == 1 <= good < 2
    assert 0 < bad < 1
    assert len({step.reward_of(task, f"no answer {i}", example) for i in range(50)}) > 40


REQUEST = {"steps": 2, "uncounted": 1, "inner_updates": 2, "device": "cpu", "max_new_tokens": 5, "profile": False}


@pytest.mark.nightly
def test_the_peer_takes_the_same_step(tmp_path, monkeypatch):
    """It hooks into private methods of the peer, which may move."""
    pytest.importorskip("trl")
    monkeypatch.setitem(step.TASKS, "small", {"task": "countdown:train_size=64,test_size=1", "warmup_steps": 2})
    request = step.make_checkpoint("small", tmp_path / "model", "cpu") | REQUEST
    ours, theirs = (step.in_child(step.__file__, engine, request) for engine in step.ENGINES)
    assert list(ours["phases"]) == list(theirs["phases"]) == ["rollout", "rewards", "log-probs", "update"]
    assert theirs["tokens"] == pytest.approx(ours["tokens"], rel=0.1)
    assert theirs["seconds"] > 0


def test_both_engines_start_from_one_checkpoint(tmp_path, monkeypatch):
    """A short run of what the benchmark does, and transformers opens what the peer is given."""
    monkeypatch.setitem(step.TASKS, "small", {"task": "countdown:train_size=64,test_size=1", "warmup_steps": 2})
    shared = step.make_checkpoint("small", tmp_path / "model", "cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(shared["model"])
    assert transformers.AutoTokenizer.from_pretrained(shared["model"]).eos_token_id == theirs.config.eos_token_id
    request = shared | REQUEST
    result = step.of_this_project(request)
    assert list(result["phases"]) == ["rollout", "rewards", "log-probs", "update"]
    assert all(seconds > 0 for seconds in result["phases"].values())
    assert 0 < result["tokens"] <= 8 * 8 * 5


# ----------------------------------------------------------------------------- rows as they come

SCRIPTS = Path(step.__file__).parent


def test_a_measurement_is_a_row_and_one_that_fails_is_too(monkeypatch, capsys):
    monkeypatch.setattr(rollout, "in_child", lambda script, *request: rollout.measure(*request))
    options = ["--device", "cpu", "--shapes", "tiny", "--repeats", "1", "--no-peers"]
    assert rollout.main(options) == 0
    captured = capsys.readouterr()
    (row,) = map(json.loads, captured.out.splitlines())
    assert (row["benchmark"], row["shape"], row["engine"]) == ("rollout", "tiny", "this project")
    assert row["tokens_per_second"] > 0
    assert "tokens/s" in captured.err

    monkeypatch.setattr(rollout, "in_child", lambda script, *request: {"error": "ValueError: x"})
    for options in ([], ["--no-peers"], ["--curve"]):
        assert rollout.main(["--device", "cpu", "--shapes", "tiny", *options]) == 1
        assert all(json.loads(line)["error"] == "ValueError: x" for line in capsys.readouterr().out.splitlines())


def test_a_peer_that_is_missing_is_named_and_does_not_fail_the_kernels(capsys):
    def missing(*_):
        raise ImportError("no such package")

    def ours(hidden, weight, targets, temperature):
        return (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]

    device = kernels.torch.device("cpu")
    assert kernels.compare({}, 4, 9, 3, 1.0, device, {kernels.OURS: ours, "peer": missing})
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0]["both_ms"] > 0
    assert rows[1]["error"] == "ImportError: no such package"
    assert not kernels.compare({}, 4, 9, 3, 1.0, device, {kernels.OURS: missing})


def start(tmp_path: Path, limit: float, script: str) -> subprocess.Popen:
    command = [sys.executable, SCRIPTS / "record.py", tmp_path / "card", "part", str(limit), "sh", "-c", script]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def part_of(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "card.json").read_text())["part"]


ROW = """echo 'a table'; echo '{"ms": 3}'; """


@pytest.mark.parametrize(
    ("limit", "script", "result"),
    [
        (9, ROW, "ok"),
        (9, ROW + "echo oh >&2; exit 3", "failed with code 3"),
        (0.2, ROW + "exec sleep 9", "cut off at 0.2 s"),
        (0.2, ROW + "sleep 9 & wait", "cut off at 0.2 s"),
        (0, ROW, "not begun: no time was left"),
    ],
)
def test_a_part_is_recorded_however_it_ends(limit, script, result, tmp_path):
    process = start(tmp_path, limit, script)
    shown, _ = process.communicate(timeout=9)
    part = part_of(tmp_path)
    assert part["result"] == result
    assert part["rows"] == ([{"ms": 3}] if limit else [])
    assert process.returncode == (result != "ok")
    assert (tmp_path / "card.log").read_text() == shown
    if "oh" in script:
        assert part["tail"] == ["a table", "oh"]


@pytest.mark.parametrize(
    ("number", "result"), [(signal.SIGTERM, "stopped from outside by SIGTERM"), (signal.SIGKILL, "unfinished")]
)
def test_what_was_measured_outlives_the_recorder(number, result, tmp_path):
    process = start(tmp_path, 1, ROW + "sleep 0.1; echo end; exec sleep 9")
    while process.stdout.readline() != "end\n":
        pass
    process.send_signal(number)
    process.communicate(timeout=9)
    assert part_of(tmp_path)["result"] == result
    assert part_of(tmp_path)["rows"] == [{"ms": 3}]
    assert "a table" in (tmp_path / "card.log").read_text()


def test_a_second_part_is_added_to_the_first_and_a_repeated_one_takes_its_place(tmp_path):
    for name, text in (("a", '{"x": 1}'), ("b", '{"x": 2}'), ("a", "[3]")):
        record.main([str(tmp_path / "card"), name, "9", "echo", text])
    parts = json.loads((tmp_path / "card.json").read_text())
    assert {name: part["rows"] for name, part in parts.items()} == {"a": [], "b": [{"x": 2}]}


def run_gpu_sh(tmp_path: Path, *arguments: str, seconds: int) -> subprocess.CompletedProcess:
    given = {"PYTHON": sys.executable, "OUT": str(tmp_path), "GPU_SH_DEVICE": "cpu", "GPU_SH_SECONDS": str(seconds)}
    command = ["bash", str(SCRIPTS / "gpu.sh"), *arguments]
    return subprocess.run(command, env=os.environ | given, capture_output=True, text=True, check=False)


def test_gpu_sh_says_of_each_part_that_no_time_was_left(tmp_path):
    assert run_gpu_sh(tmp_path, "--peers", seconds=0).returncode == 1
    parts = json.loads((tmp_path / "cpu-peers.json").read_text())
    assert list(parts) == ["kernels", "step", "memory", "rollout"]
    assert {part["result"] for part in parts.values()} == {"not begun: no time was left"}
    done = run_gpu_sh(tmp_path, "--peer", seconds=0)
    assert (done.returncode, "unknown argument --peer" in done.stderr) == (2, True)


@pytest.mark.nightly
@pytest.mark.parametrize("arguments", [(), ("--peers",)], ids=["alone", "peers"])
def test_gpu_sh_rehearses_on_a_cpu(arguments, tmp_path):
    done = run_gpu_sh(tmp_path, *arguments, seconds=2000)
    parts = json.loads((tmp_path / f"cpu{'-peers' * bool(arguments)}.json").read_text())
    assert {name: part["result"] for name, part in parts.items()} == dict.fromkeys(parts, "ok")
    assert all(part["rows"] for part in parts.values())
    if not arguments:
        for name in ("rollout", "step"):
            (row,) = parts[name]["rows"]
            assert {"aten::mm", "aten::cat"} <= {operation for operation, calls, ms in row["profile"]["operations"]}
    assert done.returncode == 0


# ----------------------------------------------------------------------------- other people's tools

NAMED = {  # what the two tools are given of `a_run`, by step
    1: {"decision/sft": 1.0, "sft/grad_norm": 2.0},
    2: {"decision/sft": 1.0, "sft/grad_norm": 1.0, "eval/accuracy": 0.25},
    3: {"decision/sft": 0.0, "decision/p_sft": 0.5, "grpo/grad_norm": 9.0, "grpo/reward_mean": 0.75}
    | {"grpo/all_right_fraction": 0.25, "grpo/all_wrong_fraction": 0.5}
    | {"grpo/truncated_fraction": 0.125, "grpo/unparsed_fraction": 0.75},
    4: {"decision/sft": 1.0, "decision/p_sft": 0.4, "eval/accuracy": 0.5},  # its norm was null
}


def test_a_csv_file_is_read_back_as_the_metrics_without_what_is_null(a_run, tmp_path, capsys):
    assert export.main([str(a_run), "--to", "csv"]) == 0
    assert capsys.readouterr().out.strip() == str(a_run / "metrics.csv")
    assert export.main([str(a_run), "--to", "csv", "--out", str(tmp_path / "x.csv")]) == 0  # and again, over the first
    assert (tmp_path / "x.csv").read_bytes() == (a_run / "metrics.csv").read_bytes()
    with (a_run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:4] == ["step", "phase", "kind", "grad_norm"]
    for row, logged in zip(rows, compare.read_metrics(a_run), strict=True):
        kept = {key: str(value) for key, value in logged.items() if value is not None}
        assert {key: text for key, text in row.items() if text} == kept


class Fake:
    """Stands for a package that need not be installed: remembers what it is told."""

    def __init__(self, *args, **kwargs):
        self.given, self.points = (args, kwargs), {}
        Fake.last = self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def add_scalar(self, name, value, step):
        self.points.setdefault(step, {})[name] = value

    def log(self, values, step):
        self.points[step] = values


def test_tensorboard_gets_a_metric_by_the_kind_of_its_step(a_run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Fake))
    assert export.main([str(a_run), "--to", "tensorboard"]) == 0
    assert Fake.last.given == ((str(a_run / "tensorboard"),), {})
    assert Fake.last.points == NAMED
    assert Fake.last.closed
    (a_run / "tensorboard").mkdir()
    (a_run / "tensorboard/events").touch()
    capsys.readouterr()
    assert export.main([str(a_run), "--to", "tensorboard"]) == 2
    assert "tensorboard is not empty: delete it, or name another place by --out" in capsys.readouterr().err


def test_wandb_gets_kind_and_configuration_too_and_no_network(a_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=Fake))
    (a_run / "config.json").write_text('{"gamma": 2.0}')
    assert export.main([str(a_run), "--to", "wandb", "--out", str(tmp_path / "new")]) == 0
    (_, given), points = Fake.last.given, Fake.last.points
    assert (given["mode"], given["config"], given["name"]) == ("offline", {"gamma": 2.0}, a_run.name)
    assert Path(given["dir"]).is_dir()
    assert [(p.pop("phase"), p.pop("kind")) for p in points.values()][1:3] == [("warmup", "sft"), ("adaptive", "grpo")]
    assert points == NAMED


@pytest.mark.parametrize(("tool", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_tool_that_is_not_installed_is_named_in_one_line(tool, module, a_run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert export.main([str(a_run), "--to", tool]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"export.py: --to {tool}: ")
    assert line.endswith(f"; pip install {tool}")


@pytest.mark.parametrize("metrics", [None, "", "[1]\n", "[" * 10**5, '{"step": 1}\n', "\ud800"])
def test_what_is_no_run_is_exported_to_nothing(metrics, tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    if metrics is not None:
        file.write_bytes(metrics.encode(errors="surrogatepass"))
    assert export.main([str(tmp_path), "--to", "csv"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(file) in line
    assert not (tmp_path / "metrics.csv").exists()


# ---- The study -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_study(tmp_path, monkeypatch):
    """Two runs of three steps each, in this process; returns the command lines that were run."""
    size = {"layers": 1, "hidden_size": 32, "heads": 2, "vocab_size": 300, "max_new_tokens": 8, "sft_batch_size": 4}
    main = {"task": "knights-knaves:train_size=40,test_size=8", "warmup_steps": 2, "ood_task": "none"} | size
    monkeypatch.setattr(methods, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(methods, "RESULTS", tmp_path / "methods.jsonl")
    monkeypatch.setattr(methods, "WARMUP", {"device": "cpu", "eval_every": 0, "eval_examples": 4, "steps": 0})
    monkeypatch.setattr(methods, "ADAPTIVE", {"steps": 3, "prompts_per_step": 2, "group_size": 2})
    jobs = [methods.Job("A", name, 7, {"controller": name, "lr": 1e-3}, main) for name in ("sft", "parallel")]
    monkeypatch.setitem(methods.STAGES, "A", lambda lines: jobs)
    commands = []

    def run(job, *flags):
        commands.append(list(map(str, flags)))
        if sasr.main(commands[-1]):
            raise RuntimeError(f"{job.name}: failed")

    monkeypatch.setattr(methods, "sasr", run)
    return commands


def test_a_study_takes_each_run_once_from_one_warmup(tiny_study, capsys):
    assert methods.main(["A", "--list"]) == 0
    assert capsys.readouterr().out == "sft, seed 7\nparallel, seed 7\n"
    assert methods.main(["A"]) == 0
    assert [command[0] for command in tiny_study] == ["--out", "--resume", "--resume"]
    lines = methods.finished()
    assert set(lines) == {("A", "sft", 7), ("A", "parallel", 7)}
    sft, parallel = lines.values()
    assert (sft["kinds"], parallel["kinds"], len(sft["p"])) == ("sss", "mmm", 3)
    assert sft["curves"]["eval/accuracy"][0] == parallel["curves"]["eval/accuracy"][0]  # after the warm-up
    assert parallel["curves"]["mixed/sft_share"] == [[10, 0.5, 3]]
    assert not any(str(methods.RUNS) in json.dumps(line) for line in lines.values()), "a line names a machine's path"
    assert "parallel" in capsys.readouterr().out
    assert methods.main(["A"]) == 0
    assert len(tiny_study) == 3, "what is in is not taken again"


@pytest.mark.parametrize("workers", [1, 2])
def test_what_follows_from_another_run_waits_for_it(tiny_study, monkeypatch, workers):
    """And is sampled at the end, as is the warm-up, once."""
    monkeypatch.setattr(methods, "EXAMPLES", 8)
    monkeypatch.setattr(methods, "SAMPLES", 2)
    setting = methods.STAGES["A"]({})[0].setting

    def plan(lines):
        names = {name: {"lr": 1e-3} for name in ("sasr", "random", "replay")}
        return methods.side_by_side("A", 7, setting, names, lines)

    monkeypatch.setitem(methods.STAGES, "A", plan)
    assert [job.adaptive is None for job in plan({})] == [False, True, True]
    assert methods.main(["A", "--jobs", str(workers)]) == 0
    lines = methods.finished()
    of_sasr, of_random, of_replay = (lines["A", name, 7] for name in ("sasr", "random", "replay"))
    assert of_random["config"]["sft_fraction"] == round(of_sasr["kinds"].count("s") / 3, 4)
    assert of_random["p"] == [of_random["config"]["sft_fraction"]] * 3
    assert sorted(of_replay["p"]) == sorted(of_sasr["p"])
    assert [command[0] for command in tiny_study].count("--eval-only") == 4
    assert {"accuracy", "pass@1", "pass@2"} <= set(of_sasr["sampled_final"])
    assert of_sasr["sampled_warmup"] == of_random["sampled_warmup"]
    assert all(job.is_that_of(lines[job.key]) for job in plan(lines))
    of_sasr["kinds"] = "sss" if of_sasr["kinds"] != "sss" else "ggg"  # as if it had been taken again
    assert [job.is_that_of(lines[job.key]) for job in plan(lines)] == [True, False, True]
    of_sasr["p"] = [0.25, 0.5, 0.75]
    assert [job.is_that_of(lines[job.key]) for job in plan(lines)] == [True, False, False]
    assert not any(str(methods.RUNS) in json.dumps(line) for line in lines.values()), "a line names a machine's path"


def test_runs_that_a_stage_plans_after_its_tuning_are_taken_by_all_workers(tiny_study, monkeypatch):
    """Stage F knows its rates, and so its other runs, when the last tuning run has ended."""
    tuning, *others = (methods.Job("A", name, 7, {"controller": "sft"}) for name in ("tuning", "one", "two"))
    monkeypatch.setitem(methods.STAGES, "A", lambda lines: [tuning, *others] if tuning.key in lines else [tuning])
    at_once = threading.Barrier(2, timeout=60)

    def take(job):
        if job in others:
            at_once.wait()
        else:
            time.sleep(0.3)  # the other worker finds nothing to do
        return {"stage": "A", "name": job.name, "seed": 7, "config": job.flags, "summary": {"accuracy_final": 0.5}}

    monkeypatch.setattr(methods, "take", take)
    monkeypatch.setattr(methods, "table", lambda *_: "")
    assert methods.main(["A", "--jobs", "2"]) == 0


def test_nobody_waits_for_a_run_that_failed(tiny_study, monkeypatch, capsys):
    setting = methods.STAGES["A"]({})[0].setting
    names = {name: {"lr": -1.0} for name in ("sasr", "random")}
    monkeypatch.setitem(methods.STAGES, "A", lambda lines: methods.side_by_side("A", 7, setting, names, lines))
    assert methods.main(["A", "--jobs", "2"]) == 1
    assert "sasr: failed" in capsys.readouterr().err
    assert methods.finished() == {}


def test_a_study_goes_on_after_a_run_that_failed(tiny_study, capsys):
    methods.STAGES["A"]({})[0].adaptive["lr"] = -1.0
    assert methods.main(["A"]) == 1
    assert "sft: failed" in capsys.readouterr().err
    assert set(methods.finished()) == {("A", "parallel", 7)}
    methods.STAGES["A"]({})[0].adaptive["lr"] = 1e-3
    assert methods.main(["A"]) == 0
    assert set(methods.finished()) == {("A", "sft", 7), ("A", "parallel", 7)}


def test_a_line_of_other_flags_is_not_that_of_the_run(tiny_study):
    assert methods.main(["A"]) == 0
    methods.STAGES["A"]({})[0].adaptive["lr"] = 2e-3
    assert methods.main(["A"]) == 0
    assert [command[0] for command in tiny_study] == ["--out", "--resume", "--resume", "--resume"]
    assert methods.finished()["A", "sft", 7]["config"]["lr"] == 2e-3  # the last line counts


def test_the_results_of_a_study_name_a_line_that_is_none(tiny_study):
    methods.RESULTS.write_text('{"stage": "A", "na')
    with pytest.raises(SystemExit, match=r"methods.jsonl:1: not the line of a run"):
        methods.main(["A"])


def test_the_stage_of_rates_tunes_every_method_equally_often():
    jobs = methods.STAGES["A"]({})
    controllers = [job.adaptive["controller"] for job in jobs]
    assert {controllers.count(name) for name in controllers} == {6}
    assert len({job.key for job in jobs}) == len(jobs)
    for job in jobs:
        sasr.Config(**job.flags)


RUNS_OF = {"A": 42, "A2": 30, "B": 30, "D": 72, "E": 32, "F": 35, "G": 12, "H": 8, "H2": 8, "I": 18, "default": 24}


@pytest.mark.parametrize(("stage", "runs"), RUNS_OF.items())
def test_a_stage_plans_runs_that_differ_and_whose_flags_are_valid(stage, runs):
    """As if each run that may begin had ended, again and again, until none waits."""
    lines, waiting = {}, 1
    while waiting:
        jobs = methods.STAGES[stage](lines)
        ready = [job for job in jobs if job.adaptive is not None]
        waiting = len(jobs) - len(ready) + sum(job.key not in lines for job in ready)
        for job in ready:
            p = sorted(job.replay) or [0.25] * 2 + [0.75]
            lines[job.key] = {
                "config": job.flags,
                "kinds": "sgg",
                "p": p,
                "summary": {"accuracy_final": job.adaptive.get("lr")},
            }
            assert job.is_that_of(lines[job.key])
            sasr.Config(**job.flags | ({"replay": "runs/x"} if job.replay else {}))
    assert len({job.key for job in jobs}) == len({job.out for job in jobs}) == len(jobs) == runs
    developed = [job.seed in methods.DEVELOPMENT for job in jobs]
    assert all(developed) == (stage in ("A", "A2", "B"))
    assert any(developed) == (stage in ("A", "A2", "B", "F"))
    if stage == "F":  # where the higher rate was the better one
        assert {job.adaptive["lr"] for job in jobs if job.name == "grpo"} == {3 * methods.RATES["grpo"]["lr"]}


def test_the_stage_of_the_default_runs_the_default():
    for job in methods.STAGES["default"]({}):
        aside = ("seed", "device", "ood_task", "eval_every", "save_every", "controller")
        assert sasr.Config(**job.flags) == sasr.Config(**{key: job.flags[key] for key in aside})


def test_means_over_windows_by_hand():
    records = [{"step": 1, "x": 1.0}, {"step": 10, "x": 4.0}, {"step": 11, "x": 3.0}, {"step": 12}]
    assert methods.windows(records, "x") == [[10, 2.5, 2], [20, 3.0, 1]]


def test_statistics_by_hand():
    assert findings.sign_flip([1.0, 2.0, 3.0]) == 2 / 8  # all signs alike, either way
    assert findings.sign_flip([1.0, -1.0]) == 1
    assert findings.sign_flip([3.0, 2.0, -1.0]) == 4 / 8  # |sum| is 4 or more for +++, ++- and their opposites
    assert findings.rank_correlation([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(0.8)
    assert findings.rank_correlation([1, 2, 2, 4], [5, 6, 6, 7]) == pytest.approx(1)
    assert findings.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)


def line_of(seed, end, **curves):
    """Two warm-up steps in a window of their own, then windows that end with steps 20 and 30."""
    summary = {"warmup_steps": 10, "accuracy_warmup": 0.25, "accuracy_final": end, "seconds": 200.0}
    summary |= {"seconds_eval": 20.0, "seconds_warmup": 60.0}
    config = {"steps": 100, "task": "x", "warmup_task": ""}
    return {"seed": seed, "summary": summary, "curves": curves, "config": config}


def test_figures_of_a_run_by_hand():
    curves = {"sft/tokens_trained": [[10, 99.0, 10], [20, 30.0, 4]], "sft/tokens_read": [[10, 99.0, 10], [20, 50.0, 4]]}
    curves |= {"sft/tokens": [[20, 30.0, 4]], "grpo/tokens": [[20, 60.0, 6]]}
    curves |= {"grpo/tokens_trained": [[20, 40.0, 6]], "grpo/tokens_read": [[20, 70.0, 6]]}
    found = findings.figures(line_of(0, 0.5, **curves))
    by_hand = {"warm-up": 25, "end": 50, "gain": 25, "SFT": 100 * 120 / 360, "minutes": 2}
    assert found == pytest.approx(by_hand | {"passes": (600 + 360 + 1260) / 1e6})
    mixed = {
        "mixed/tokens": [[20, 60.0, 10]],
        "mixed/tokens_sft": [[20, 10.0, 5]],
        "mixed/tokens_trained": [[20, 50.0, 10]],
    }
    sampled = line_of(0, 0.5, **mixed) | {"sampled_warmup": {"accuracy": 0.3}}
    sampled["sampled_final"] = {"accuracy": 0.4, "pass@8": 0.7, "accuracy_ood": 0.2}
    found = findings.figures(sampled)
    assert [found[key] for key in ("end", "gain", "pass@8", "ood", "SFT")] == pytest.approx([40, 10, 70, 20, 10])


def test_accuracy_at_equal_work_lies_on_the_curve():
    curves = {"sft/tokens_read": [[10, 9.0, 10], [20, 10.0, 10], [30, 10.0, 5]], "grpo/tokens": [[30, 20.0, 5]]}
    curves["eval/accuracy"] = [[0, 0.1], [10, 0.2], [20, 0.3], [30, 0.5]]  # after 0, 300, 300 + 150 + 100 passes
    line = line_of(0, 0.5, **curves)
    found = [findings.accuracy_after(line, passes) for passes in (0, 150, 300, 425, 550, 900)]
    assert found == pytest.approx([20, 25, 30, 40, 50, 50])


def test_differences_are_between_runs_of_one_seed():
    def found(stage, **runs):
        curve = {"eval/accuracy": [[10, 0.25], [30, 0.5]]}
        groups = {name.replace("_", " "): [line_of(*run, **curve) for run in some] for name, some in runs.items()}
        return findings.differences(findings.by_seed(groups, stage), stage)

    of_e = found("E", sasr=[(0, 0.5), (1, 0.6)], grpo=[(1, 0.5), (2, 0.1)], sasr_of_50=[(0, 0.1)], sft_of_50=[(0, 0.4)])
    bases = {"grpo": "sasr", "after the warm-up": "sasr"}
    bases |= {"sft of 50": "sasr of 50", "after the warm-up of 50": "sasr of 50"}
    assert {name: of["base"] for name, of in of_e.items()} == bases
    assert of_e["sft of 50"]["mean"] == pytest.approx(-30)
    assert (of_e["after the warm-up"]["least"], of_e["after the warm-up"]["most"]) == pytest.approx((25, 35))
    of_grpo = of_e["grpo"]
    assert (of_grpo.pop("half"), of_grpo.pop("equal_half")) == (None, None)
    by_hand = {"base": "sasr", "seeds": 1, "mean": 10, "least": 10, "most": 10, "sign_flip_p": 1, "equal": 0}
    assert of_grpo == pytest.approx(by_hand)
    of_b = found("B", as_in_A=[(0, 0.5)], sasr=[(0, 0.25)])
    assert list(of_b) == ["sasr", "after the warm-up"]
    assert (of_b["sasr"]["base"], of_b["sasr"]["mean"]) == ("as in A", 25)


def test_means_and_intervals_over_seeds():
    curve = {"eval/accuracy": [[10, 0.25], [30, 0.5]]}
    runs = [line_of(seed, end, **curve) for seed, end in enumerate((0.5, 0.6, 0.7))]
    found = findings.means(findings.by_seed({"sasr": runs}, "D"))
    assert found["after the warm-up"] == {"seeds": 3, "end": 25, "half": 0, "worst": 25}
    found = found["sasr"]
    assert found["end"] == pytest.approx(60)
    assert found["half"] == pytest.approx(4.30 * 10 / 3**0.5)
    assert (found["worst"], found["seeds"], found["gain"], found["least"]) == pytest.approx((50, 3, 35, 25))
    row = findings.table({"sasr": found}).splitlines()[1].split()
    assert row[:6] == ["sasr", "3", "60.0", "±", "24.8", "50.0"]


def test_the_spread_of_the_norm_at_fixed_weights(monkeypatch, capsys):
    line = {"seed": 3, "norms": [1.0, 2.0, 3.0], "summary": {"g_warmup": 0.5}}
    monkeypatch.setattr(findings, "results", lambda stage: {"fixed weights": [line]})
    assert findings.main(["B"]) == 0  # though there is nothing else yet
    assert "seed 3: 3 batches" in capsys.readouterr().out
    row = findings.spread([line]).splitlines()[1]
    assert (
        row == "  seed 3: 3 batches, mean 2.00, standard deviation 1.00, 1.00 to 3.00; the last of the warm-up was 0.50"
    )


def test_early_signs_are_means_over_the_first_tenth_of_the_steps():
    curves = {"sft/grad_norm": [[10, 9.0, 10], [20, 2.0, 3], [30, 5.0, 1]], "sft/loss": [[10, 0.5, 3]]}
    curves["mixed/grad_norm_sft"] = [[20, 4.0, 1]]
    line = line_of(0, 0.5, **curves)
    assert findings.early(line, "SFT norm") == pytest.approx(2.5)
    assert findings.early(line, "SFT loss") is None  # only before the first adaptive step


def test_early_signs_are_ranked_among_the_runs_of_one_warmup_or_of_one_method(monkeypatch):
    def run(seed, name, norm, end):
        losses = {} if name == "c 1e-4" else {"sft/loss": [[20, -norm, 9]]}
        return line_of(seed, end, **{"sft/grad_norm": [[20, norm, 9]]} | losses) | {"name": name}

    first = [
        run(0, "a 1e-4 5e-5", 1, 0.5),
        run(0, "b 1e-4", 2, 0.6),
        run(0, "c 1e-4", 3, 0.7),
        run(0, "a 2e-4", 4, 0.8),
    ]
    second = [
        run(1, name, norm, end) for name, norm, end in zip("abca", (9, 8, 7, 6), (0.1, 0.3, 0.2, 0.4), strict=True)
    ]
    runs = first + second + [run(2, "a", 9, 0.1)]
    monkeypatch.setattr(findings, "results", lambda stage: {"sasr": runs} if stage == "B" else {})
    rows = findings.early_signs(("A", "B")).splitlines()[1:]
    assert [row.split("  ", 1)[0] for row in rows] == [
        "B, among the runs of a warm-up",
        "B, among the runs of a method",
    ]
    assert rows[0].endswith("8 runs in 2: 0.10 (-0.80 to 1.00)" + "4 runs in 1: 0.80 (0.80 to 0.80)".rjust(38))
    ranks = findings.rank_correlation([1, 4, 9, 6, 9], [0.5, 0.8, 0.1, 0.4, 0.1])  # those of a
    assert f"5 runs in 1: {ranks:.2f} ({ranks:.2f} to {ranks:.2f})" in rows[1]


def test_findings_and_a_picture_of_a_study(tiny_study, tmp_path, capsys):
    assert findings.main(["A"]) == 2
    assert capsys.readouterr().err.endswith("no run of stage A is in: python benchmarks/methods.py A\n")
    assert methods.main(["A"]) == 0
    capsys.readouterr()
    assert findings.main(["A"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:3]] == [["sft", "1"], ["parallel", "1"]]
    picture = tmp_path / "x.png"
    assert plot.main(["--stage", "A", "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert plot.main(["--stage", "A", "--methods", "sft,hpt", "--out", str(picture)]) == 2
    assert "--methods hpt: stage A has sft, parallel" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        plot.main(["--out", str(picture)])
    sft, parallel = findings.results("A")["sft"][0], findings.results("A")["parallel"][0]
    assert plot.decisions(sft) == {}  # three steps are no window
    assert plot.gain({0: 0.25, 50: 0.5}) == {0: 0, 50: 25}
    assert plot.curve(parallel, "sft/loss", "mixed/loss") == {8: pytest.approx(parallel["curves"]["mixed/loss"][0][1])}


def test_a_picture_of_a_study_names_the_other_tasks():
    tasks = "knights-knaves:width=3,train_size=1,test_size=128 countdown:numbers=4,train_size=1,test_size=8"
    lines = [{"config": {"ood_task": task}} for task in ("none", tasks)]
    assert plot.out_of_domain(lines) == {"ood": "knights-knaves:width=3", "ood2": "countdown:numbers=4"}
    assert plot.out_of_domain(lines[:1]) == {"ood": "another task", "ood2": "another task"}


def test_a_run_from_another_warmup_than_its_seed_is_named():
    def run(name, seed, loss, task="x"):
        curves = {"sft/loss": [[10, loss, 10], [20, 0.1 * len(name), 3]]}
        config, summary = {"task": task, "warmup_task": ""}, {"warmup_steps": 10}
        return {"name": name, "seed": seed, "config": config, "summary": summary, "curves": curves}

    groups = {"sasr": [run("sasr", 0, 0.5), run("sasr", 1, 0.6)], "sft": [run("sft", 0, 0.5), run("sft", 1, 0.6)]}
    groups["grpo"] = [run("grpo", 0, 0.5 + 1e-9), run("grpo", 1, 0.6), run("grpo", 2, 0.7), run("grpo", 0, 0.4, "y")]
    assert findings.strays(groups) == ["grpo, seed 0"]


def test_a_band_is_an_interval_or_what_lies_between_two_seeds():
    assert plot.ends([0.25]) == (0.25, 0.25)
    assert plot.ends([0.5, 0.25]) == (0.25, 0.5)
    half = 4.30 * 10 / 3**0.5  # Student's t with two degrees of freedom
    assert plot.ends([50, 60, 70]) == pytest.approx((60 - half, 60 + half), abs=0.01)
