"""The three functions of the hot path: their definition first, then the Triton kernels, then both beside their peers.

`kernels.reference` is the definition that the kernels are compared with, so it is compared here with things that
share none of its code: the whole [N, V] log-softmax in fp64, `torch.nn.functional`, and pencil and paper.

The kernels run interpreted, on the CPU (see conftest.py), and are compiled ahead of time for cards that are not here.
What only a card can tell is at the end: `pytest -m gpu`.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from kernels import reference
from kernels.reference import exact_kl, grpo_loss, token_logprobs

ROOT = Path(__file__).resolve().parents[1]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(n: int, d: int, v: int, *, spread: float = 1.0, dtype=torch.float32, seed: int = 0):
    """hidden, weight, targets; the logits have a standard deviation of about `spread`."""
    generator = seeded(seed)
    hidden = (spread * torch.randn(n, d, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    weight = (torch.randn(v, d, generator=generator, dtype=torch.float64) / d**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(v, (n,), generator=generator)


def brute_force(hidden, weight, targets, temperature):
    """log pi(target) and entropy, from all logits at once."""
    logprobs = F.log_softmax(F.linear(hidden, weight) / temperature, dim=-1)
    return logprobs[torch.arange(len(targets)), targets], torch.special.entr(logprobs.exp()).sum(-1)


def results_and_gradients(function, hidden, weight, targets, temperature, upstream):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    outputs = function(hidden, weight, targets, temperature)
    gradients = torch.autograd.grad(outputs, (hidden, weight), [u.to(outputs[0]) for u in upstream])
    return [tensor.detach() for tensor in (*outputs, *gradients)]


RESULTS = ("logprobs", "entropy", "d hidden", "d weight")


def assert_near(found, expected, tolerance: float, name: str = ""):
    """Every entry to within `tolerance`, relative to the largest (or to 1, where all are smaller)."""
    assert found.shape == expected.shape, name
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        found.double(), expected.double(), atol=tolerance * scale, rtol=0, msg=lambda m: f"{name}: {m}"
    )


def assert_equals_brute_force(hidden, weight, targets, temperature, tolerance):
    """Values, and gradients under random upstream gradients for both outputs."""
    upstream = torch.randn(2, len(targets), generator=seeded(99), dtype=torch.float64)
    ours = results_and_gradients(token_logprobs, hidden, weight, targets, temperature, upstream)
    exact = results_and_gradients(brute_force, hidden.double(), weight.double(), targets, temperature, upstream)
    for name, found, expected in zip(RESULTS, ours, exact, strict=True):
        assert_near(found, expected, tolerance, name)


# ----------------------------------------------------------------------------- token_logprobs


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("spread", [0.0, 1.0, 40.0], ids=["flat", "usual", "peaked"])
@pytest.mark.parametrize(("n", "d", "v"), [(1, 1, 2), (7, 13, 31), (33, 16, 257)])
def test_token_logprobs_equal_brute_force_in_values_and_gradients(n, d, v, spread, temperature, dtype, tolerance):
    assert_equals_brute_force(*inputs(n, d, v, spread=spread, dtype=dtype), temperature, tolerance)


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_token_logprobs_by_hand(temperature):
    """Two tokens with logits 0 and x: a Bernoulli distribution."""
    x = 1.25
    p = 1 / (1 + math.exp(-x / temperature))
    hidden, weight = torch.tensor([[x], [x]]), torch.tensor([[0.0], [1.0]])
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([1, 0]), temperature)
    assert logprobs.tolist() == pytest.approx([math.log(p), math.log(1 - p)])
    assert entropy.tolist() == pytest.approx([-p * math.log(p) - (1 - p) * math.log(1 - p)] * 2)


def test_the_default_temperature_is_one():
    given = inputs(5, 4, 9)
    for default, one in zip(token_logprobs(*given), token_logprobs(*given, 1.0), strict=True):
        assert torch.equal(default, one)


def test_a_flat_distribution_has_the_entropy_of_its_vocabulary():
    logprobs, entropy = token_logprobs(torch.zeros(3, 4), torch.randn(50, 4, generator=seeded(0)), torch.arange(3))
    assert logprobs.tolist() == pytest.approx([-math.log(50)] * 3)
    assert entropy.tolist() == pytest.approx([math.log(50)] * 3)


def test_no_tokens_give_empty_results_and_zero_gradients():
    hidden, weight, targets = inputs(0, 8, 30)
    logprobs, entropy = token_logprobs(hidden, weight, targets)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros(30, 8))


@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_gradients_reach_a_weight_that_also_made_the_hidden_states(rows, monkeypatch):
    """Tied embeddings: the weight gets its gradient by two ways."""
    monkeypatch.setattr(reference, "MAX_LOGITS", rows * 31)
    weight = inputs(1, 6, 31, dtype=torch.float64)[1]
    ids, targets = torch.arange(10), torch.arange(20, 30)
    upstream = torch.randn(2, 10, generator=seeded(3), dtype=torch.float64)

    def gradient(function):
        outputs = function(torch.tanh(3 * weight[ids]), weight, targets, 0.8)
        return torch.autograd.grad(outputs, weight, list(upstream))[0]

    torch.testing.assert_close(gradient(token_logprobs), gradient(brute_force), atol=1e-12, rtol=0)


@pytest.mark.parametrize("rows", [1, 3, 11])
def test_slices_give_what_one_piece_gives(rows, monkeypatch):
    """11 tokens in slices of 1, of 3 (the last is short), and of 11."""
    hidden, weight, targets = inputs(11, 5, 29)
    upstream = torch.randn(2, 11, generator=seeded(1))
    whole = results_and_gradients(token_logprobs, hidden, weight, targets, 0.9, upstream)
    monkeypatch.setattr(reference, "MAX_LOGITS", rows * 29 + 3)
    sliced = results_and_gradients(token_logprobs, hidden, weight, targets, 0.9, upstream)
    for found, expected in zip(sliced, whole, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    monkeypatch.setattr(reference, "MAX_LOGITS", 1)  # less than one row: then one row
    assert_equals_brute_force(hidden, weight, targets, 0.9, 5e-6)


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returns, backward included."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


def test_the_logits_of_all_tokens_are_never_there_at_once(monkeypatch):
    n, d, v = 2 * reference.MAX_LOGITS // 151_936, 4, 151_936
    hidden, weight, targets = inputs(n, d, v)

    def largest() -> tuple[int, int]:
        kept = []
        with (
            LargestTensor() as record,
            torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
            ),
        ):
            logprobs, entropy = token_logprobs(hidden, weight, targets)
            (logprobs.sum() + entropy.sum()).backward()
        return record.numel, max(kept, default=0)

    made, kept = largest()
    assert made <= reference.MAX_LOGITS < n * v
    assert kept <= v * d  # nothing larger than the weight waits for backward
    monkeypatch.setattr(reference, "MAX_LOGITS", n * v)
    made, kept = largest()
    assert made == kept == n * v  # which this test would have seen


def test_exact_kl_never_holds_the_logits_of_all_tokens():
    n, d, v = 2 * reference.MAX_LOGITS // 151_936, 2, 151_936
    hidden, weight, _ = inputs(n, d, v)
    with LargestTensor() as record:
        exact_kl(hidden, weight, hidden, weight)
    assert v <= record.numel <= reference.MAX_LOGITS < n * v


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_give_fp32_statistics(dtype):
    hidden, weight, targets = inputs(9, 16, 77, spread=2, dtype=dtype)
    ours, exact = token_logprobs(hidden, weight, targets), brute_force(hidden.double(), weight.double(), targets, 1.0)
    for found, expected in zip(ours, exact, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, atol=0.05, rtol=0)  # the logits are rounded, not the sums
    (ours[0].sum() + ours[1].sum()).backward()
    assert hidden.grad.dtype == weight.grad.dtype == dtype


def test_probabilities_that_underflow_do_not_make_nan():
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [1e4], [-1e4]], requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([0]))
    assert logprobs.item() == -1e4
    assert entropy.item() == 0.0
    (logprobs.sum() + entropy.sum()).backward()
    assert weight.grad.flatten().tolist() == [1.0, -1.0, 0.0]


def test_logits_that_overflow_to_minus_infinity_are_tokens_of_probability_zero():
    """In fp16 300 * -300 is -inf, and 0 log 0 is 0."""
    hidden = torch.tensor([[300.0]], dtype=torch.float16, requires_grad=True)
    weight = torch.tensor([[0.0], [0.0], [-300.0]], dtype=torch.float16, requires_grad=True)
    assert (hidden @ weight.T)[0, 2] == -math.inf
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([0]))
    assert [logprobs.item(), entropy.item()] == pytest.approx([-math.log(2), math.log(2)])
    (logprobs.sum() + entropy.sum()).backward()
    assert weight.grad.flatten().tolist() == [150.0, -150.0, 0.0]
    assert exact_kl(hidden, weight, torch.ones(1, 1), torch.zeros(3, 1)).item() == pytest.approx(math.log(3 / 2))


# ----------------------------------------------------------------------------- grpo_loss

CLIP = {"clip_low": 0.2, "clip_high": 0.3}  # the interval is [0.8, 1.3]
ONE = torch.ones(1)
STATISTICS = {"kl", "clip_low_fraction", "clip_high_fraction", "ratio_mean", "ratio_max"}


def one_token(ratio: float, advantage: float, **options) -> tuple[float, float, dict]:
    """Loss, its gradient in the log-prob, and the statistics of a single token with this ratio."""
    old = torch.tensor([-1.7])
    logprobs = (old + math.log(ratio)).requires_grad_()
    options = CLIP | {"kl_coef": 0.0} | options
    loss, stats = grpo_loss(logprobs, old, None, torch.tensor([advantage]), ONE, **options)
    loss.backward()
    return loss.item(), logprobs.grad.item(), stats


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        # Good and already likelier: the gain is capped at 1.3 * 2, and there is no more to be had.
        (1.5, 2.0, -2.6, 0.0, 1),
        # Good and become less likely: the gain is 0.5 * 2, below the 0.8 * 2 of the clip; d/dlogp (r A) = r A.
        (0.5, 2.0, -1.0, -1.0, 0),
        # Bad and become likelier: min(-3.0, -2.6), pushed down in full.
        (1.5, -2.0, 3.0, 3.0, 0),
        # Bad and already less likely: min(-1.0, -1.6), capped.
        (0.5, -2.0, 1.6, 0.0, 1),
        # Inside the interval nothing is clipped; 1.25 is inside only because the upper side is wider.
        (1.25, 2.0, -2.5, -2.5, 0),
        (1.25, -2.0, 2.5, 2.5, 0),
        (0.9, 2.0, -1.8, -1.8, 0),
        (0.9, -2.0, 1.8, 1.8, 0),
        # 0.75 is outside only because the lower side is narrower.
        (0.75, -2.0, 1.6, 0.0, 1),
        (1.0, 2.0, -2.0, -2.0, 0),
        (1.5, 0.0, 0.0, 0.0, 0),
    ],
)
def test_the_clip_by_hand(ratio, advantage, loss, gradient, clipped):
    found_loss, found_gradient, stats = one_token(ratio, advantage)
    assert found_loss == pytest.approx(loss, abs=1e-6)
    assert found_gradient == pytest.approx(gradient, abs=1e-6)
    low, high = (clipped, 0) if ratio < 1 else (0, clipped)
    assert (stats["clip_low_fraction"].item(), stats["clip_high_fraction"].item()) == (low, high)
    assert stats["ratio_mean"].item() == stats["ratio_max"].item() == pytest.approx(ratio)


@pytest.mark.parametrize(("ratio", "advantage", "gradient"), [(1.5, 2.0, -3.0), (0.5, -2.0, 1.0)])
def test_the_clip_widths_are_those_given(ratio, advantage, gradient):
    """The two clipped quadrants, once with the interval wide enough."""
    assert one_token(ratio, advantage)[1] == 0.0
    assert one_token(ratio, advantage, clip_low=0.6, clip_high=0.6)[1] == pytest.approx(gradient)
    only = {"clip_high": 0.6} if ratio < 1 else {"clip_low": 0.6}  # the other side does not matter
    assert one_token(ratio, advantage, **only)[1] == 0.0


def test_k3_by_hand():
    """pi = 1/4, pi_ref = 1/2: the quotient is 2, so k3 = 2 - log 2 - 1, and its slope in log pi is 1 - 2."""
    logprobs = torch.tensor([math.log(1 / 4)], requires_grad=True)
    loss, stats = grpo_loss(
        logprobs, logprobs.detach(), torch.tensor([math.log(1 / 2)]), 0 * ONE, ONE, **CLIP, kl_coef=0.1
    )
    assert loss.item() == pytest.approx(0.1 * (1 - math.log(2)))
    assert stats["kl"].item() == pytest.approx(1 - math.log(2))
    loss.backward()
    assert logprobs.grad.item() == pytest.approx(0.1 * (1 - 2))


def test_the_gradient_of_k3_is_one_minus_the_quotient():
    generator = seeded(0)
    logprobs = (-3 * torch.rand(50, generator=generator, dtype=torch.float64)).requires_grad_()
    ref = -3 * torch.rand(50, generator=generator, dtype=torch.float64)
    loss, stats = grpo_loss(
        logprobs, logprobs.detach(), ref, torch.zeros(50), torch.ones(50), **CLIP, kl_coef=0.7, denominator=2.0
    )
    loss.backward()
    torch.testing.assert_close(logprobs.grad, 0.7 * (1 - (ref - logprobs.detach()).exp()) / 2)
    k3 = [math.expm1(r - p) - (r - p) for p, r in zip(logprobs.tolist(), ref.tolist(), strict=True)]
    assert stats["kl"].item() == pytest.approx(sum(k3))
    assert min(k3) >= 0
    assert loss.item() == pytest.approx(0.7 * sum(k3) / 2)


def batch(shape=(4, 6), seed: int = 0) -> dict:
    """A random batch in which all quadrants occur; float64."""
    generator = seeded(seed)
    old = -2 * torch.rand(shape, generator=generator, dtype=torch.float64)
    return {
        "logprobs": old + 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64),
        "old_logprobs": old,
        "ref_logprobs": old + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64),
        "advantages": torch.randn(shape, generator=generator, dtype=torch.float64),
        "mask": (torch.rand(shape, generator=generator) < 0.7).double(),
    }


def loss_of(tensors: dict, function=grpo_loss, **options) -> tuple[float, torch.Tensor, dict]:
    """Loss, gradient in the log-probs, statistics."""
    logprobs = tensors["logprobs"].detach().requires_grad_()
    loss, stats = function(**(tensors | {"logprobs": logprobs}), **(CLIP | {"kl_coef": 0.05} | options))
    loss.backward()
    return loss.item(), logprobs.grad, stats


def test_the_loss_is_the_mean_over_the_tokens_that_count():
    tensors = batch()
    total, count, kl, low, high, ratios = 0.0, 0, 0.0, 0, 0, []
    for lp, old, ref, advantage, counts in zip(*(t.flatten().tolist() for t in tensors.values()), strict=True):
        if counts:
            ratio, quotient = math.exp(lp - old), math.exp(ref - lp)
            total += min(ratio * advantage, min(max(ratio, 0.8), 1.3) * advantage)
            kl += quotient - math.log(quotient) - 1
            low += ratio < 0.8 and advantage < 0
            high += ratio > 1.3 and advantage > 0
            ratios.append(ratio)
            count += 1
    assert 0 < low + high < count < tensors["mask"].numel()
    assert low > 0 < high
    loss, gradient, stats = loss_of(tensors)
    assert loss == pytest.approx(-(total - 0.05 * kl) / count)
    expected = {"kl": kl, "clip_low_fraction": low, "clip_high_fraction": high}
    expected |= {"ratio_mean": sum(ratios), "ratio_max": max(ratios)}  # all are sums, but the last
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(expected)
    assert (gradient[tensors["mask"] == 0] == 0).all()


def test_the_gradient_of_the_loss_passes_gradcheck():
    tensors = batch(shape=(12,))
    logprobs = tensors.pop("logprobs").requires_grad_()
    assert torch.autograd.gradcheck(lambda lp: grpo_loss(lp, **tensors, **CLIP, kl_coef=0.05)[0], (logprobs,))


def test_the_mask_may_be_boolean():
    tensors = batch()
    loss, gradient, stats = loss_of(tensors)
    other_loss, other_gradient, other_stats = loss_of(tensors | {"mask": tensors["mask"].bool()})
    assert (loss, stats) == (other_loss, other_stats)
    assert torch.equal(gradient, other_gradient)


def test_micro_batches_add_up_to_the_whole():
    tensors = batch(shape=(9, 5))
    tensors["mask"][6:8] = 0  # one micro-batch with nothing in it
    loss, gradient, stats = loss_of(tensors)
    count = tensors["mask"].sum()
    for denominator in (count, count.item()):
        parts = [
            loss_of({name: tensor[rows] for name, tensor in tensors.items()}, denominator=denominator)
            for rows in (slice(0, 1), slice(1, 6), slice(6, 8), slice(8, 9))
        ]
        assert sum(part[0] for part in parts) == pytest.approx(loss)
        torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient)
        for name, value in stats.items():
            together = max if name == "ratio_max" else sum
            assert together(part[2][name].item() for part in parts) == pytest.approx(value.item())


def test_the_denominator_divides_the_loss_and_not_the_statistics():
    tensors = batch()
    loss, gradient, stats = loss_of(tensors, denominator=1.0)
    other_loss, other_gradient, other_stats = loss_of(tensors, denominator=8.0)
    assert other_loss == pytest.approx(loss / 8)
    torch.testing.assert_close(other_gradient, gradient / 8)
    assert other_stats == stats


def test_the_statistics_carry_no_gradient():
    tensors = batch()
    tensors["logprobs"].requires_grad_()
    _, stats = grpo_loss(**tensors, **CLIP, kl_coef=0.1)
    assert set(stats) == STATISTICS
    assert not any(value.requires_grad for value in stats.values())


def test_each_token_may_have_a_denominator_of_its_own():
    """Also one a sequence; and 0 for a sequence that has no tokens, since masked tokens may hold anything."""
    tensors = batch()
    tensors["mask"][2] = 0
    own = 1 + torch.arange(24.0).reshape(4, 6)
    loss, gradient, stats = loss_of(tensors, denominator=own)
    ungraded = loss_of(tensors, denominator=1.0)
    torch.testing.assert_close(gradient, ungraded[1] / own)
    assert stats == ungraded[2]
    parts = [
        loss_of({name: tensor.flatten()[i : i + 1] for name, tensor in tensors.items()}, denominator=i + 1.0)
        for i in range(24)
    ]
    assert loss == pytest.approx(sum(part[0] for part in parts))
    lengths = tensors["mask"].sum(1, keepdim=True).long()  # [4, 1]
    assert lengths[2] == 0
    loss, gradient, _ = loss_of(tensors, denominator=lengths)
    assert math.isfinite(loss)
    torch.testing.assert_close(gradient, ungraded[1] / lengths.clamp(min=1))


def test_a_batch_without_tokens_has_loss_zero_and_gradient_zero():
    tensors = batch()
    tensors["mask"].zero_()
    loss, gradient, stats = loss_of(tensors)
    assert loss == 0.0
    assert (gradient == 0).all()
    assert {name: value.item() for name, value in stats.items()} == dict.fromkeys(STATISTICS, 0.0)


def test_without_a_reference_there_is_no_kl():
    tensors = batch()
    no_kl = loss_of(tensors, kl_coef=0.0)
    loss, gradient, stats = loss_of(tensors | {"ref_logprobs": None}, kl_coef=0.5)
    assert loss == no_kl[0]
    assert torch.equal(gradient, no_kl[1])
    assert stats["kl"].item() == 0.0
    assert no_kl[2]["kl"].item() > 0.0  # with one it is measured even where it costs nothing


@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "ref_logprobs", "advantages"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e30, -1e30])
def test_a_masked_token_may_hold_anything(name, value):
    tensors = batch()
    loss, gradient, stats = loss_of(tensors)
    masked = tensors["mask"] == 0
    assert masked.any()
    poisoned = loss_of(tensors | {name: tensors[name].masked_fill(masked, value)})
    assert poisoned[0] == loss
    assert torch.equal(poisoned[1], gradient)
    assert poisoned[2] == stats


def test_only_the_log_probs_of_the_policy_get_a_gradient_from_the_ratio():
    """pi_old, pi_ref and the advantages are data: training passes them without a graph."""
    tensors = batch()
    loss, gradient, _ = loss_of(tensors)
    at_old = loss_of(tensors | {"logprobs": tensors["old_logprobs"]}, kl_coef=0.0)[1]
    expected = (
        -tensors["advantages"] * tensors["mask"] / tensors["mask"].sum()
    )  # plain policy gradient where pi = pi_old
    torch.testing.assert_close(at_old, expected)
    assert math.isfinite(loss)
    assert gradient.abs().sum() > 0


# ----------------------------------------------------------------------------- exact_kl


def two_policies(n: int = 7, v: int = 23, *, seed: int = 0, dtype=torch.float64):
    """hidden, weight, ref_hidden, ref_weight; the reference has another hidden size."""
    hidden, weight, _ = inputs(n, 6, v, spread=2, dtype=dtype, seed=seed)
    ref_hidden, ref_weight, _ = inputs(n, 9, v, spread=2, dtype=dtype, seed=seed + 100)
    return hidden, weight, ref_hidden, ref_weight


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_exact_kl_equals_brute_force(rows, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(reference, "MAX_LOGITS", rows * 23)
    given = two_policies(dtype=dtype)
    hidden, weight, ref_hidden, ref_weight = (tensor.detach().double() for tensor in given)
    policy, ref = F.softmax(hidden @ weight.T, dim=-1), F.softmax(ref_hidden @ ref_weight.T, dim=-1)
    expected = (policy * (policy / ref).log()).sum(-1)
    assert expected.min() > 0.1
    torch.testing.assert_close(exact_kl(*given).double(), expected, atol=tolerance, rtol=0)


def test_exact_kl_by_hand_and_in_its_direction():
    """Policy (3/4, 1/4), reference (1/2, 1/2)."""
    hidden, half, weight = torch.tensor([[math.log(3)]]), torch.tensor([[0.0]]), torch.tensor([[1.0], [0.0]])
    forward, backward = exact_kl(hidden, weight, half, weight), exact_kl(half, weight, hidden, weight)
    assert forward.item() == pytest.approx(3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2))
    assert backward.item() == pytest.approx(1 / 2 * math.log(2 / 3) + 1 / 2 * math.log(2))


def test_exact_kl_of_equal_policies_is_zero():
    hidden, weight, *_ = two_policies()
    assert exact_kl(hidden, weight, hidden, weight).tolist() == [0.0] * 7


@pytest.mark.parametrize("seed", range(20))
def test_exact_kl_is_never_negative(seed):
    hidden, weight, ref_hidden, ref_weight = two_policies(seed=seed)
    assert (exact_kl(hidden, weight, ref_hidden, ref_weight) > 0).all()
    nearby = exact_kl(hidden, weight, hidden * (1 + 1e-4), weight)
    assert (nearby > -1e-12).all()
    assert nearby.max() < 1e-5


def test_exact_kl_is_the_expectation_of_k3_under_the_policy():
    """Over the whole vocabulary; k3 as the loss computes it, one call a token."""
    hidden, weight, ref_hidden, ref_weight = two_policies(n=3)
    v = len(weight)
    every_token = torch.arange(v)
    for row, kl in enumerate(exact_kl(hidden, weight, ref_hidden, ref_weight).tolist()):
        logprobs = token_logprobs(hidden[[row] * v], weight, every_token)[0].detach()
        ref = token_logprobs(ref_hidden[[row] * v], ref_weight, every_token)[0].detach()
        nothing = torch.zeros(1, dtype=torch.float64)
        k3 = [
            grpo_loss(p, p, r, nothing, torch.ones(1), **CLIP, kl_coef=1.0)[1]["kl"].item()
            for p, r in zip(logprobs.split(1), ref.split(1), strict=True)
        ]
        assert min(k3) >= 0
        assert kl == pytest.approx(sum(p * k for p, k in zip(logprobs.exp().tolist(), k3, strict=True)))


def test_exact_kl_of_no_tokens_is_empty_and_has_no_gradient():
    assert exact_kl(*two_policies(n=0)).shape == (0,)
    assert not exact_kl(*two_policies()).requires_grad


# ----------------------------------------------------------------------------- the kernels, interpreted: token_logprobs


@pytest.fixture
def fused() -> SimpleNamespace:
    """The Triton kernels themselves, whatever `kernels` would choose for these tensors."""
    pytest.importorskip("triton", reason="there is no Triton outside Linux")
    from kernels import grpo, kl, logprob

    return SimpleNamespace(token_logprobs=logprob.token_logprobs, grpo_loss=grpo.grpo_loss, exact_kl=kl.exact_kl)


@pytest.fixture(params=["pointers", "descriptors"])
def loads(request, fused, monkeypatch) -> str:
    """Both ways to fetch a matrix. That of a Hopper runs on the CPU too, where the interpreter plays the TMA's part."""
    if request.param == "descriptors":
        monkeypatch.setattr("kernels.tiles.architecture", lambda device: 90)
    return request.param


