"""The three functions of the hot path, against fp64 brute force, PyTorch's own losses, and numbers worked by hand.

`kernels.reference` is the definition that other implementations are compared with, so it is compared here with
things that share none of its code: the whole [N, V] log-softmax in fp64, `torch.nn.functional`, and pencil and paper.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    outputs = function(hidden, weight, targets, temperature)
    gradients = torch.autograd.grad(outputs, (hidden, weight), [u.to(outputs[0].dtype) for u in upstream])
    return [tensor.detach() for tensor in (*outputs, *gradients)]


def assert_equals_brute_force(hidden, weight, targets, temperature, tolerance):
    """Values, and gradients under random upstream gradients for both outputs, relative to each one's largest entry."""
    upstream = torch.randn(2, len(targets), generator=seeded(99), dtype=torch.float64)
    ours = results_and_gradients(token_logprobs, hidden, weight, targets, temperature, upstream)
    exact = results_and_gradients(brute_force, hidden.double(), weight.double(), targets, temperature, upstream)
    for name, found, expected in zip(("logprobs", "entropy", "d hidden", "d weight"), ours, exact, strict=True):
        assert found.shape == expected.shape, name
        scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
        torch.testing.assert_close(
            found.double(), expected, atol=tolerance * scale, rtol=0, msg=lambda m, n=name: n + m
        )


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
    monkeypatch.setattr(reference, "LOGITS_AT_ONCE", rows * 31)
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
    monkeypatch.setattr(reference, "LOGITS_AT_ONCE", rows * 29 + 3)
    sliced = results_and_gradients(token_logprobs, hidden, weight, targets, 0.9, upstream)
    for found, expected in zip(sliced, whole, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    monkeypatch.setattr(reference, "LOGITS_AT_ONCE", 1)  # less than one row: then one row
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
    n, d, v = 96, 4, 151_936
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
    assert made <= reference.LOGITS_AT_ONCE < n * v
    assert kept <= v * d  # nothing larger than the weight waits for backward
    monkeypatch.setattr(reference, "LOGITS_AT_ONCE", n * v)
    made, kept = largest()
    assert made == kept == n * v  # which this test would have seen


def test_exact_kl_never_holds_the_logits_of_all_tokens():
    n, d, v = 96, 2, 151_936
    hidden, weight, _ = inputs(n, d, v)
    with LargestTensor() as record:
        exact_kl(hidden, weight, hidden, weight)
    assert v <= record.numel <= reference.LOGITS_AT_ONCE < n * v


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_token_logprobs_are_minus_the_cross_entropy_of_pytorch(temperature):
    hidden, weight, targets = inputs(19, 12, 101, spread=3)
    ours = token_logprobs(hidden, weight, targets, temperature)[0]
    gradients = torch.autograd.grad(-ours.mean(), (hidden, weight))
    # linear_cross_entropy knows no temperature: it goes into the hidden states. It is new in torch 2.13.
    losses = [F.cross_entropy(hidden @ weight.T / temperature, targets, reduction="none")]
    if hasattr(F, "linear_cross_entropy"):
        losses.append(F.linear_cross_entropy(hidden / temperature, weight, targets, reduction="none"))
    for loss in losses:
        torch.testing.assert_close(-ours, loss, atol=1e-5, rtol=0)
        theirs = torch.autograd.grad(loss.mean(), (hidden, weight), retain_graph=True)
        for found, expected in zip(gradients, theirs, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


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
    assert stats["clip_fraction"].item() == clipped


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


def loss_of(tensors: dict, **options) -> tuple[float, torch.Tensor, dict]:
    """Loss, gradient in the log-probs, statistics."""
    logprobs = tensors["logprobs"].clone().requires_grad_()
    loss, stats = grpo_loss(**(tensors | {"logprobs": logprobs}), **(CLIP | {"kl_coef": 0.05} | options))
    loss.backward()
    return loss.item(), logprobs.grad, stats


def test_the_loss_is_the_mean_over_the_tokens_that_count():
    tensors = batch()
    total, count, kl, clipped = 0.0, 0, 0.0, 0
    for lp, old, ref, advantage, counts in zip(*(t.flatten().tolist() for t in tensors.values()), strict=True):
        if counts:
            ratio, quotient = math.exp(lp - old), math.exp(ref - lp)
            total += min(ratio * advantage, min(max(ratio, 0.8), 1.3) * advantage)
            kl += quotient - math.log(quotient) - 1
            clipped += (ratio > 1.3 and advantage > 0) or (ratio < 0.8 and advantage < 0)
            count += 1
    assert 0 < clipped < count < tensors["mask"].numel()
    loss, gradient, stats = loss_of(tensors)
    assert loss == pytest.approx(-(total - 0.05 * kl) / count)
    assert stats["kl"].item() == pytest.approx(kl)
    assert stats["clip_fraction"].item() == clipped
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
            assert sum(part[2][name] for part in parts).item() == pytest.approx(value.item())


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
    assert set(stats) == {"kl", "clip_fraction"}
    assert not any(value.requires_grad for value in stats.values())


def test_a_batch_without_tokens_has_loss_zero_and_gradient_zero():
    tensors = batch()
    tensors["mask"].zero_()
    loss, gradient, stats = loss_of(tensors)
    assert loss == 0.0
    assert (gradient == 0).all()
    assert {name: value.item() for name, value in stats.items()} == {"kl": 0.0, "clip_fraction": 0.0}


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
    monkeypatch.setattr(reference, "LOGITS_AT_ONCE", rows * 23)
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


# ----------------------------------------------------------------------------- dispatch


def python(code: str, choice: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"SASR_KERNELS": choice},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def test_an_unknown_implementation_is_named():
    done = python("import kernels", "nonsense")
    assert done.returncode != 0
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError: SASR_KERNELS='nonsense'")
    assert "reference" in error


def test_the_reference_can_be_asked_for():
    code = (
        "import kernels\n"
        "for name in ('token_logprobs', 'grpo_loss', 'exact_kl'):\n"
        "    print(getattr(kernels, name) is getattr(kernels.reference, name))"
    )
    done = python(code, "reference")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"] * 3
