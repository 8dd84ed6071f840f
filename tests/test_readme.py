"""The README's code runs, its files are there and as long as it says, its flags exist."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import sasr
from run.config import PRESETS, make_parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(marker):
    (found,) = (text for text in BLOCKS if marker in text)
    return found


def test_the_bare_loop_learns_with_both_kinds_of_step():
    names = {"__name__": "readme"}
    code = block("SasrController(")
    exec(compile("import torch\ntorch.manual_seed(0)\n" + code, "README.md", "exec"), names)
    controller, model, x, y = (names[name] for name in ("controller", "model", "x", "y"))
    assert len(controller.warmup_norms) == 20
    assert 0 < controller.sft_probability() < 1
    assert controller.g_last != controller.g_warmup  # SFT steps were taken after the warm-up
    torch = names["torch"]
    untrained = -torch.log(torch.tensor(0.25))
    assert -model(x).log_softmax(-1)[range(64), y].mean() < untrained - 0.1


def test_a_way_of_mixing_is_one_function_and_one_line(tmp_path):
    """In a copy of the code, whose baselines.py ends in what the README says; p_t falls in a straight line."""
    for name in ("sasr.py", "baselines.py", "model.py", "rollout.py"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("run", "data", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = block('SCHEDULES["linear"]')
    assert len(code.splitlines()) <= 10
    with (tmp_path / "baselines.py").open("a", encoding="utf-8") as file:
        file.write("\n\n" + code)
    flags = "--controller linear --task knights-knaves:train_size=20,test_size=4 --ood-task none --layers 1 --heads 1"
    flags += " --hidden-size 16 --warmup-steps 1 --steps 4 --prompts-per-step 1 --group-size 2 --max-new-tokens 4"
    line = [sys.executable, str(tmp_path / "sasr.py"), *flags.split(), "--device", "cpu", "--out", str(tmp_path / "x")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    metrics = (tmp_path / "x/metrics.jsonl").read_text()
    assert re.findall(r'"p_sft": ([\d.]+)', metrics) == ["1.0", "0.75", "0.5", "0.25"]


def test_the_reading_map_names_files_and_their_length():
    rows = re.findall(r"^\| (`[^|]*) \| ([\d,]+) \|", README, re.MULTILINE)
    assert len(rows) >= 8
    for names, count in rows:
        files = [
            file
            for name in re.findall(r"`([^`]+)`", names)
            for file in (sorted((ROOT / name).glob("*.py")) if name.endswith("/") else [ROOT / name])
        ]
        length = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
        assert abs(length - int(count.replace(",", ""))) <= 0.05 * length + 5, names


def test_what_the_readme_names_exists():
    known = {flag for action in make_parser(sasr.Config)._actions for flag in action.option_strings}
    known |= {"--shapes", "--prompt", "--upgrade", "--to", "--jobs"}  # of benchmarks, pip and rollout.py
    known |= {"--nproc-per-node", "--shutdown-timeout", "--create-dirs"}  # of torchrun and curl
    known |= set(re.findall("--[a-z]+", (ROOT / "benchmarks/gpu.sh").read_text()))
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", README):
        assert flag in known, flag
    for preset in PRESETS:
        assert f"`{preset}`" in README
    for file in re.findall(r"`((?:run|data|tests|benchmarks|kernels)/[\w./]*|\w+\.py)`", README):
        assert (ROOT / file).exists() or file == "my_reward.py", file
    for function in re.findall(r"`sasr\.(\w+)`", README):
        assert function == "py" or hasattr(sasr, function), function