def assert_equals_the_reference(function, hidden, weight, targets, temperature=1.0, *, tolerance, gradients=None):
    """Values to `tolerance` of the reference in fp64, and gradients, under random upstream ones, to `gradients`."""
    upstream = torch.randn(2, len(targets), generator=seeded(99), dtype=torch.float64).to(hidden.device)
    ours = results_and_gradients(function, hidden, weight, targets, temperature, upstream)
    exact = results_and_gradients(token_logprobs, hidden.double(), weight.double(), targets, temperature, upstream)
    bounds = (tolerance, tolerance, gradients or tolerance, gradients or tolerance)
    for name, found, expected, bound in zip(RESULTS, ours, exact, bounds, strict=True):
        assert_near(found, expected, bound, name)
    assert [found.dtype for found in ours] == [torch.float32, torch.float32, hidden.dtype, weight.dtype]


FLAT, USUAL, PEAKED = 0.0, 1.0, 20.0


@pytest.mark.parametrize(
    ("shape", "spread", "temperature"),
    [
        ((252, 507, 123), USUAL, 0.5),  # tails in all three
        ((70, 45, 123), PEAKED, 1.7),
        ((7, 33, 1100), PEAKED, 0.5),
        ((7, 33, 123), FLAT, 1.0),
        ((64, 32, 64), PEAKED, 1.0),  # no tail anywhere
        ((65, 1, 2), USUAL, 1.0),
        ((1, 5, 1), USUAL, 1.0),  # a vocabulary of one word
        ((1, 64, 300), PEAKED, 1.0),
    ],
)
def test_the_kernels_equal_the_reference_in_values_and_gradients(fused, loads, shape, spread, temperature):
    """fp16 operands are multiplied exactly and summed in fp32: only what is stored in fp16, gradients, is rounded."""
    for dtype, gradients in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
        given = inputs(*shape, spread=spread, dtype=dtype)
        assert_equals_the_reference(fused.token_logprobs, *given, temperature, tolerance=1e-5, gradients=gradients)


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_how_the_vocabulary_is_split_does_not_matter(fused, splits, monkeypatch):
    """Elsewhere each of the 5 tiles of words has a program of its own; here a program walks over 5, 3 or 2."""
    monkeypatch.setattr("kernels.logprob.SPLITS", splits)
    for spread in (USUAL, PEAKED):
        assert_equals_the_reference(fused.token_logprobs, *inputs(7, 12, 300, spread=spread), 0.8, tolerance=1e-5)


