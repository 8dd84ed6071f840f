"""The hot path: log-probs of drawn tokens, the GRPO loss, the exact KL.

`reference.py` defines the three functions in plain PyTorch. On CUDA they are Triton kernels: `logprob.py`, `grpo.py`
and `kl.py`. SASR_KERNELS=reference or SASR_KERNELS=triton chooses one of the two everywhere. Triton runs on CPU tensors
too, slowly, when TRITON_INTERPRET=1 is set: so the kernels are tested without a GPU.
"""

import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from . import reference as reference

CHOICE = os.environ.get("SASR_KERNELS", "auto")
if CHOICE not in ("auto", "reference", "triton"):
    raise ImportError(f"SASR_KERNELS={CHOICE!r}: choose from auto, reference, triton")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # once: find_spec searches the disk


def _implementation(tensor: Tensor, fused: str) -> ModuleType:
    """`reference`, or the module `fused` where a call on this tensor goes to Triton: fp64 is for checks only."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    on_card = tensor.is_cuda and tensor.dtype != torch.float64 and TRITON_INSTALLED and not interpreted
    if CHOICE == "triton" and not tensor.is_cuda and not interpreted:
        raise RuntimeError("SASR_KERNELS=triton needs tensors on CUDA; on a CPU set TRITON_INTERPRET=1 as well (slow)")
    if CHOICE == "triton" or (CHOICE == "auto" and on_card):
        return importlib.import_module(f".{fused}", __package__)
    return reference


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log pi(target) and the entropy of pi, both [N]; see `reference.token_logprobs`."""
    return _implementation(hidden, "logprob").token_logprobs(hidden, weight, targets, temperature)


def grpo_loss(
    logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor | None, advantages: Tensor, mask: Tensor, **options
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped objective of GRPO and its statistics; see `reference.grpo_loss`, also for the options."""
    function = _implementation(logprobs, "grpo").grpo_loss
    return function(logprobs, old_logprobs, ref_logprobs, advantages, mask, **options)


def exact_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    """KL(policy || reference) over the whole vocabulary, [N]; see `reference.exact_kl`."""
    return _implementation(hidden, "kl").exact_kl(hidden, weight, ref_hidden, ref_weight)
