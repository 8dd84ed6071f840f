"""The rooms: who imports whom, and what the code needs beside the standard library. Read from the files themselves."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("sasr", "baselines", "model", "rollout", "kernels", "data", "run")
BESIDE = ("tests", "benchmarks")  # may import everything

# What each room may import of ours, beside itself. A room stands for all of its files.
ARROWS = {
    "kernels": (),
    "baselines": (),
    "data": (),
    "model": ("data.files",),
    "rollout": ("model", "data"),
    "run": ("kernels", "baselines", "data", "model", "rollout"),
    "sasr": ROOMS,
}
OUTSIDE = {"torch", "numpy", "tokenizers", "safetensors", "triton", "huggingface_hub", "jinja2", "tqdm"}
OPTIONAL = {"math_verify"}  # only where it is asked for, so only inside a function


def files_of(room: str) -> list[Path]:
    file, folder = ROOT / f"{room}.py", ROOT / room
    return [file] if file.is_file() else sorted(folder.rglob("*.py"))


def imports_of(file: Path) -> list[tuple[str, bool]]:
    """(Dotted name, whether it is imported inside a function) of all that a file imports, relative names resolved."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    inner = {id(node) for outer in ast.walk(tree) if isinstance(outer, functions) for node in ast.walk(outer)}
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in inner) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join((*base, *filter(None, [node.module])))
            found += [(f"{name}.{alias.name}", id(node) in inner) for alias in node.names]
    return found


def is_within(name: str, allowed: str) -> bool:
    return f"{name}.".startswith(f"{allowed}.")


def test_every_room_is_there():
    assert all(files_of(room) for room in ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_among_the_rooms_go_one_way(room):
    allowed = (room, *ARROWS[room])
    for file in files_of(room):
        for name, _ in imports_of(file):
            if name.partition(".")[0] in (*ROOMS, *BESIDE):
                assert any(is_within(name, target) for target in allowed), f"{file.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_run_needs_few_packages(room):
    for file in files_of(room):
        for name, inside_function in imports_of(file):
            package = name.partition(".")[0]
            needed = package not in (*sys.stdlib_module_names, *ROOMS, *OUTSIDE)
            assert not needed or (package in OPTIONAL and inside_function), f"{file.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("room", ROOMS)
def test_one_process_does_without_what_several_need(room):
    for file in files_of(room):
        always = [node for node in ast.parse(file.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not any("torch.distributed" in ast.unparse(node) for node in always), file.relative_to(ROOT)


def test_reading_foreign_files_loads_no_task_and_no_torch():
    code = (
        "import sys, data.files; print([name for name in sys.modules if name.startswith('data.') or name == 'torch'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = ast.literal_eval(done.stdout)
    assert "data.files" in loaded
    tasks = ("countdown", "gsm8k", "knights_knaves", "knights_knaves_text", "competition_math", "latex", "jsonl")
    for module in (*(f"data.{task}" for task in tasks), "torch"):
        assert module not in loaded


def test_the_reader_of_imports_sees_them(tmp_path, monkeypatch):
    """What the tests above rest on."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    file = tmp_path / "data/x.py"
    file.write_text("import sasr\nfrom . import files\nfrom ..run import y\ndef f():\n    import math_verify as m\n")
    assert imports_of(file) == [("sasr", False), ("data.files", False), ("run.y", False), ("math_verify", True)]