def test_backward_in_several_slabs_gives_what_one_slab_gives(fused, monkeypatch):
    """300 words in one slab, and in slabs of 3, 2 and 1 tiles of 64 words; 65 tokens make two blocks."""
    given, upstream = inputs(65, 12, 300), torch.randn(2, 65, generator=seeded(1))
    whole = results_and_gradients(fused.token_logprobs, *given, 0.9, upstream)
    for tiles in (3, 2, 1):
        monkeypatch.setattr("kernels.logprob.SLAB", tiles * 64 * 65)
        cut = results_and_gradients(fused.token_logprobs, *given, 0.9, upstream)
        for name, found, expected in zip(RESULTS, cut, whole, strict=True):
            assert_near(found, expected, 1e-6, name)
    monkeypatch.setattr("kernels.logprob.SLAB", 1)  # less than a tile: then a tile
    assert_equals_the_reference(fused.token_logprobs, *given, 0.9, tolerance=1e-5)


def test_the_kernels_never_hold_the_logits_of_all_tokens(fused, monkeypatch):
    n, v = 70, 1100
    hidden, weight, targets = inputs(n, 4, v)
    monkeypatch.setattr("kernels.logprob.SLAB", 128 * n)
    with LargestTensor() as record:
        logprobs, entropy = fused.token_logprobs(hidden, weight, targets)
        (logprobs.sum() + entropy.sum()).backward()
    assert record.numel <= 4 * 128 * n < n * v / 2  # 4, since the interpreter carries tensors to and fro as bytes


