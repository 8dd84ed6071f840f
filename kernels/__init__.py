"""The hot path: log-probs of drawn tokens, the GRPO loss, the exact KL.

`reference.py` defines the three functions in plain PyTorch. On CUDA they are Triton kernels: `logprob.py`, `grpo.py`
and `kl.py`. SASR_KERNELS=reference or SASR_KERNELS=triton takes one or the other everywhere; Triton runs on CPU
tensors too, slowly, when TRITON_INTERPRET=1 is set, which is how the kernels are tested without a card.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from . import reference as reference

CHOICE = os.environ.get("SASR_KERNELS", "auto")
if CHOICE not in ("auto", "reference", "triton"):
    raise ImportError(f"SASR_KERNELS={CHOICE!r}: choose from auto, reference, triton")
TRITON_IS_THERE = importlib.util.find_spec("triton") is not None  # asked once: the answer takes a look at the disk


def _fused(tensor: Tensor) -> bool:
    """Whether a call on this tensor goes to Triton. There is no Triton outside Linux, and fp64 is for checks only."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if CHOICE == "auto":
        return tensor.is_cuda and tensor.dtype != torch.float64 and TRITON_IS_THERE and not interpreted
    if CHOICE == "triton" and not tensor.is_cuda and not interpreted:
        raise RuntimeError("SASR_KERNELS=triton needs tensors on CUDA; on a CPU set TRITON_INTERPRET=1 as well (slow)")
    return CHOICE == "triton"


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log pi(target) and the entropy of pi, both [N]; see `reference.token_logprobs`."""
    if _fused(hidden):
        from .logprob import token_logprobs as function
    else:
        from .reference import token_logprobs as function
    return function(hidden, weight, targets, temperature)


def grpo_loss(
    logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor | None, advantages: Tensor, mask: Tensor, **options
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped objective of GRPO and its statistics; see `reference.grpo_loss`, also for the options."""
    if _fused(logprobs):
        from .grpo import grpo_loss as function
    else:
        from .reference import grpo_loss as function
    return function(logprobs, old_logprobs, ref_logprobs, advantages, mask, **options)


def exact_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    """KL(policy || reference) over the whole vocabulary, [N]; see `reference.exact_kl`."""
    if _fused(hidden):
        from .kl import exact_kl as function
    else:
        from .reference import exact_kl as function
    return function(hidden, weight, ref_hidden, ref_weight)
