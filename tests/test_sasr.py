"""The algorithm: controllers by hand, advantages and losses against formulas written out here, one update."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sasr
from data import Grade, knights_knaves
from data.batch import Batch, default_max_tokens
from data.tokenized import TokenizedTask
from data.tokenizer import Codec
from model import ModelConfig, Transformer
from run.checkpoint import named_tensors
from run.evaluation import evaluate
from run.report import dropped_report
from run.setup import load_task_spec
from sasr import BadStep, Config, SasrController, group_advantages

# ---- Controllers -----------------------------------------------------------------------------------------------------


def test_sasr_probability_by_hand():
    controller = SasrController(gamma=1.0)
    controller.observe_warmup(5.0)
    controller.observe_warmup(2.0)  # the last one counts
    assert controller.sft_probability() == pytest.approx(0.5)
    controller.observe_sft(6.0)
    assert controller.sft_probability() == pytest.approx(6 / (6 + 2))
    controller.observe_sft(0.5)
    assert controller.sft_probability() == pytest.approx(0.5 / 2.5)


@pytest.mark.parametrize(("gamma", "expected"), [(0.5, 2 / 3), (3.0, 1 / 4), (0.0, 1.0)])
def test_gamma_weighs_the_warmup_norm(gamma, expected):
    controller = SasrController(gamma=gamma)
    controller.observe_warmup(7.0)
    assert controller.sft_probability() == pytest.approx(expected)


def test_warmup_norm_may_be_a_mean_over_a_window_or_an_ema():
    mean = SasrController(warmup_norm="mean", window=2)
    ema = SasrController(warmup_norm="ema", ema=0.75)
    for norm in (8.0, 4.0, 2.0):
        mean.observe_warmup(norm)
        ema.observe_warmup(norm)
    assert mean.g_warmup == pytest.approx((4 + 2) / 2)
    assert ema.g_warmup == pytest.approx(0.75 * (0.75 * 8 + 0.25 * 4) + 0.25 * 2)


def test_current_norm_may_be_an_ema():
    controller = SasrController(current_norm="ema", ema=0.75)
    controller.observe_warmup(4.0)
    controller.observe_sft(8.0)
    assert controller.sft_probability() == pytest.approx(5 / (5 + 4))  # 0.75 * 4 + 0.25 * 8 = 5


def test_no_gradient_anywhere_means_no_sft():
    controller = SasrController()
    controller.observe_warmup(0.0)
    assert controller.sft_probability() == 0.0


def test_sasr_without_a_norm_says_so():
    with pytest.raises(RuntimeError, match="no warm-up norm"):
        SasrController().sft_probability()


@given(st.floats(1e-6, 1e6), st.floats(0, 1e6), st.floats(0, 100))
def test_sasr_probability_is_a_probability_and_grows_with_the_norm(warmup, current, gamma):
    controller = SasrController(gamma=gamma)
    controller.observe_warmup(warmup)
    controller.observe_sft(current)
    p = controller.sft_probability()
    assert 0 <= p <= 1
    controller.observe_sft(current * 2)
    assert controller.sft_probability() >= p


def test_controller_state_goes_through_json_and_back():
    controller = SasrController(warmup_norm="mean", window=3)
    for norm in (3.0, 1.0, 0.1):
        controller.observe_warmup(norm)
    controller.observe_sft(0.7)
    other = SasrController(warmup_norm="mean", window=3)
    other.load_state_dict(controller.state_dict())
    assert other.sft_probability() == controller.sft_probability()
    controller.observe_warmup(9.0)
    other.observe_warmup(9.0)
    assert other.g_warmup == controller.g_warmup


# ---- Advantages ------------------------------------------------------------------------------------------------------

REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])


def test_zscore_advantages_by_hand():
    advantages = group_advantages(REWARDS, "zscore", eps=0.0)
    third = math.sqrt(3) / 4  # std of (1, 0, 0, 0): mean 1/4, variance 3/16
    assert advantages[0].tolist() == pytest.approx([1, -1, -1, 1])
    assert advantages[1].tolist() == pytest.approx([0.75 / third, -0.25 / third, -0.25 / third, -0.25 / third])
    eps = 0.5
    assert group_advantages(REWARDS, "zscore", eps)[0].tolist() == pytest.approx([0.5, -0.5, -0.5, 0.5])


def test_a_group_that_agrees_has_no_advantage_and_a_group_of_one_is_no_nan():
    for mode in ("zscore", "centered", "median"):
        assert group_advantages(REWARDS, mode)[2].tolist() == [0, 0, 0, 0]
        assert group_advantages(torch.tensor([[0.3], [1.0]]), mode).tolist() == [[0], [0]]


def test_a_group_that_agrees_on_a_partial_reward_has_exactly_no_advantage():
    """The mean of 16 times 0.1 is not 0.1 in floating point; the difference must not become a gradient."""
    for group in (7, 16):
        for mode in ("zscore", "centered", "median"):
            assert not group_advantages(torch.full((1, group), 0.1), mode).any()


def test_whole_number_rewards_will_do():
    assert group_advantages(torch.tensor([[1, 0, 0, 1]]), eps=0.0).tolist() == [[1, -1, -1, 1]]


def test_centered_and_median_advantages_by_hand():
    assert group_advantages(REWARDS, "centered")[1].tolist() == [0.75, -0.25, -0.25, -0.25]
    graded = torch.tensor([[0.0, 0.2, 0.9, 1.0], [0.0, 0.5, 0.5, 1.0]])
    assert group_advantages(graded, "median").tolist() == [[-1, -1, 1, 1], [-1, 0, 0, 1]]


def test_unknown_advantage_is_named():
    with pytest.raises(ValueError, match="'softmax'"):
        group_advantages(REWARDS, "softmax")


# ---- One update for both ---------------------------------------------------------------------------------------------


def tiny_model(seed=0, **changes):
    shape = {
        "vocab_size": 23,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
    }
    torch.manual_seed(seed)
    return Transformer(ModelConfig(**(shape | changes))).double()


def ragged_batch(count=7, **more):
    draw = torch.Generator().manual_seed(3)

    def ids(low, high):
        length = int(torch.randint(low, high, (), generator=draw))
        return torch.randint(0, 23, (length,), generator=draw).tolist()

    return Batch([ids(1, 6) for _ in range(count)], [ids(1, 12) for _ in range(count)], **more)


def tokens_of(batch):
    return sum(map(len, batch.completions))


def logprobs_by_hand(model, batch):
    """Token by token and one sequence at a time, from full logits: B tensors with a graph."""
    out = []
    for prompt, completion in zip(batch.prompts, batch.completions, strict=True):
        logits = model.logits(model(torch.tensor([prompt + completion])))[0] / batch.temperature
        logprobs = logits.log_softmax(-1)
        out.append(torch.stack([logprobs[len(prompt) - 1 + t, token] for t, token in enumerate(completion)]))
    return out


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def norm(grads):
    return torch.sqrt(sum((g**2).sum() for g in grads)).item()


def assert_same_gradient(model, stats, loss, tolerance=1e-9):
    expected = gradients(model, loss)
    assert stats["loss"] == pytest.approx(loss.item(), abs=tolerance)
    assert stats["grad_norm"] == pytest.approx(norm(expected), rel=tolerance)
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=tolerance, atol=tolerance)


FREE = {"max_grad_norm": 0.0}  # no clipping: compare raw gradients
WHOLE = 10_000  # tokens at once: the batch is one micro-batch


def test_sft_is_the_token_mean_of_the_negative_log_likelihood():
    model, batch = tiny_model(), ragged_batch()
    stats = sasr.accumulate_gradient(model, [sasr.Part(batch, sasr.sft_objective)], Config(**FREE), WHOLE)
    assert_same_gradient(model, stats, -torch.cat(logprobs_by_hand(model, batch)).mean())


def test_dft_gradient_is_minus_p_times_grad_log_p():
    model, batch = tiny_model(), ragged_batch()
    stats = sasr.accumulate_gradient(
        model, [sasr.Part(batch, sasr.sft_objective)], Config(sft_loss="dft", **FREE), WHOLE
    )
    logprobs = torch.cat(logprobs_by_hand(model, batch))
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for logprob in logprobs:
        for total, part in zip(
            expected, torch.autograd.grad(logprob, model.parameters(), retain_graph=True), strict=True
        ):
            total -= logprob.exp().detach() * part / len(logprobs)
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-9)
    assert stats["loss"] == pytest.approx(-(logprobs.exp() * logprobs).mean().item())


def grpo_batch(temperature=1.0):
    batch = ragged_batch(temperature=temperature, advantages=torch.tensor([1.0, -1.0, 0.5, 2.0, -0.3, -2.0, 1.5]))
    draw = torch.Generator().manual_seed(9)
    current = torch.cat(logprobs_by_hand(tiny_model(), batch)).detach()
    batch.old_logprobs = current + 0.4 * torch.randn(current.shape, generator=draw).double()
    batch.ref_logprobs = current + 0.4 * torch.randn(current.shape, generator=draw).double()
    return batch


def test_grpo_is_the_clipped_objective_with_k3():
    model, batch = tiny_model(), grpo_batch(temperature=0.8)
    config = Config(clip_low=0.2, clip_high=0.3, kl_coef=0.1, **FREE)
    stats = sasr.accumulate_gradient(model, [sasr.Part(batch, sasr.grpo_objective)], config, WHOLE)
    total, low, high, kl, ratios = 0.0, 0, 0, 0.0, []
    old_parts, ref_parts = (
        flat.split(list(map(len, batch.completions))) for flat in (batch.old_logprobs, batch.ref_logprobs)
    )
    parts = zip(logprobs_by_hand(model, batch), old_parts, ref_parts, batch.advantages, strict=True)
    for new, old, ref, advantage in parts:
        for lp, lp_old, lp_ref in zip(new, old, ref, strict=True):
            ratio = (lp - lp_old).exp()
            k3 = (lp_ref - lp).exp() - (lp_ref - lp) - 1
            if advantage > 0:
                gain = ratio * advantage if ratio <= 1.3 else torch.tensor(1.3) * advantage
                high += (ratio > 1.3).item()
            else:
                gain = ratio * advantage if ratio >= 0.8 else torch.tensor(0.8) * advantage
                low += (ratio < 0.8).item()
            total, kl = total + gain - 0.1 * k3, kl + k3.item()
            ratios.append(ratio.item())
    assert min(low, high) > 0, "the case should show all kinds of token"
    assert_same_gradient(model, stats, -total / tokens_of(batch), tolerance=1e-7)
    assert stats["clip_low_fraction"] == pytest.approx(low / tokens_of(batch))
    assert stats["clip_high_fraction"] == pytest.approx(high / tokens_of(batch))
    assert stats["ratio_mean"] == pytest.approx(sum(ratios) / len(ratios))
    assert stats["ratio_max"] == pytest.approx(max(ratios))
    assert stats["kl"] == pytest.approx(kl / tokens_of(batch))


def test_on_policy_grpo_is_the_policy_gradient():
    model, batch = tiny_model(), ragged_batch(advantages=torch.tensor([1.0, -1.0, 0.5, 2.0, -0.3, -2.0, 1.5]))
    stats = sasr.accumulate_gradient(model, [sasr.Part(batch, sasr.grpo_objective)], Config(**FREE), WHOLE)
    weighted = [a * part for a, part in zip(batch.advantages, logprobs_by_hand(model, batch), strict=True)]
    expected = gradients(model, -torch.cat(weighted).sum() / tokens_of(batch))
    assert stats["grad_norm"] == pytest.approx(norm(expected), rel=1e-9)
    assert stats["clip_low_fraction"] == stats["clip_high_fraction"] == 0
    assert stats["ratio_mean"] == stats["ratio_max"] == 1


def test_a_token_of_a_long_completion_counts_less_only_where_each_completion_counts_the_same():
    completions = [[7] * length for length in (1, 3, 4)]
    assert sasr.loss_denominators(completions, "token-mean", 10).tolist() == [8, 8, 8]
    assert sasr.loss_denominators(completions, "grpo", 10).tolist() == [3, 9, 12]
    assert sasr.loss_denominators(completions, "dr_grpo", 10).tolist() == [30, 30, 30]


@pytest.mark.parametrize("budget", [1, 60, 0])
def test_grpo_with_the_mean_of_each_completion_by_hand(budget):
    model, batch = tiny_model(), ragged_batch(advantages=torch.tensor([1.0, -1.0, 0.5, 2.0, -0.3, -2.0, 1.5]))
    batch.denominators = sasr.loss_denominators(batch.completions, "grpo", 12)
    max_tokens = default_max_tokens(budget, torch.device("cpu"))
    stats = sasr.accumulate_gradient(model, [sasr.Part(batch, sasr.grpo_objective)], Config(**FREE), max_tokens)
    means = [a * part.mean() for a, part in zip(batch.advantages, logprobs_by_hand(model, batch), strict=True)]
    expected = gradients(model, -sum(means) / len(means))
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-9)
    assert stats["loss"] == pytest.approx(-batch.advantages.mean().item())  # the ratio is 1


@pytest.mark.parametrize("objective", ["sft", "dft", "grpo"])
@pytest.mark.parametrize("budget", [1, 20, 60])
def test_the_cut_into_micro_batches_changes_nothing(objective, budget):
    model, batch = tiny_model(), grpo_batch()
    function = sasr.grpo_objective if objective == "grpo" else sasr.sft_objective
    config = Config(sft_loss="dft" if objective == "dft" else "nll", kl_coef=0.1, **FREE)
    results = []
    for tokens in (WHOLE, budget):
        stats = sasr.accumulate_gradient(model, [sasr.Part(batch, function)], config, tokens)
        results.append((stats, [p.grad.clone() for p in model.parameters()]))
    (whole, whole_grads), (cut, cut_grads) = results
    assert cut.pop("padding_fraction") <= whole.pop("padding_fraction") < 1
    assert cut.pop("tokens_read") <= whole.pop("tokens_read")
    assert cut == pytest.approx(whole, rel=1e-9)
    torch.testing.assert_close(cut_grads, whole_grads, rtol=1e-9, atol=1e-12)


def test_in_fp32_too_the_cut_changes_less_than_1e_5():
    model, batch = tiny_model().float(), ragged_batch()
    norms = []
    for tokens in (WHOLE, 1):
        norms.append(
            sasr.accumulate_gradient(model, [sasr.Part(batch, sasr.sft_objective)], Config(**FREE), tokens)["grad_norm"]
        )
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_prompt_is_read_once_for_its_completions(monkeypatch):
    model, read = tiny_model(), []
    forward = Transformer.forward
    monkeypatch.setattr(
        Transformer,
        "forward",
        lambda self, ids, *more, **named: read.append(ids.shape) or forward(self, ids, *more, **named),
    )
    prompts = [[1, 2, 3, 4], [5, 6]]
    batch = Batch([prompts[i // 3] for i in range(6)], [[7], [8, 9], [7, 8, 9], [4, 4], [9], [3, 2, 1]])
    stats = sasr.accumulate_gradient(model, [sasr.Part(batch, sasr.sft_objective)], Config(), WHOLE)
    assert read == [(2, 4), (6, 2)]  # both prompts, and what precedes the last tokens of the completions
    assert stats["padding_fraction"] == pytest.approx((2 + 6) / (2 * 4 + 6 * 2))
    read.clear()
    batch = Batch([[1, 2], [1, 2]], [[3], [4]])
    sasr.accumulate_gradient(model, [sasr.Part(batch, sasr.sft_objective)], Config(), WHOLE)
    assert read == [(1, 2)]  # completions of one token have nothing to read


def test_the_norm_is_taken_before_clipping_and_the_gradient_after():
    model, batch = tiny_model(), ragged_batch()
    free = sasr.accumulate_gradient(model, [sasr.Part(batch, sasr.sft_objective)], Config(**FREE), WHOLE)["grad_norm"]
    clipped = sasr.accumulate_gradient(
        model, [sasr.Part(batch, sasr.sft_objective)], Config(max_grad_norm=free / 10), WHOLE
    )
    assert clipped["grad_norm"] == pytest.approx(free)
    assert norm([p.grad for p in model.parameters()]) == pytest.approx(free / 10, rel=1e-4)


def test_an_empty_completion_adds_nothing_and_no_nan():
    model, batch = tiny_model(), ragged_batch()
    expected = sasr.accumulate_gradient(model, [sasr.Part(batch, sasr.sft_objective)], Config(**FREE), WHOLE)
    batch.prompts.append([1, 2])
    batch.completions.append([])
    found = sasr.accumulate_gradient(model, [sasr.Part(batch, sasr.sft_objective)], Config(**FREE), 1)
    of_the_cut = {key: found[key] for key in ("padding_fraction", "tokens_read")}
    assert found == pytest.approx(expected | of_the_cut)


def test_padding_is_the_share_of_tokens_read_that_are_none():
    model = tiny_model()
    batch = Batch([[1, 2], [1, 2, 3], [1]], [[4, 5], [4, 5, 6], [4]])  # 3, 5 and 1 tokens are read, as 3 rows of 5
    stats = sasr.accumulate_gradient(model, [sasr.Part(batch, sasr.sft_objective)], Config(), WHOLE)
    assert (stats["padding_fraction"], stats["tokens_read"]) == (pytest.approx(1 - 9 / 15), 15)
    assert stats["tokens_trained"] == 6
    alone = sasr.accumulate_gradient(model, [sasr.Part(batch, sasr.sft_objective)], Config(), 1)
    assert alone["padding_fraction"] == 0


def test_logprobs_are_in_the_order_of_the_batch():
    model, batch = tiny_model().float(), ragged_batch(temperature=1.5)
    logprobs, _ = sasr.compute_logprobs(model, batch, 30)
    torch.testing.assert_close(logprobs, torch.cat(logprobs_by_hand(model, batch)).detach())


# ---- Learning rate, order, alpha -------------------------------------------------------------------------------------


def rates(lr_schedule="constant", **flags):
    config = Config(warmup_steps=4, steps=8, warmup_lr=1.0, lr=0.5, lr_schedule=lr_schedule, **flags)
    return [sasr.learning_rate(config, step) for step in range(1, 13)]


def test_each_stage_has_its_rate_and_rewarms():
    assert rates(lr_warmup_steps=2) == [0.5, 1, 1, 1, 0.25, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]


def test_cosine_falls_in_each_stage():
    got = rates(lr_warmup_steps=0, lr_schedule="cosine")
    assert got[:4] == pytest.approx([(1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)])
    assert got[4:] == pytest.approx([0.25 * (1 + math.cos(math.pi * t / 8)) for t in range(8)])


def test_wsd_is_stable_then_falls_to_nearly_zero():
    got = rates(lr_warmup_steps=0, lr_schedule="wsd", decay_fraction=0.5)
    assert got == pytest.approx([1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.375, 0.25, 0.125])


def test_a_wsd_rate_before_the_decay_does_not_depend_on_the_length_of_the_run():
    short = Config(warmup_steps=4, steps=8, lr_schedule="wsd", decay_fraction=0.5)
    long = dataclasses.replace(short, steps=100, decay_fraction=0.9)
    assert [sasr.learning_rate(short, s) for s in range(1, 9)] == [sasr.learning_rate(long, s) for s in range(1, 9)]


def test_the_optimizer_is_not_moved_by_a_gradient_that_is_not_finite(tmp_path, monkeypatch):
    trainer = small_trainer(tmp_path)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    sft_step(trainer)
    after = {name: p.clone() for name, p in trainer.model.named_parameters()}
    assert any((before[name] != after[name]).any() for name in before)
    original = sasr.accumulate_gradient
    monkeypatch.setattr(sasr, "accumulate_gradient", lambda *arguments: original(*arguments) | {"grad_norm": math.nan})
    with pytest.raises(BadStep):
        sft_step(trainer)
    assert all((p == after[name]).all() for name, p in trainer.model.named_parameters())


# ---- The trainer -----------------------------------------------------------------------------------------------------

SMALL = {
    "task": "knights-knaves:train_size=40,test_size=12",
    "ood_task": "none",
    "hidden_size": 16,
    "layers": 1,
    "heads": 1,
    "warmup_steps": 3,
    "steps": 4,
    "sft_batch_size": 4,
    "prompts_per_step": 2,
    "group_size": 3,
    "max_new_tokens": 6,
    "eval_examples": 8,
    "eval_every": 0,
    "device": "cpu",
}


def small_trainer(tmp_path, **changes):
    return sasr.Trainer(Config(**(SMALL | {"out": str(tmp_path / "run")} | changes)))


def sft_step(trainer):
    """An SFT step that no controller hears of; its record."""
    record = {"kind": "sft"}
    controller, trainer.controller = trainer.controller, SasrController()
    sasr.sft_step(trainer, record)
    trainer.controller = controller
    return record


def grpo_step(trainer):
    record = {"kind": "grpo"}
    sasr.grpo_step(trainer, record, 0)
    return record


def probe(trainer):
    """The norm of a probe that no controller hears of."""
    controller, trainer.controller = trainer.controller, SasrController()
    sasr.probe(trainer)
    heard, trainer.controller = trainer.controller, controller
    return heard.g_last


def samples_of(groups):
    return [s for group in groups for s in group.samples]


def counted(trainer, record):
    """The record of a step, which now has been taken."""
    trainer.state.finish_step(record, 0.0)
    return record


def reward_with(trainer, rewards):
    """Grade the completions of each rollout with these rewards [Q, G], whatever they are; 1 is correct."""
    given = itertools.cycle(rewards.flatten().tolist())

    def verify(text, example):
        reward = next(given)
        return Grade(reward, correct=reward == 1, well_formed=reward > 0)

    trainer.task.source = dataclasses.replace(trainer.task.source, verify=verify)


def test_a_group_without_signal_does_not_move_the_weights_and_its_step_is_counted(tmp_path):
    trainer = small_trainer(tmp_path)
    before = [p.clone() for p in trainer.model.parameters()]
    for rewards in (torch.ones(2, 3), torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0]]), torch.zeros(2, 3)):
        reward_with(trainer, rewards)
        record = counted(trainer, grpo_step(trainer) | {"phase": "adaptive", "kind": "grpo"})
        if rewards.std(dim=1).any():
            assert record["signal_groups"] == 1
            before = [p.clone() for p in trainer.model.parameters()]
    assert (trainer.state.grpo_steps, trainer.state.grpo_skipped) == (3, 2)
    assert record["zero_variance_fraction"] == 1.0
    assert record["grad_norm"] == 0.0
    assert all((p == old).all() for p, old in zip(trainer.model.parameters(), before, strict=True))


@pytest.mark.parametrize("aggregation", ["token-mean", "grpo", "dr_grpo"])
def test_leaving_out_completions_without_advantage_does_not_change_the_gradient(aggregation, tmp_path, monkeypatch):
    """Two groups, one of them agreeing: its completions must still count in the denominators."""
    trainer = small_trainer(tmp_path, max_grad_norm=0.0, loss_aggregation=aggregation)
    rewards = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    reward_with(trainer, rewards)
    drawn, original = [], sasr.draw_groups
    monkeypatch.setattr(sasr, "draw_groups", lambda *given: drawn.append(original(*given)) or drawn[-1])
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
    record = grpo_step(trainer)
    batch = Batch.of((group.prompt, s.tokens) for group in drawn[0] for s in group.samples)
    advantages = group_advantages(rewards).flatten()
    weighted = [a * part for a, part in zip(advantages, logprobs_by_hand(trainer.model, batch), strict=True)]
    loss = {
        "token-mean": -torch.cat(weighted).sum() / tokens_of(batch),
        "grpo": -sum(part.mean() for part in weighted) / 6,
        "dr_grpo": -torch.cat(weighted).sum() / (6 * trainer.task.max_new_tokens),
    }
    expected = gradients(trainer.model, loss[aggregation])
    assert record["grad_norm"] == pytest.approx(norm(expected), rel=1e-4)


def test_shares_of_groups_and_completions_by_hand(tmp_path):
    trainer = small_trainer(tmp_path, prompts_per_step=4)
    reward_with(trainer, torch.tensor([[1.0, 1.0, 1.0], [0.5, 0.5, 0.5], [0.0, 0.5, 0.0], [0.0, 0.5, 1.0]]))
    record = grpo_step(trainer)
    assert record["all_right_fraction"] == 1 / 4
    assert record["all_wrong_fraction"] == 2 / 4  # the third one has a signal all the same
    assert record["zero_variance_fraction"] == 2 / 4
    assert record["signal_groups"] == 2
    assert record["unparsed_fraction"] == pytest.approx(3 / 12)
    assert record["prompts_drawn"] == 4


AGREE, DIFFER = [1.0, 1.0, 1.0], [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("times", "groups", "kept", "drawn"),
    [
        (0, [AGREE, DIFFER], [0, 1], 2),  # without the flag, groups that agree stay in the batch
        (3, [DIFFER, DIFFER], [0, 1], 2),
        (3, [AGREE, DIFFER, DIFFER, DIFFER], [1, 2], 4),  # one more than there is room for
        (1, [AGREE, AGREE, AGREE, DIFFER], [3], 4),  # not enough: the batch is smaller
        (2, [AGREE] * 6, [0, 1, 2, 3, 4, 5], 6),  # none has a signal: the step will be skipped
    ],
)
def test_groups_without_signal_make_room_for_the_next_prompts(times, groups, kept, drawn, tmp_path):
    trainer = small_trainer(tmp_path, resample_groups=times)
    reward_with(trainer, torch.tensor(groups))
    order = sasr.shuffled(len(trainer.task.train), 0, drawn + 2, 0, "prompts")
    record = {}
    found = sasr.draw_groups(trainer, record, 0)
    assert [group.index for group in found] == [order[q] for q in kept]
    assert [[s.grade.reward for s in group.samples] for group in found] == [groups[q] for q in kept]
    assert record["prompts_drawn"] == drawn
    assert record["reward_mean"] == pytest.approx(np.mean(groups))  # of all that was drawn
    counted(trainer, record | {"phase": "adaptive", "kind": "grpo"})
    following = sasr.draw_groups(trainer, {}, 0)  # what was drawn is not drawn again
    assert times or [group.index for group in following] == order[drawn:]
    assert (trainer.state.grpo_steps + trainer.state.extra_rollouts) * 2 >= drawn


@pytest.mark.parametrize("changes", [{}, {"controller": "chord-reward"}, {"signal": "kl", "warmup_steps": 0}], ids=str)
def test_a_step_whose_further_draws_all_agree_is_no_fault(changes, tmp_path):
    trainer = small_trainer(tmp_path, resample_groups=1, **changes)
    sasr.after_step(trainer)
    reward_with(trainer, torch.tensor([AGREE] * 4))
    assert grpo_step(trainer)["prompts_drawn"] == 4
    assert trainer.state.grpo_skipped == 1


def test_a_further_draw_of_a_step_has_samples_of_its_own(tmp_path):
    trainer = small_trainer(tmp_path)
    prompts = trainer.task.train_prompts[:2]
    first, second, again = (sasr.sample(trainer, prompts, attempt).completions for attempt in (0, 1, 0))
    assert first == again != second
    trainer.state.step += 1
    assert sasr.sample(trainer, prompts, 0).completions not in (first, second)


def test_the_loss_of_a_resampled_batch_is_a_mean_over_the_kept_groups(tmp_path, monkeypatch):
    trainer = small_trainer(tmp_path, resample_groups=1, max_grad_norm=0.0)
    reward_with(trainer, torch.tensor([AGREE, DIFFER, AGREE, AGREE]))
    drawn, original = [], sasr.draw_groups
    monkeypatch.setattr(sasr, "draw_groups", lambda *given: drawn.append(original(*given)) or drawn[-1])
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
    record = grpo_step(trainer)
    batch = Batch.of((group.prompt, s.tokens) for group in drawn[0] for s in group.samples)
    assert len(batch.completions) == 3
    advantages = group_advantages(torch.tensor([DIFFER])).flatten()
    weighted = [a * part for a, part in zip(advantages, logprobs_by_hand(trainer.model, batch), strict=True)]
    expected = gradients(trainer.model, -torch.cat(weighted).sum() / tokens_of(batch))
    assert record["grad_norm"] == pytest.approx(norm(expected), rel=1e-4)


def test_inner_updates_reuse_one_rollout_and_leave_the_trust_region_slowly(tmp_path, monkeypatch):
    trainer = small_trainer(tmp_path, inner_updates=3, lr=1e-2, lr_warmup_steps=0, warmup_steps=0)
    reward_with(trainer, torch.tensor([[1.0, 0.0, 0.0]] * 2))
    ratios = []
    original = sasr.kernels.grpo_loss

    def spy(logprobs, old_logprobs, *rest, **options):
        ratios.append((logprobs - old_logprobs).detach().abs().max().item())
        return original(logprobs, old_logprobs, *rest, **options)

    monkeypatch.setattr(sasr.kernels, "grpo_loss", spy)
    grpo_step(trainer)
    assert len(ratios) == 3
    assert ratios[0] < 1e-5 < ratios[1] < ratios[2]


@pytest.mark.parametrize(
    ("backend", "checkpointing"),
    [
        ("eager", False),
        pytest.param("aot_eager", True, marks=pytest.mark.nightly),
        pytest.param("inductor", False, marks=pytest.mark.nightly),
    ],
)
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_compiled_training_takes_the_same_steps(backend, checkpointing, tmp_path, monkeypatch):
    whole = Transformer.compile
    monkeypatch.setattr(Transformer, "compile", lambda self, **options: whole(self, backend=backend, **options))
    torch._dynamo.reset()
    norms, weights = [], []
    for compile_it in (False, True):
        trainer = small_trainer(tmp_path, compile=compile_it, gradient_checkpointing=checkpointing, kl_coef=0.1)
        trainer.reference = trainer.frozen_copy()
        reward_with(trainer, torch.arange(6.0).view(2, 3) % 3)
        norms.append([take(trainer)["grad_norm"] for take in (sft_step, grpo_step, sft_step)])
        weights.append(list(trainer.model.parameters()))
        compiled = [m._compiled_call_impl is not None for m in (trainer.model, trainer.sampler, trainer.reference)]
        assert compiled == [compile_it, False, False]
        assert all(a is b for a, b in zip(weights[-1], trainer.sampler.parameters(), strict=True))
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert norms[0][1] > 0
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-4)


def test_a_probe_measures_on_fresh_demonstrations_and_does_not_step(tmp_path):
    trainer = small_trainer(tmp_path)
    before = [p.clone() for p in trainer.model.parameters()]
    batch = Batch.of(sasr.demonstrations(trainer, trainer.task, 0, "probe"))
    expected = gradients(trainer.model, -torch.cat(logprobs_by_hand(trainer.model, batch)).mean())
    first = probe(trainer)
    assert first == pytest.approx(norm(expected), rel=1e-4)
    assert all((p == old).all() for p, old in zip(trainer.model.parameters(), before, strict=True))
    assert probe(trainer) == first
    trainer.state.step = 1
    assert probe(trainer) != first, "a probe that repeats its batch cannot correct a low draw"


def test_a_norm_that_is_not_finite_is_not_observed(tmp_path, monkeypatch):
    trainer = small_trainer(tmp_path, gamma=0.0, warmup_steps=0)  # p = 1
    sasr.after_step(trainer)
    norm_before, step_before = trainer.controller.g_last, trainer.state.norm_step
    weights = [p.clone() for p in trainer.model.parameters()]
    poisoned = {"loss": math.nan, "grad_norm": math.nan, "padding_fraction": 0.0}
    monkeypatch.setattr(sasr, "accumulate_gradient", lambda *_, **__: poisoned)
    with pytest.raises(BadStep) as bad:
        sasr.adaptive_step(trainer)
    assert bad.value.record["kind"] == "sft"
    assert (trainer.controller.g_last, trainer.state.norm_step) == (norm_before, step_before)
    assert all((p == old).all() for p, old in zip(trainer.model.parameters(), weights, strict=True))


def test_probe_every_bounds_the_age_of_the_norm(tmp_path):
    trainer = small_trainer(tmp_path, gamma=1e6, warmup_steps=0, steps=12, probe_every=3)  # p is nearly 0
    sasr.after_step(trainer)
    ages = []
    for _ in range(12):
        ages.append(counted(trainer, sasr.adaptive_step(trainer))["sft_norm_age"])
    assert ages == [0, 1, 2] * 4


def test_without_warmup_the_yardstick_is_measured(tmp_path):
    trainer = small_trainer(tmp_path, warmup_steps=0)
    sasr.after_step(trainer)
    assert trainer.controller.sft_probability() == pytest.approx(0.5)
    assert trainer.controller.g_warmup == pytest.approx(probe(trainer))
    assert trainer.state.norm_step == 0


def test_adaptive_step_obeys_alpha_and_refreshes_the_norm_only_after_sft(tmp_path):
    trainer = small_trainer(tmp_path, steps=30)
    sasr.after_step(trainer)
    for _ in range(3):
        counted(trainer, trainer.step())
    sasr.after_step(trainer)
    kinds = set()
    for _ in range(20):
        g_last = trainer.controller.g_last
        record = counted(trainer, sasr.adaptive_step(trainer))
        kinds.add(record["kind"])
        assert record["kind"] == ("sft" if record["alpha"] < record["p_sft"] else "grpo")
        assert record["p_sft"] == pytest.approx(g_last / (g_last + trainer.controller.g_warmup))
        assert trainer.controller.g_last == (record["grad_norm"] if record["kind"] == "sft" else g_last)
    assert kinds == {"sft", "grpo"}
    assert (trainer.state.sft_steps + trainer.state.grpo_steps) == 20


def test_a_bad_step_of_a_run_leaves_no_trace_and_equation_1_holds_before_and_after_it(tmp_path, monkeypatch):
    """The norms that p_t follows are those of the SFT lines of the metrics; the second GRPO step is poisoned."""
    monkeypatch.setattr(
        knights_knaves, "grade", lambda text, e: Grade(len(text) % 3 / 2, text == e.demonstration, False)
    )
    calls, loss_of, after_step, snapshots = itertools.count(1), sasr.kernels.grpo_loss, sasr.after_step, []

    def poisoned(*arguments, **named):
        loss, stats = loss_of(*arguments, **named)
        return loss * (math.nan if next(calls) == 2 else 1), stats

    def spy(trainer):
        snapshots.append({name: tensor.detach().clone() for name, tensor in named_tensors(trainer).items()})
        return after_step(trainer)

    monkeypatch.setattr(sasr.kernels, "grpo_loss", poisoned)
    monkeypatch.setattr(sasr, "after_step", spy)
    summary = sasr.train(Config(**SMALL | {"steps": 12, "out": str(tmp_path / "run")}))
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 16))

    (dropped,) = [record for record in records if record["loss"] is None]
    assert (dropped["kind"], dropped["grad_norm"]) == ("grpo", None)
    assert dropped["reward_mean"] > 0
    assert summary["bad_steps"] == 1
    assert summary["sft_steps"] + summary["grpo_steps"] == 12
    before, after = snapshots[dropped["step"] - 1 : dropped["step"] + 1]
    assert before.keys() == after.keys()
    assert any(name.startswith("optimizer.exp_avg_sq.") for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    following = [record for record in records if record["step"] > dropped["step"]]
    assert {record["kind"] for record in following} == {"sft", "grpo"}, "the case should show both"
    assert all(record["grad_norm"] > 0 for record in following)
    assert not torch.equal(after["model.model.embed_tokens.weight"], snapshots[-1]["model.model.embed_tokens.weight"])

    g_warmup = g_last = records[2]["grad_norm"]
    for record in records[3:]:
        assert record["sft_norm"] == g_last
        assert record["p_sft"] == pytest.approx(g_last / (g_last + g_warmup))
        g_last = record["grad_norm"] if record["kind"] == "sft" else g_last
    assert summary["g_warmup"] == g_warmup


@pytest.mark.parametrize(("kl_coef", "reference"), [(0.1, "warmup"), (0.1, "initial"), (0.0, "warmup")])
def test_the_reference_policy_is_frozen_where_it_was_asked_for(tmp_path, kl_coef, reference):
    trainer = small_trainer(tmp_path, kl_coef=kl_coef, reference=reference)
    sasr.after_step(trainer)
    initial = trainer.model.head.detach().clone()
    for _ in range(3):
        counted(trainer, trainer.step())
    sasr.after_step(trainer)
    warmed = trainer.model.head.detach().clone()
    if not kl_coef:
        assert trainer.reference is None
        return
    grpo_step(trainer)
    assert torch.equal(trainer.reference.head, warmed if reference == "warmup" else initial)
    assert not any(p.requires_grad for p in trainer.reference.parameters())


def test_warming_up_on_another_task(tmp_path, monkeypatch):
    trainer = small_trainer(tmp_path, warmup_task="countdown:train_size=20,test_size=5")
    seen = []
    stats = {"loss": 0.0, "grad_norm": 1.0, "padding_fraction": 0.0}
    monkeypatch.setattr(sasr, "accumulate_gradient", lambda model, parts, *_: seen.append(parts[0].batch) or stats)
    for step in (2, 3):
        trainer.state.step = step
        sft_step(trainer)
    last_of_warmup, first_of_adaptive = (trainer.codec.tokenizer.decode(batch.prompts[0]) for batch in seen)
    assert "numbers" in last_of_warmup
    assert "numbers" not in first_of_adaptive


def test_examples_without_demonstration_serve_grpo_only(tmp_path):
    task = "knights-knaves:train_size=40,test_size=12,demonstrations=5"
    trainer = small_trainer(tmp_path, task=task)
    assert len(trainer.task.demonstrations) == 5
    assert len(trainer.task.train_prompts) == 40
    grpo_step(trainer)
    nothing = "knights-knaves:train_size=40,test_size=12,demonstrations=0"
    with pytest.raises(ValueError, match="no example has a demonstration"):
        small_trainer(tmp_path, task=nothing)
    small_trainer(tmp_path, task=nothing, controller="grpo", warmup_steps=0)
    small_trainer(tmp_path, task=nothing, controller="alternate", alternate="0:1", warmup_steps=0)


def test_empty_splits_are_named(tmp_path):
    with pytest.raises(ValueError, match="no training examples"):
        small_trainer(tmp_path, task="knights-knaves:train_size=0,test_size=4")
    trainer = small_trainer(tmp_path, task="knights-knaves:train_size=4,test_size=0")
    assert evaluate(trainer) == {}
    assert "no test examples" in "\n".join(dropped_report(trainer))


def test_out_of_domain_puzzles_could_not_have_been_training_puzzles(tmp_path):
    trainer = small_trainer(tmp_path, task="knights-knaves", ood_task="auto")
    seen = {e.prompt for e in trainer.task.source.train + trainer.task.source.test}
    assert len(trainer.ood_tasks["_ood"].source.test) == 512
    for example in trainer.ood_tasks["_ood"].source.test:
        assert example.prompt not in seen
        assert any(line.count(" and ") == 2 or line.count(" or ") == 2 for line in example.prompt.splitlines())


def test_a_demonstration_gets_no_special_tokens_of_a_beginning():
    from tokenizers.processors import TemplateProcessing

    task = load_task_spec("knights-knaves:train_size=4,test_size=2", "", 0)
    codec = Codec.trained_on([e.prompt + e.demonstration for e in task.train], 300)
    tokenizer = codec.tokenizer
    tokenizer.add_special_tokens(["<s>"])
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    codec = Codec(tokenizer, codec.stop_token_ids)
    prompt, completion = TokenizedTask(task, codec).demonstrations[0]
    assert prompt[0] == start
    assert start not in completion
    assert completion[-1] == 0


# ---- Configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"controller": "magic"}, "--controller magic"),
        ({"steps": -1}, "--steps -1"),
        ({"group_size": 0}, "--group-size 0"),
        ({"group_size": 1}, "--group-size 1: a sample alone in its group"),
        ({"group_size": 1, "advantage": "centered"}, "--group-size 1"),
        ({"group_size": 1, "advantage": "median", "kl_coef": 0.1}, "--group-size 1"),  # skipped with a KL term, too
        ({"group_size": 1, "controller": "random", "sft_fraction": 0.99}, "--group-size 1"),
        ({"group_size": 1, "controller": "sft-then-grpo", "steps": 10, "switch_step": 9}, "--group-size 1"),
        ({"lr": math.nan}, "--lr nan"),
        ({"steps": "20"}, "--steps '20'"),
        ({"steps": True}, "--steps True"),
        ({"beta1": 1.0}, "--beta1 1.0"),
        ({"lr": math.inf}, "--lr inf"),
        ({"sft_fraction": 1.5}, "--sft-fraction 1.5"),
        ({"temperature": 0.0}, "--temperature 0"),
        ({"alternate": "2"}, "--alternate 2"),
        ({"alternate": "0:0"}, "--alternate 0:0"),
        ({"hidden_size": 100, "heads": 3}, "--hidden-size 100"),
        ({"decay_fraction": 1.5}, "--decay-fraction 1.5"),
    ],
    ids=str,
)
def test_a_bad_value_is_named_with_its_flag(flags, named):
    with pytest.raises(ValueError, match=named):
        Config(**flags)


@pytest.mark.parametrize(
    "flags",
    [
        {"controller": "sft"},
        {"controller": "alternate", "alternate": "1:0"},
        {"controller": "random", "sft_fraction": 1.0},
        {"controller": "sft-then-grpo", "switch_step": 500},
        {"steps": 0},
    ],
    ids=str,
)
def test_groups_of_one_do_where_no_grpo_step_can_come(flags):
    assert Config(group_size=1, **flags).group_size == 1


def test_a_number_of_numpy_is_a_number():
    assert Config(lr=np.float64(1e-3)) == Config(lr=1e-3)