@pytest.mark.parametrize("kept", [0, 1], ids=["log-probs", "entropy"])
def test_either_result_may_be_used_alone(fused, kept):
    hidden, weight, targets = inputs(9, 12, 70)
    exact = token_logprobs(hidden.double(), weight.double(), targets, 0.7)
    ours = fused.token_logprobs(hidden, weight, targets, 0.7)
    for function_of in (torch.sum, lambda result: (result * torch.arange(9)).sum()):
        expected = torch.autograd.grad(function_of(exact[kept]), (hidden, weight), retain_graph=True)
        found = torch.autograd.grad(function_of(ours[kept]), (hidden, weight), retain_graph=True)
        for name, tensor, other in zip(RESULTS[2:], found, expected, strict=True):
            assert_near(tensor, other, 1e-5, name)


def test_only_the_gradients_that_are_wanted_are_made(fused):
    hidden, weight, targets = inputs(9, 12, 70)
    both = torch.autograd.grad(fused.token_logprobs(hidden, weight, targets)[0].sum(), (hidden, weight))
    for wanted, other, expected in ((hidden, weight.detach(), both[0]), (weight, hidden.detach(), both[1])):
        h, w = (wanted, other) if wanted is hidden else (other, wanted)
        logprobs, _ = fused.token_logprobs(h, w, targets)
        (found,) = torch.autograd.grad(logprobs.sum(), wanted)
        assert torch.equal(found, expected)
    with torch.no_grad():
        results = fused.token_logprobs(hidden, weight, targets)
    assert not any(result.requires_grad for result in results)
    assert not any(result.requires_grad for result in fused.token_logprobs(hidden.detach(), weight.detach(), targets))


def test_the_kernels_pass_gradients_to_a_tied_weight_by_both_ways(fused):
    weight = inputs(1, 6, 31)[1]
    ids, targets = torch.arange(10), torch.arange(20, 30)
    upstream = torch.randn(2, 10, generator=seeded(3))

    def gradient(function, weight):
        outputs = function(torch.tanh(3 * weight[ids]), weight, targets, 0.8)
        return torch.autograd.grad(outputs, weight, [u.to(outputs[0]) for u in upstream])[0]

    exact = gradient(token_logprobs, weight.detach().double().requires_grad_())
    assert_near(gradient(fused.token_logprobs, weight), exact, 1e-5)


VIEWS = {
    "transposed": lambda matrix: matrix.T.contiguous().T,
    "every other row": lambda matrix: matrix.repeat_interleave(2, dim=0)[::2],
    "columns of a wider matrix": lambda matrix: F.pad(matrix, (1, 2))[:, 1:-2],
    "not on a boundary of 16 bytes": lambda matrix: F.pad(matrix.flatten(), (1, 0))[1:].view_as(matrix),
    "broadcast": lambda matrix: matrix[:1].expand(len(matrix), -1),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    ("n", "d", "dtype", "gradients"),
    [(5, 16, torch.float32, 1e-5), (1, 16, torch.float16, 2e-3), (5, 13, torch.float16, 2e-3)],
)
def test_matrices_may_lie_in_memory_as_they_like(fused, loads, view, n, d, dtype, gradients):
    """A single row counts as contiguous however far apart rows would be: TMA must not be told that stride."""
    hidden, weight, targets = inputs(n, d, 70, dtype=dtype)
    for h, w in ((VIEWS[view](hidden), weight), (hidden, VIEWS[view](weight))):
        given = h, w, targets.repeat_interleave(2)[::2]
        assert_equals_the_reference(fused.token_logprobs, *given, tolerance=1e-5, gradients=gradients)
    ref_hidden, ref_weight = VIEWS[view](2 * hidden), VIEWS[view](weight)
    exact = exact_kl(hidden.double(), weight.double(), ref_hidden.double(), ref_weight.double())
    assert_near(fused.exact_kl(hidden, weight, ref_hidden, ref_weight), exact, 1e-5)


def test_both_ways_of_loading_give_the_same_bits(fused, monkeypatch):
    """Where the tiles are the same, which in fp32 they are. 33 features are padded to 36 for the descriptors."""
    given, upstream = inputs(70, 33, 150), torch.randn(2, 70, generator=seeded(1))
    by_pointer = results_and_gradients(fused.token_logprobs, *given, 0.9, upstream)
    monkeypatch.setattr("kernels.tiles.architecture", lambda device: 90)
    by_descriptor = results_and_gradients(fused.token_logprobs, *given, 0.9, upstream)
    for name, found, expected in zip(RESULTS, by_descriptor, by_pointer, strict=True):
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("v", [60, 300])
def test_a_token_gets_the_same_bits_whatever_else_is_in_its_batch(fused, loads, v):
    """Also where splits of the vocabulary are merged: `Tensor.sum` would choose its order by the batch's size."""
    hidden, weight, targets = inputs(64, 12, v)
    with torch.no_grad():
        logprobs, entropy = fused.token_logprobs(hidden, weight, targets)
        kl = fused.exact_kl(hidden, weight, 2 * hidden, weight)
        for n in (1, 3, 17):
            alone = fused.token_logprobs(hidden[:n], weight, targets[:n])
            assert torch.equal(alone[0], logprobs[:n])
            assert torch.equal(alone[1], entropy[:n])
            assert torch.equal(fused.exact_kl(hidden[:n], weight, 2 * hidden[:n], weight), kl[:n])


@pytest.mark.parametrize("wrong", [-100, -1, 70, 71, 128, 2**40])
def test_a_target_outside_the_vocabulary_gives_nan_and_touches_no_other_token(fused, wrong):
    """70 words in tiles of 64: 71 lies in the last tile, beyond the last word; 128 in none."""
    hidden, weight, targets = inputs(5, 12, 70)
    expected = results_and_gradients(fused.token_logprobs, hidden, weight, targets, 0.9, torch.ones(2, 5))
    logprobs, entropy = fused.token_logprobs(hidden, weight, targets.index_fill(0, torch.tensor([2]), wrong), 0.9)
    assert logprobs[2].isnan()
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(logprobs[others], expected[0][others])
    assert torch.equal(entropy, expected[1])
    (d_hidden,) = torch.autograd.grad((logprobs[others].sum() + entropy.sum()), hidden)
    assert torch.equal(d_hidden[others], expected[2][others])
    assert d_hidden.isfinite().all()


def test_two_runs_of_the_kernels_give_the_same_bits(fused):
    given, upstream = inputs(70, 12, 300), torch.randn(2, 70, generator=seeded(1))
    once, again = (results_and_gradients(fused.token_logprobs, *given, 0.9, upstream) for _ in range(2))
    for name, found, expected in zip(RESULTS, again, once, strict=True):
        assert torch.equal(found, expected), name


def test_the_kernels_take_no_tokens(fused):
    hidden, weight, targets = inputs(0, 8, 30)
    logprobs, entropy = fused.token_logprobs(hidden, weight, targets)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros(30, 8))
    assert fused.exact_kl(hidden, weight, hidden, weight).shape == (0,)


def test_the_kernels_survive_probabilities_that_underflow(fused):
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [1e4], [-1e4]], requires_grad=True)
    logprobs, entropy = fused.token_logprobs(hidden, weight, torch.tensor([0]))
    assert logprobs.item() == -1e4
    assert entropy.item() == 0.0
    (logprobs.sum() + entropy.sum()).backward()
    assert weight.grad.flatten().tolist() == [1.0, -1.0, 0.0]
    all_far_below_zero = torch.tensor([[-1e4], [-1e4]])
    assert fused.token_logprobs(hidden, all_far_below_zero, torch.tensor([1]))[0].item() == pytest.approx(-math.log(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, w, t: (h, w[:, :3], t), r"hidden and weight \[5, 4\] and \[9, 3\]"),
        (lambda h, w, t: (h[None], w, t), r"hidden and weight \[1, 5, 4\] and \[9, 4\]"),
        (lambda h, w, t: (h.half(), w, t), r"hidden and weight are torch.float16 and torch.float32"),
        (lambda h, w, t: (h.double(), w.double(), t), r"torch.float64.*expected both in bf16, fp16 or fp32"),
        (lambda h, w, t: (h, w, t[:3]), r"targets \[3\]: expected one for each of 5 tokens"),
        (lambda h, w, t: (h, w, t[None]), r"targets \[1, 5\]"),
    ],
)
def test_what_does_not_fit_the_log_probs_is_named(fused, change, message):
    with pytest.raises(ValueError, match=message):
        fused.token_logprobs(*change(*inputs(5, 4, 9)))


# ----------------------------------------------------------------------------- the kernels, interpreted: grpo_loss


