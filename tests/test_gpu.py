"""What only a card can tell: the checks of `benchmarks/smoke.py`, there with `pytest -m gpu`, in other runs on a CPU.

The kernels and the sampler have tests of their own for a card.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import sasr
from benchmarks import smoke
from model import KVCache, SharedPrompts
from rollout import Sampler, resolve_device


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return resolve_device(request.param)


@pytest.mark.parametrize("check", [name for name in smoke.CHECKS if name != "versions"])
def test_what_a_card_must_do(check, device):
    smoke.CHECKS[check](device, {})


# ----------------------------------------------------------------------------- that the checks see what is wrong

attention, append_tokens, bucket = F.scaled_dot_product_attention, Sampler._append_tokens, Sampler.bucket
cache_mask, shared_mask = KVCache.attention_mask, SharedPrompts.attention_mask
completion_logprobs, sample = sasr.completion_logprobs, sasr.sample


def five_percent_off_in_bf16(q, *args, **options):
    return attention(q, *args, **options) * (1.05 if q.dtype == torch.bfloat16 else 1)


def asks_whether_rows_are_active(self, index, logits):
    if self.active.any():
        append_tokens(self, index, logits)


def fewer_rows(self, rows, slots):
    return bucket(self, max(rows - 1, 1), slots)


def one_slot_too_many(self, positions):
    return cache_mask(self, positions + 1)


def padding_too(self, positions):
    mask = shared_mask(self, positions)
    mask[..., : -positions.shape[1]] = True
    return mask


def noisy(*args):
    logprobs, entropy = completion_logprobs(*args)
    return logprobs + 1e-6 * torch.rand_like(logprobs), entropy


def of_another_policy(*args):
    rollout = sample(*args)
    for logprobs in rollout.logprobs:
        logprobs[0] -= 1.0
    return rollout


@pytest.mark.parametrize(
    ("check", "place", "name", "wrong", "message"),
    [
        ("attention", F, "scaled_dot_product_attention", five_percent_off_in_bf16, "gradient of attention is wrong"),
        ("decoding", Sampler, "_append_tokens", asks_whether_rows_are_active, "waits for the device"),
        ("graphs", Sampler, "bucket", fewer_rows, "first, recorded, replayed: not what plain steps draw"),
        ("chunks", KVCache, "attention_mask", one_slot_too_many, "not those of the model"),
        ("gradients", SharedPrompts, "attention_mask", padding_too, "not that of fp32"),
        ("deterministic", sasr, "completion_logprobs", noisy, "two gradients of one batch differ"),
        ("run", sasr, "sample", of_another_policy, "sampler and trainer disagree"),
    ],
)
def test_a_check_sees_what_is_wrong(check, place, name, wrong, message, monkeypatch):
    monkeypatch.setattr(place, name, wrong)
    with pytest.raises((AssertionError, RuntimeError), match=message):
        smoke.CHECKS[check](torch.device("cpu"), {})
