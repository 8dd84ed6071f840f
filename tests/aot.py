"""Compiles every kernel for cards that need not be there, and prints what each one takes of them.

    python tests/aot.py            # all of sm_80, sm_90, sm_100, gfx942
    python tests/aot.py sm_90

One line a compilation, then one JSON line. Compiling needs Triton and the assemblers it brings, and no card. It must
not run under TRITON_INTERPRET=1, which replaces kernels by Python functions; hence a program of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import grpo, kl, logprob
from kernels.tiles import candidates

# name: architecture (0: AMD), target, bytes of shared memory that one program may have
CARDS = {
    "sm_80": (80, GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": (90, GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (100, GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (0, GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
INTEGERS = ("N", "V", "D", "D_REF", "start", "split_width", "slab_width", "denominator_stride")
# Arguments that are multiples of 16 in real models, where Triton notices it at launch and loads wider.
ALIGNED = ("D", "D_REF", "slab_width")


def jobs(cards: list[str]) -> list[tuple]:
    """(card, kernel, dtype, tile or None) for everything that may be launched."""
    tiled = [(card, name, dtype) for card in cards for name in ("forward", "backward", "kl") for dtype in DTYPES]
    found = [
        (card, name, dtype, tile)
        for card, name, dtype in tiled
        for tile in candidates(CARDS[card][0], DTYPES[dtype], accumulators=2 if name == "kl" else 1)
    ]
    return found + [(card, "grpo", "fp32", None) for card in cards]


def source(card: str, name: str, dtype: str, tile) -> ASTSource:
    """What the launcher hands to the compiler, written by hand."""
    kernel = {"forward": logprob._forward, "backward": logprob._backward, "kl": kl._kl, "grpo": grpo._grpo}[name]
    architecture = CARDS[card][0]
    constants = {"REFERENCE": True, "BLOCK": grpo.BLOCK}
    blocks = {}
    if tile:
        constants = {"BLOCK_N": tile.tokens, "BLOCK_V": tile.vocabulary, "BLOCK_D": tile.features}
        constants |= {"TMA": architecture >= 90, "PRECISION": "tf32x3" if architecture else "ieee"}
        blocks = {"hidden": tile.tokens, "ref_hidden": tile.tokens}
        blocks |= {"weight": tile.vocabulary, "ref_weight": tile.vocabulary}

    def type_of(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument in blocks:
            return f"tensordesc<{dtype}[{blocks[argument]},{tile.features}]>" if constants["TMA"] else f"*{dtype}"
        if argument in INTEGERS:
            return "i32"
        if argument in ("inverse_temperature", "clip_low", "clip_high", "kl_coef"):
            return "fp32"
        return {"targets": "*i64", "slab": f"*{dtype}"}.get(argument, "*fp32")

    signature = {argument: type_of(argument) for argument in kernel.arg_names}
    place = {argument: (i,) for i, argument in enumerate(kernel.arg_names)}
    aligned = [a for a, kind in signature.items() if kind.startswith("*") or a in ALIGNED]
    return ASTSource(
        kernel,
        signature,
        {place[a]: value for a, value in constants.items()},
        {place[a]: [["tt.divisibility", 16]] for a in aligned},
    )


def compile_one(job: tuple) -> dict:
    """Registers a thread, bytes of shared memory a program, spilled bytes (AMD: registers) a thread."""
    card, name, dtype, tile = job
    _, target, limit = CARDS[card]
    options = {"num_warps": tile.warps, "num_stages": tile.stages} if tile else {}
    compiled = triton.compile(source(*job), target=target, options=options)
    use = (_use_of_cubin if target.backend == "cuda" else _use_of_amdgcn)(compiled.asm)
    shape = "x".join(map(str, tile)) if tile else "-"
    return (
        {"card": card, "kernel": name, "dtype": dtype, "tile": shape}
        | use
        | {
            "shared": compiled.metadata.shared,
            "limit": limit,
        }
    )


def _use_of_cubin(asm: dict) -> dict:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", report).groups()
    return {"registers": int(registers), "spills": int(stack) + int(local)}


def _use_of_amdgcn(asm: dict) -> dict:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", asm["amdgcn"]).group(1))

    return {"registers": field("vgpr_count"), "spills": field("vgpr_spill_count") + field("sgpr_spill_count")}


def main() -> None:
    cards = sys.argv[1:] or list(CARDS)
    if unknown := set(cards) - set(CARDS):
        sys.exit(f"{min(unknown)}: choose from {', '.join(CARDS)}")
    print(f"{'card':8}{'kernel':10}{'dtype':7}{'tile':18}{'registers':>10}{'shared':>9}{'of':>9}{'spills':>8}")
    rows = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for row in pool.map(compile_one, jobs(cards)):
            rows.append(row)
            print(
                f"{row['card']:8}{row['kernel']:10}{row['dtype']:7}{row['tile']:18}"
                f"{row['registers']:10}{row['shared']:9}{row['limit']:9}{row['spills']:8}",
                flush=True,
            )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