def assert_loss_equals_the_reference(function, tensors: dict, *, tolerance: float = 1e-5, gradient=None, **options):
    """Loss, gradient and statistics to `tolerance` of the reference on the same numbers in fp64."""
    in_fp64 = {
        name: tensor.double() if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    loss, d_logprobs, stats = loss_of(tensors, function, **options)
    exact_loss, exact_gradient, exact_stats = loss_of(in_fp64, **options)
    assert loss == pytest.approx(exact_loss, rel=tolerance, abs=tolerance)
    assert d_logprobs.dtype == tensors["logprobs"].dtype
    assert_near(d_logprobs, exact_gradient, gradient or tolerance)
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(
        {name: value.item() for name, value in exact_stats.items()}, rel=tolerance, abs=tolerance
    )


def fp32(tensors: dict) -> dict:
    return {name: tensor.float() for name, tensor in tensors.items()}


@pytest.mark.parametrize("shape", [(1,), (24,), (1023,), (1024,), (1025,), (3000,), (7, 300), (2, 3, 5)])
def test_the_kernel_of_the_loss_equals_the_reference(fused, shape):
    """From one token to three blocks with a tail."""
    for seed in range(3):
        tensors = fp32(batch(shape, seed))
        assert_loss_equals_the_reference(fused.grpo_loss, tensors)
        assert_loss_equals_the_reference(fused.grpo_loss, tensors, kl_coef=0.0)
        assert_loss_equals_the_reference(fused.grpo_loss, tensors | {"ref_logprobs": None})
        assert_loss_equals_the_reference(fused.grpo_loss, tensors | {"mask": tensors["mask"].bool()})
        assert_loss_equals_the_reference(fused.grpo_loss, tensors | {"mask": 0 * tensors["mask"]})


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9, 1.0, 1.25, 1.5])
@pytest.mark.parametrize("advantage", [-2.0, 0.0, 2.0])
def test_the_kernel_of_the_loss_clips_in_every_quadrant(fused, ratio, advantage):
    old = torch.tensor([-1.7])
    tensors = {"logprobs": old + math.log(ratio), "old_logprobs": old, "ref_logprobs": old + 0.3}
    tensors |= {"advantages": torch.tensor([advantage]), "mask": ONE}
    assert_loss_equals_the_reference(fused.grpo_loss, tensors)
    assert_loss_equals_the_reference(fused.grpo_loss, tensors, clip_low=0.6, clip_high=0.1)


@pytest.mark.parametrize(
    "denominator",
    [
        7.5,
        7,
        torch.tensor(7.5),
        torch.tensor(7),
        torch.tensor([[7.5]]),
        1 + torch.arange(1500.0).reshape(5, 300),
        torch.tensor([[3.0], [1.0], [4.0], [1.0], [5.0]]),
        torch.tensor([[3], [1], [4], [1], [5]]),
        torch.arange(1, 301),
    ],
    ids=["float", "int", "0-d", "0-d int", "[1, 1]", "[B, T]", "[B, 1]", "[B, 1] int", "[T]"],
)
def test_the_kernel_of_the_loss_takes_any_denominator(fused, denominator):
    assert_loss_equals_the_reference(fused.grpo_loss, fp32(batch((5, 300))), denominator=denominator)


@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "ref_logprobs", "advantages"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e30])
def test_the_kernel_of_the_loss_does_not_look_at_masked_tokens(fused, name, value):
    tensors = fp32(batch((3, 500)))
    masked = tensors["mask"] == 0
    loss, gradient, stats = loss_of(tensors, fused.grpo_loss)
    poisoned = loss_of(tensors | {name: tensors[name].masked_fill(masked, value)}, fused.grpo_loss)
    assert poisoned[0] == loss
    assert torch.equal(poisoned[1], gradient)
    assert poisoned[2] == stats
    assert (gradient[masked] == 0).all()


def test_a_masked_sequence_may_have_the_denominator_zero(fused):
    tensors = fp32(batch((4, 6)))
    tensors["mask"][2] = 0
    assert_loss_equals_the_reference(fused.grpo_loss, tensors, denominator=tensors["mask"].sum(1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_of_the_loss_computes_half_precision_in_fp32(fused, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in batch((2, 600)).items()}
    options = {"denominator": 1.0}  # else fp16 gradients of a mean over 800 tokens lose digits to the format
    assert_loss_equals_the_reference(fused.grpo_loss, tensors, gradient=0.005, **options)


def test_an_upstream_gradient_scales_that_of_the_loss(fused):
    tensors = fp32(batch())
    gradient = loss_of(tensors, fused.grpo_loss)[1]
    logprobs = tensors.pop("logprobs").requires_grad_()
    loss, stats = fused.grpo_loss(logprobs, **tensors, **CLIP, kl_coef=0.05)
    assert set(stats) == STATISTICS
    assert not any(value.requires_grad for value in stats.values())
    (-3.0 * loss + 1.0).backward()
    torch.testing.assert_close(logprobs.grad, -3.0 * gradient)


def test_the_kernel_of_the_loss_takes_no_tokens(fused):
    empty = {name: tensor[:0] for name, tensor in fp32(batch((8,))).items()}
    loss, gradient, stats = loss_of(empty, fused.grpo_loss)
    assert loss == 0.0
    assert gradient.shape == (0,)
    assert {name: value.item() for name, value in stats.items()} == dict.fromkeys(STATISTICS, 0.0)


def test_the_tensors_of_the_loss_may_lie_in_memory_as_they_like(fused):
    tensors = fp32(batch((40, 60)))
    expected = loss_of(tensors, fused.grpo_loss)
    for lay in (lambda t: t.T.contiguous().T, lambda t: F.pad(t, (1, 2))[:, 1:-2]):
        found = loss_of({name: lay(tensor) for name, tensor in tensors.items()}, fused.grpo_loss)
        assert found[0] == expected[0]
        assert torch.equal(found[1], expected[1])
        assert found[2] == expected[2]


def test_an_advantage_may_be_that_of_its_whole_sequence(fused):
    """[B, 1] broadcasts, as in the reference; the kernel must not read on beyond the B numbers."""
    tensors = fp32(batch((5, 300)))
    assert_loss_equals_the_reference(fused.grpo_loss, tensors | {"advantages": tensors["advantages"][:, :1]})
    assert_loss_equals_the_reference(fused.grpo_loss, tensors | {"mask": tensors["mask"][:1]})
    with pytest.raises(RuntimeError, match="size"):
        fused.grpo_loss(**(tensors | {"old_logprobs": tensors["old_logprobs"][:, :7]}), **CLIP, kl_coef=0.0)


def test_the_kernel_of_the_loss_feeds_the_kernel_of_the_log_probs(fused):
    """End to end: the loss of a batch and its gradients in hidden states and weight."""
    hidden, weight, targets = inputs(66, 12, 150)
    tensors = batch((66,))

    def loss_and_gradients(functions, hidden, weight, others):
        logprobs, entropy = functions.token_logprobs(hidden, weight, targets, 0.7)
        others = others | {"old_logprobs": logprobs.detach() + others["old_logprobs"]}
        others["ref_logprobs"] = logprobs.detach() + others["ref_logprobs"]
        loss, _ = functions.grpo_loss(**(others | {"logprobs": logprobs}), **CLIP, kl_coef=0.1)
        loss = loss - 0.01 * entropy.mean()
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]

    exact = loss_and_gradients(reference, *(t.detach().double().requires_grad_() for t in (hidden, weight)), tensors)
    for name, found, expected in zip(
        ("loss", *RESULTS[2:]), loss_and_gradients(fused, hidden, weight, fp32(tensors)), exact, strict=True
    ):
        assert_near(found, expected, 1e-5, name)


# ----------------------------------------------------------------------------- the kernels, interpreted: exact_kl


@pytest.mark.parametrize(("shape", "d_ref"), [((7, 6, 23), 9), ((66, 40, 130), 24), ((5, 33, 300), 33), ((1, 1, 1), 7)])
@pytest.mark.parametrize("spread", [FLAT, PEAKED])
def test_the_kernel_of_the_divergence_equals_the_reference(fused, loads, shape, d_ref, spread):
    """Vocabularies with and without a tail; policy and reference have hidden sizes of their own."""
    n, d, v = shape
    for dtype in (torch.float32, torch.float16):
        hidden, weight, _ = inputs(n, d, v, spread=spread, dtype=dtype)
        ref_hidden, ref_weight, _ = inputs(n, d_ref, v, spread=1 + spread, dtype=dtype, seed=1)
        exact = exact_kl(*(tensor.double() for tensor in (hidden, weight, ref_hidden, ref_weight)))
        found = fused.exact_kl(hidden, weight, ref_hidden, ref_weight)
        assert found.dtype == torch.float32
        assert not found.requires_grad
        assert_near(found, exact, 1e-5)


@pytest.mark.parametrize("splits", [1, 3])
def test_how_the_vocabulary_of_the_divergence_is_split_does_not_matter(fused, splits, monkeypatch):
    monkeypatch.setattr("kernels.kl.SPLITS", splits)
    hidden, weight, ref_hidden, ref_weight = two_policies(5, 300, dtype=torch.float32)
    exact = exact_kl(*(tensor.double() for tensor in (hidden, weight, ref_hidden, ref_weight)))
    assert_near(fused.exact_kl(hidden, weight, ref_hidden, ref_weight), exact, 1e-5)


@pytest.mark.parametrize("spread", [USUAL, PEAKED])
def test_the_divergence_of_equal_policies_is_zero_and_small_ones_are_not_lost(fused, spread):
    """Where a policy has just left its reference: 1e-4 nats must not drown in the digits of two log-sum-exps."""
    hidden, weight, _ = inputs(20, 16, 300, spread=spread)
    assert fused.exact_kl(hidden, weight, hidden, weight).abs().max() < 1e-6
    drift = torch.randn(20, 16, generator=seeded(5))
    nearby = hidden.detach() + 0.01 * drift
    exact = exact_kl(*(tensor.double() for tensor in (hidden, weight, nearby, weight)))
    found = fused.exact_kl(hidden, weight, nearby, weight)
    assert 1e-6 < exact.mean() < 1e-4
    assert found.mean().item() == pytest.approx(exact.mean().item(), rel=0.02)
    torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, w, rh, rw: (h[:, :3], w, rh, rw), r"hidden and weight \[7, 3\] and \[23, 6\]"),
        (lambda h, w, rh, rw: (h, w, rh[:, :3], rw), r"ref_hidden and ref_weight \[7, 3\] and \[23, 9\]"),
        (lambda h, w, rh, rw: (h, w, rh[:4], rw), r"policy has 7 tokens.*reference 4"),
        (lambda h, w, rh, rw: (h, w, rh, rw[:20]), r"policy has 7 tokens and 23 words.*reference 7 and 20"),
        (lambda h, w, rh, rw: (h.half(), w.half(), rh, rw), r"policy is in torch.float16.*reference in torch.float32"),
        (lambda h, w, rh, rw: (h, w, rh, rw.half()), r"ref_hidden and ref_weight are torch.float32 and torch.float16"),
    ],
)
def test_what_does_not_fit_the_divergence_is_named(fused, change, message):
    with pytest.raises(ValueError, match=message):
        fused.exact_kl(*change(*two_policies(dtype=torch.float32)))


# ----------------------------------------------------------------------------- both beside their peers


@pytest.fixture(params=["reference", "kernels"])
def ours(request):
    """The reference, then the kernels: peers have to agree with both."""
    return reference if request.param == "reference" else request.getfixturevalue("fused")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_log_probs_are_minus_the_cross_entropy_of_pytorch(ours, temperature):
    hidden, weight, targets = inputs(19, 12, 101, spread=3)
    logprobs = ours.token_logprobs(hidden, weight, targets, temperature)[0]
    gradients = torch.autograd.grad(-logprobs.mean(), (hidden, weight))
    losses = [F.cross_entropy(hidden @ weight.T / temperature, targets, reduction="none")]
    # linear_cross_entropy knows no temperature: it goes into the hidden states. It is new in torch 2.13.
    if hasattr(F, "linear_cross_entropy") or tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13):
        losses.append(F.linear_cross_entropy(hidden / temperature, weight, targets, reduction="none"))
    for loss in losses:
        torch.testing.assert_close(-logprobs, loss, atol=1e-5, rtol=0)
        theirs = torch.autograd.grad(loss.mean(), (hidden, weight), retain_graph=True)
        for found, expected in zip(gradients, theirs, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("spread", "temperature"), [(USUAL, 0.7), (PEAKED, 1.7)])
def test_log_probs_and_entropy_are_those_of_liger(ours, spread, temperature):
    """Values and gradients, with random upstream gradients for both; 520 tokens are more than a chunk of Liger's."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction as Liger

    def liger(hidden, weight, targets, temperature):
        nll, entropy = Liger.apply(hidden, weight, targets, temperature, -100, 1, True)
        return -nll, entropy

    given, upstream = inputs(520, 12, 70, spread=spread), torch.randn(2, 520, generator=seeded(1))
    theirs = results_and_gradients(liger, *given, temperature, upstream)
    for name, found, expected in zip(
        RESULTS, results_and_gradients(ours.token_logprobs, *given, temperature, upstream), theirs, strict=True
    ):
        assert_near(found, expected, 2e-5, name)


LENGTHS = torch.tensor([7, 1, 4, 6, 2])  # of completions, at most 7 tokens long
AGGREGATIONS = {  # Liger's name: what each token of ours is divided by
    "dapo": LENGTHS.sum(),
    "bnpo": None,
    "grpo": len(LENGTHS) * LENGTHS[:, None],  # [B, 1]
    "dr_grpo": 5.0 * 11,  # B times a constant, here the longest that a completion may become
}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_loss_is_that_of_liger_for_every_aggregation(ours, aggregation):
    """From hidden states to the gradients in them and in the weight; padded, off-policy, with a reference."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    b, t, d, v, temperature = 5, 7, 12, 70, 0.7
    hidden, weight, targets = inputs(b * t, d, v)
    mask = torch.arange(t) < LENGTHS[:, None]  # [B, T]
    advantages = torch.tensor([1.5, -0.7, 0.4, -2.0, 0.9])
    generator = seeded(8)
    with torch.no_grad():
        logprobs = token_logprobs(hidden, weight, targets, temperature)[0].view(b, t)
    old_logprobs = logprobs + 0.4 * torch.randn(b, t, generator=generator)
    ref_logprobs = logprobs + 0.3 * torch.randn(b, t, generator=generator)

    logprobs = ours.token_logprobs(hidden, weight, targets, temperature)[0].view(b, t)
    loss, stats = ours.grpo_loss(
        logprobs, old_logprobs, ref_logprobs, advantages[:, None].expand(b, t), mask,
        clip_low=0.2, clip_high=0.3, kl_coef=0.1, denominator=AGGREGATIONS[aggregation],
    )  # fmt: skip
    gradients = torch.autograd.grad(2.0 * loss, (hidden, weight))

    liger = LigerFusedLinearGRPOLoss(
        beta=0.1, compiled=False, epsilon_low=0.2, epsilon_high=0.3, loss_type=aggregation, temperature=temperature,
        max_completion_length=11,
    )  # fmt: skip
    expected, (kl, clipped) = liger(
        hidden.view(b, t, d), weight, targets.view(b, t), mask.float(), advantages,
        ref_per_token_logps=ref_logprobs, old_per_token_logps=old_logprobs,
    )  # fmt: skip
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, found, theirs in zip(
        RESULTS[2:], gradients, torch.autograd.grad(2.0 * expected, (hidden, weight)), strict=True
    ):
        assert theirs.abs().max() > 0.01
        torch.testing.assert_close(found, theirs, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert (stats["kl"] / LENGTHS.sum()).item() == pytest.approx(kl.item(), rel=1e-5)
    both = stats["clip_low_fraction"] + stats["clip_high_fraction"]
    assert stats["clip_low_fraction"] > 0 < stats["clip_high_fraction"]
    assert (both / LENGTHS.sum()).item() == pytest.approx(clipped.item())


# ----------------------------------------------------------------------------- dispatch


def python(code: str, **environment: str | None) -> subprocess.CompletedProcess:
    """Runs `code` in a fresh interpreter; None takes a variable out of its environment."""
    merged = os.environ | {"SASR_KERNELS": None, "TRITON_INTERPRET": None} | environment
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={name: value for name, value in merged.items() if value is not None},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


CALLS = """
import sys, torch, kernels
hidden, weight, targets = torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 4])
logprobs, entropy = kernels.token_logprobs(hidden, weight, targets, temperature=0.5)
loss, stats = kernels.grpo_loss(
    logprobs, logprobs, None, entropy, torch.ones(2), clip_low=0.2, clip_high=0.2, kl_coef=0.0, denominator=2.0
)
kl = kernels.exact_kl(hidden, weight, hidden, weight)
print([round(x, 4) for x in (*logprobs.tolist(), *entropy.tolist(), loss.item(), *kl.tolist())])
print(*(name for name in ("logprob", "grpo", "kl") if f"kernels.{name}" in sys.modules))
"""
RESULT = str([-1.6094] * 2 + [1.6094] * 2 + [-1.6094] + [0.0] * 2)


def test_on_the_cpu_the_reference_is_used_and_triton_not_even_imported():
    done = python(CALLS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [RESULT, ""]


def test_the_kernels_can_be_asked_for_on_the_cpu_where_they_are_interpreted(fused):
    done = python(CALLS, SASR_KERNELS="triton", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace("-0.0", "0.0").splitlines() == [RESULT, "logprob grpo kl"]


def test_kernels_on_the_cpu_without_the_interpreter_are_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(kernels, "CHOICE", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tensors = fp32(batch())
    for call in (
        lambda: kernels.token_logprobs(*inputs(2, 3, 5)),
        lambda: kernels.grpo_loss(**tensors, **CLIP, kl_coef=0.0),
        lambda: kernels.exact_kl(*two_policies()),
    ):
        with pytest.raises(RuntimeError, match=r"SASR_KERNELS=triton.*TRITON_INTERPRET=1"):
            call()


def test_an_unknown_implementation_is_named():
    done = python("import kernels", SASR_KERNELS="nonsense")
    assert done.returncode != 0
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError: SASR_KERNELS='nonsense'")
    assert all(choice in error for choice in ("auto", "reference", "triton"))


# ----------------------------------------------------------------------------- ahead of time


def test_every_kernel_compiles_for_every_card_and_fits_it(fused, capsys):
    """Real code for cards that are not here: no spilled register, no more shared memory than a program may have."""
    from kernels.tiles import candidates

    done = subprocess.run(
        [sys.executable, "tests/aot.py"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, f"tests/aot.py failed:\n{done.stdout}\n{done.stderr}"
    table, rows = done.stdout.rsplit("\n", 2)[0], json.loads(done.stdout.splitlines()[-1])
    print(table)
    for row in rows:
        what = "{card}: {kernel} in {dtype}, tile {tile}".format(**row)
        assert row["spills"] == 0, f"{what} spills {row['spills']} registers or bytes"
        assert row["shared"] <= row["limit"], f"{what} takes {row['shared']} of {row['limit']} bytes of shared memory"
        assert row["registers"] > 0, f"{what}: the report was not understood"

    compiled = {(row["card"], row["kernel"], row["dtype"], row["tile"]) for row in rows}
    for card, architecture in (("sm_80", 80), ("sm_90", 90), ("sm_100", 100), ("gfx942", 0)):
        wanted = {(card, "grpo", "fp32", "-")}
        for kernel, accumulators in (("forward", 1), ("backward", 1), ("kl", 2)):
            for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
                in_use = candidates(architecture, dtype, accumulators)[0]
                wanted.add((card, kernel, name, "x".join(map(str, in_use))))
        assert not wanted - compiled, f"never compiled: {sorted(wanted - compiled)}"


# ----------------------------------------------------------------------------- on a card: `pytest -m gpu`


@pytest.fixture
def card(fused) -> torch.device:
    """The current CUDA device, for kernels that are compiled."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the kernels are interpreted in this run: choose `pytest -m gpu`, and nothing beside it")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=["its own loads", "pointers"])
def card_loads(request, card, monkeypatch) -> torch.device:
    """The card as it is, by TMA from Hopper on, then with the tiles and the loads of an A100, which run there too."""
    if request.param == "pointers":
        monkeypatch.setattr("kernels.tiles.architecture", lambda device: 80)
    return card


def on(card: torch.device, given) -> list[torch.Tensor]:
    """The same tensors there, as leaves."""
    return [tensor.detach().to(card).requires_grad_(tensor.requires_grad) for tensor in given]


# fp32 dots are three TF32 products, 22 bits of each factor (one alone would miss these bounds). 16-bit products are
# exact and summed in fp32; gradients are stored in 16 bits, and so is the slab that they come from.
VALUES = 5e-5
GRADIENTS = {torch.float32: 3e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GRADIENTS)
@pytest.mark.parametrize("shape", [(252, 507, 123), (300, 64, 1100), (1, 512, 5000), (257, 896, 20_000)])
@pytest.mark.parametrize(("spread", "temperature"), [(FLAT, 1.0), (USUAL, 0.5), (PEAKED, 1.7)])
def test_compiled_log_probs_equal_the_reference(fused, card_loads, shape, spread, temperature, dtype):
    given = on(card_loads, inputs(*shape, spread=spread, dtype=dtype))
    assert_equals_the_reference(fused.token_logprobs, *given, temperature, tolerance=VALUES, gradients=GRADIENTS[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GRADIENTS)
@pytest.mark.parametrize(("shape", "d_ref"), [((66, 507, 123), 24), ((300, 64, 1100), 896), ((1, 512, 20_000), 512)])
@pytest.mark.parametrize("spread", [FLAT, USUAL, PEAKED])
def test_compiled_divergences_equal_the_reference(fused, card_loads, shape, d_ref, spread, dtype):
    n, d, v = shape
    hidden, weight, _ = on(card_loads, inputs(n, d, v, spread=spread, dtype=dtype))
    ref_hidden, ref_weight, _ = on(card_loads, inputs(n, d_ref, v, spread=1 + spread, dtype=dtype, seed=1))
    exact = exact_kl(*(tensor.double() for tensor in (hidden, weight, ref_hidden, ref_weight)))
    assert_near(fused.exact_kl(hidden, weight, ref_hidden, ref_weight), exact, VALUES)
    assert fused.exact_kl(hidden, weight, hidden, weight).abs().max() < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GRADIENTS)
@pytest.mark.parametrize("shape", [(1,), (1025,), (7, 300), (5000,)])
def test_compiled_losses_equal_the_reference(fused, card, shape, dtype):
    gradients = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
    for seed in range(3):
        tensors = {name: tensor.to(card, dtype) for name, tensor in batch(shape, seed).items()}
        per_token = 1 + torch.rand(shape, generator=seeded(seed)).to(card)
        for denominator in (1.0, torch.tensor(3, device=card), per_token):
            for change in ({}, {"ref_logprobs": None}, {"mask": tensors["mask"].bool()}):
                assert_loss_equals_the_reference(
                    fused.grpo_loss, tensors | change, denominator=denominator, gradient=gradients[dtype]
                )
    empty = {name: tensor[:0] for name, tensor in tensors.items()}
    assert loss_of(empty, fused.grpo_loss)[0] == 0.0


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(512, 512, 5000), (256, 896, 151_936)])
@pytest.mark.parametrize("spread", [1.0, 5.0, 20.0])
def test_bf16_errors_are_at_most_twice_those_of_pytorch(fused, card, shape, spread):
    """PyTorch's logits are rounded to bf16 on their way through memory; the kernels' are not."""
    given = on(card, inputs(*shape, spread=spread, dtype=torch.bfloat16))
    upstream = torch.randn(2, shape[0], generator=seeded(1)).to(card)

    def pytorch(hidden, weight, targets, temperature):
        logprobs = F.log_softmax(F.linear(hidden, weight).float() / temperature, dim=-1)  # [N, V]
        return logprobs.gather(-1, targets[:, None]).squeeze(-1), -(logprobs.exp() * logprobs).sum(-1)

    hidden, weight, targets = given
    exact = results_and_gradients(token_logprobs, hidden.double(), weight.double(), targets, 0.8, upstream)
    theirs = results_and_gradients(pytorch, *given, 0.8, upstream)
    found = results_and_gradients(fused.token_logprobs, *given, 0.8, upstream)
    for name, ours, plain, expected in zip(RESULTS, found, theirs, exact, strict=True):
        error, of_pytorch = ((tensor.double() - expected).norm() for tensor in (ours, plain))
        assert error <= 2 * of_pytorch, f"{name}: {error:.3e}, PyTorch {of_pytorch:.3e}"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GRADIENTS)
def test_two_runs_on_a_card_give_the_same_bits(fused, card, dtype):
    given = on(card, inputs(1000, 896, 20_000, spread=5.0, dtype=dtype))
    upstream = torch.randn(2, 1000, generator=seeded(1)).to(card)
    tensors = {name: tensor.float().to(card) for name, tensor in batch((50_000,)).items()}

    def everything() -> list[torch.Tensor]:
        hidden, weight, _ = given
        logprobs = tensors["logprobs"].clone().requires_grad_()
        loss, stats = fused.grpo_loss(**(tensors | {"logprobs": logprobs}), **CLIP, kl_coef=0.05)
        return [
            *results_and_gradients(fused.token_logprobs, *given, 0.8, upstream),
            fused.exact_kl(hidden, weight, 1.1 * hidden, weight),
            loss.detach(),
            *torch.autograd.grad(loss, logprobs),
            *stats.values(),
        ]

    once = everything()
    for _ in range(3):
        for found, expected in zip(everything(), once, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GRADIENTS)
def test_on_a_card_too_a_tokens_bits_do_not_depend_on_its_batch(fused, card_loads, dtype):
    hidden, weight, targets = on(card_loads, inputs(300, 64, 20_000, dtype=dtype))
    with torch.no_grad():
        logprobs, entropy = fused.token_logprobs(hidden, weight, targets)
        kl = fused.exact_kl(hidden, weight, 2 * hidden, weight)
        for some in (slice(0, 1), slice(7, 8), slice(100, 230), slice(299, 300)):
            found = fused.token_logprobs(hidden[some], weight, targets[some])
            assert torch.equal(found[0], logprobs[some])
            assert torch.equal(found[1], entropy[some])
            assert torch.equal(fused.exact_kl(hidden[some], weight, 2 * hidden[some], weight), kl[some])


@pytest.mark.gpu
def test_more_logits_than_int32_can_count(fused, card_loads, monkeypatch):
    """16,384 tokens of a vocabulary of 151,936 words, all compared; the reference in fp32, in large slices."""
    n, d, v = 16_384, 64, 151_936
    assert n * v > 2**31
    generator = torch.Generator(card_loads).manual_seed(0)
    hidden = (2 * torch.randn(n, d, device=card_loads, generator=generator)).bfloat16()
    weight = (torch.randn(v, d, device=card_loads, generator=generator) / d**0.5).bfloat16()
    targets = torch.randint(v, (n,), device=card_loads, generator=generator)
    targets[-1] = v - 1
    upstream = torch.randn(2, n, device=card_loads, generator=generator)
    monkeypatch.setattr(reference, "MAX_LOGITS", 2**28)
    exact = results_and_gradients(token_logprobs, hidden.float(), weight.float(), targets, 0.8, upstream)
    found = results_and_gradients(fused.token_logprobs, hidden, weight, targets, 0.8, upstream)
    for name, ours, expected in zip(RESULTS, found, exact, strict=True):
        assert_near(ours, expected, 1e-4 if name in RESULTS[:2] else 2e-2, name)
        # The last rows by themselves, so that they are not measured by the largest entry of all.
        assert_near(ours[-100:], expected[-100:], 1e-4 if name in RESULTS[:2] else 2e-2, name)
    other = (1.5 * hidden.float()).bfloat16()
    some = torch.tensor([0, 1, 14_133, 14_134, 14_135, n - 1], device=card_loads)  # 14,134 * v passes 2**31
    expected = exact_kl(hidden[some].float(), weight.float(), other[some].float(), weight.float())
    assert_near(fused.exact_kl(hidden, weight, other, weight)[some], expected, 1e-4)


@pytest.mark.gpu
def test_more_hidden_numbers_than_int32_can_count(fused, card_loads):
    """A million tokens of 2,048 features, 4 GB in bf16; the last ones are compared."""
    d, v = 2048, 300
    n = 2**31 // d + 1000
    if torch.cuda.mem_get_info(card_loads)[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free memory on the card")
    generator = torch.Generator(card_loads).manual_seed(0)
    hidden = torch.randn(n, d, device=card_loads, generator=generator, dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(v, d, device=card_loads, generator=generator) / d**0.5).bfloat16()
    targets = torch.randint(v, (n,), device=card_loads, generator=generator)
    logprobs, entropy = fused.token_logprobs(hidden, weight, targets)
    (d_hidden,) = torch.autograd.grad((logprobs + 0.5 * entropy).sum(), hidden)
    kl = fused.exact_kl(hidden, weight, hidden, 2 * weight)
    for some in (slice(0, 500), slice(n - 1500, n)):  # the latter begins before the border
        last = hidden[some].detach().double().requires_grad_()
        exact = token_logprobs(last, weight.double(), targets[some])
        assert_near(logprobs[some], exact[0], VALUES, "logprobs")
        assert_near(entropy[some], exact[1], VALUES, "entropy")
        (expected,) = torch.autograd.grad((exact[0] + 0.5 * exact[1]).sum(), last)
        assert_near(d_hidden[some], expected, 2e-2, "d hidden")
        assert (d_hidden[some].double() - expected).norm() < 0.02 * expected.norm()
        assert_near(kl[some], exact_kl(last, weight.double(), last, 2 * weight.double()), VALUES, "divergence")


@pytest.mark.gpu
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("n", "d"), [(130, 64), (1, 64), (130, 61), (1, 3)])
def test_matrices_on_a_card_may_lie_in_memory_as_they_like(fused, card_loads, view, n, d):
    for dtype, gradients in GRADIENTS.items():
        hidden, weight, targets = on(card_loads, inputs(n, d, 300, dtype=dtype))
        for h, w in ((VIEWS[view](hidden), weight), (hidden, VIEWS[view](weight))):
            given = h, w, targets.repeat_interleave(2)[::2]
            assert_equals_the_reference(fused.token_logprobs, *given, tolerance=VALUES, gradients=gradients)
        ref_hidden, ref_weight = VIEWS[view](2 * hidden), VIEWS[view](weight)
        exact = exact_kl(hidden.double(), weight.double(), ref_hidden.double(), ref_weight.double())
        assert_near(fused.exact_kl(hidden, weight, ref_hidden, ref_weight), exact, VALUES)


@pytest.mark.gpu
def test_a_target_outside_the_vocabulary_touches_no_other_token_on_a_card_either(fused, card):
    hidden, weight, targets = on(card, inputs(5, 64, 300, dtype=torch.bfloat16))
    expected, _ = fused.token_logprobs(hidden, weight, targets)
    for wrong in (-100, 300, 301, 2**40):
        logprobs, _ = fused.token_logprobs(hidden, weight, targets.index_fill(0, torch.tensor([2], device=card), wrong))
        assert logprobs[2].isnan()
        others = [0, 1, 3, 4]
        assert torch.equal(logprobs[others], expected[others])
        assert torch.autograd.grad(logprobs[others].sum(), weight)[0].isfinite().all()


@pytest.mark.gpu
def test_no_value_of_an_argument_recompiles_a_kernel(fused, card, monkeypatch):
    """Triton 3.6 and 3.7 call jit_post_compile_hook for each variant new to the process, cached on disk or not."""
    import triton

    from kernels.tiles import Tile

    compiled = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **about: compiled.append(about["fn"].name)
    )
    # Sizes that no other test has compiled: else the first round would find all of it done.
    monkeypatch.setattr("kernels.tiles.candidates", lambda *_, **__: [Tile(32, 32, 32, 4, 2)])
    monkeypatch.setattr("kernels.grpo.BLOCK", 256)

    def everything(n, v, temperature, kl_coef, clip, denominator):
        hidden, weight, targets = on(card, inputs(n, 64, v, dtype=torch.bfloat16))
        logprobs, entropy = fused.token_logprobs(hidden, weight, targets, temperature)
        old, advantages = logprobs.detach() - 0.1, torch.ones_like(logprobs)
        options = {"clip_low": clip, "clip_high": clip, "kl_coef": kl_coef, "denominator": denominator}
        loss, _ = fused.grpo_loss(logprobs, old, old, advantages, advantages, **options)
        (loss + entropy.sum()).backward()
        fused.exact_kl(hidden, weight, 2 * hidden, weight)

    everything(300, 1100, 1.0, 0.04, 0.2, None)
    assert sorted(compiled) == ["_backward", "_forward", "_grpo", "_kl"]
    compiled.clear()
    for n, v in ((300, 1100), (1, 1100), (16, 1104), (17, 33), (4096, 2048)):
        per_token = torch.full((n,), 2.0, device=card)
        for temperature, kl_coef, clip, denominator in ((0.5, 0.0, 0.5, 3.0), (2.0, 1.0, 1.0, per_token)):
            everything(n, v, temperature, kl_coef, clip, denominator)
    assert compiled == []


@pytest.mark.gpu
def test_the_peak_of_memory_is_far_below_the_logits(fused, card):
    n, d, v = 8192, 256, 151_936
    logits = 2 * n * v  # bytes in bf16: 2.5 GB
    generator = torch.Generator(card).manual_seed(0)
    hidden = torch.randn(n, d, device=card, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(v, d, device=card, generator=generator) / d**0.5).bfloat16().requires_grad_()
    targets = torch.randint(v, (n,), device=card, generator=generator)

    def forward_and_backward():
        logprobs, entropy = fused.token_logprobs(hidden, weight, targets)
        torch.autograd.grad(logprobs.sum() + entropy.sum(), (hidden, weight))

    for work in (forward_and_backward, lambda: fused.exact_kl(hidden, weight, hidden, weight)):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        assert peak < logits / 5, f"{peak / 2**20:.0f} MiB beside logits of {logits / 2**20:.0f} MiB"


@pytest.mark.gpu
def test_under_autocast_a_weight_in_fp32_gets_a_gradient_in_fp32(fused, card):
    """Products in bf16, sums and the master weight's gradient in fp32: not a bf16 result in a wider type."""
    hidden, weight, targets = on(card, inputs(300, 64, 1100))
    upstream = torch.randn(2, 300, generator=seeded(1)).to(card)
    for activations in (torch.bfloat16, torch.float32):
        h = hidden.detach().to(activations).requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            outputs = fused.token_logprobs(h, weight, targets, 0.8)
            kl = fused.exact_kl(h, weight, 2 * h, weight)
        d_hidden, d_weight = torch.autograd.grad(outputs, (h, weight), list(upstream))
        assert (d_hidden.dtype, d_weight.dtype) == (activations, torch.float32)
        assert (d_weight != d_weight.bfloat16()).any()
        rounded = h.detach().bfloat16().double(), weight.detach().bfloat16().double()
        exact = results_and_gradients(token_logprobs, *rounded, targets, 0.8, upstream)
        for name, found, expected in zip(RESULTS, (*outputs, d_hidden, d_weight), exact, strict=True):
            assert_near(found.detach(), expected, VALUES if name in RESULTS[:2] else 2e-2, name)
        assert_near(kl, exact_kl(*rounded, 2 * rounded[0], rounded[1]), VALUES)


@pytest.mark.gpu
def test_on_a_card_the_kernels_are_the_default(card, monkeypatch):
    monkeypatch.setattr(kernels, "CHOICE", "auto")
    hidden, weight, targets = on(card, inputs(5, 64, 300))
    tensors = {name: tensor.float().to(card) for name, tensor in batch().items()}
    in_fp64 = kernels.token_logprobs(hidden.double(), weight.double(), targets)[0]
    assert in_fp64.dtype == torch.float64  # for which there is no kernel

    def refuse(*_, **__):
        raise AssertionError("the reference was called")

    for name in ("token_logprobs", "grpo_loss", "exact_kl"):
        monkeypatch.setattr(reference, name, refuse)
    assert_near(kernels.token_logprobs(hidden, weight, targets)[0].detach(), in_fp64.detach(), VALUES)
    assert kernels.grpo_loss(**tensors, **CLIP, kl_coef=0.0)[0].isfinite()
    assert kernels.exact_kl(hidden, weight, hidden, weight).abs().max() < 1e-5
    monkeypatch.setattr(kernels, "CHOICE", "reference")
    with pytest.raises(AssertionError, match="the reference was called"):
        kernels.token_logprobs(hidden, weight, targets)


@pytest.mark.gpu
def test_nothing_waits_for_the_card(fused, card):
    """No .item(), no copy to the host: the processor runs ahead, and the card is never idle on its account."""
    hidden, weight, targets = on(card, inputs(300, 64, 1100, dtype=torch.bfloat16))
    tensors = {name: tensor.float().to(card) for name, tensor in batch((300,)).items()}
    mask, ref_logprobs = tensors.pop("mask").bool(), tensors.pop("ref_logprobs")
    per_token = torch.full((300,), 7, device=card)

    def everything():
        logprobs, entropy = fused.token_logprobs(hidden, weight, targets)
        fused.exact_kl(hidden, weight, 2 * hidden, weight)
        given = tensors | {"logprobs": logprobs, "mask": mask}
        loss = entropy.sum()
        for denominator in (None, 7.0, per_token.sum(), per_token):
            for ref in (None, ref_logprobs):
                part, stats = fused.grpo_loss(**given, ref_logprobs=ref, **CLIP, kl_coef=0.1, denominator=denominator)
                loss = loss + part + sum(stats.values())
        loss.backward()

    everything()  # compiling may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_the_kernels_run_on_the_current_stream(fused, card):
    """Inputs made late on a side stream: work on another stream would read them before they are there."""
    given = on(card, inputs(300, 64, 1100, dtype=torch.bfloat16))
    upstream = torch.randn(2, 300, generator=seeded(1)).to(card)
    expected = results_and_gradients(fused.token_logprobs, *given, 0.8, upstream)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = [torch.zeros_like(tensor) for tensor in given]
        torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
        for tensor, value in zip(late, given, strict=True):
            tensor.copy_(value.detach())
        found = results_and_gradients(fused.token_logprobs, *late, 0.8, upstream)
    torch.cuda.current_stream().wait_stream(stream)
    for name, ours, theirs in zip(RESULTS, found, expected, strict=True):
        assert torch.equal(ours, theirs), name
