"""The other ways to mix SFT and RL: what each decides, and the loss that comes of it, by hand."""

import dataclasses
import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_sasr import norm, tiny_model

import sasr
from baselines import PUBLISHED, SCHEDULES, Group, Sample, make_method, may_choose_grpo, may_choose_sft
from data import Grade
from sasr import Config

# ---- Coins -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"controller": "sft"}, [1, 1, 1, 1, 1, 1, 1, 1]),
        ({"controller": "grpo"}, [0, 0, 0, 0, 0, 0, 0, 0]),
        ({"controller": "sft-then-grpo"}, [1, 1, 1, 1, 0, 0, 0, 0]),
        ({"controller": "sft-then-grpo", "switch_step": 2}, [1, 1, 0, 0, 0, 0, 0, 0]),
        ({"controller": "alternate"}, [1, 0, 1, 0, 1, 0, 1, 0]),
        ({"controller": "alternate", "alternate": "2:1"}, [1, 1, 0, 1, 1, 0, 1, 1]),
        ({"controller": "alternate", "alternate": "0:1"}, [0, 0, 0, 0, 0, 0, 0, 0]),
        ({"controller": "random", "sft_fraction": 0.3}, [0.3] * 8),
        ({"controller": "cosine"}, [1, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381]),
    ],
    ids=str,
)
def test_every_schedule_is_a_coin(flags, expected):
    method = make_method(Config(steps=8, **flags))
    assert [method.sft_probability(t) for t in range(8)] == pytest.approx(expected, abs=1e-4)
    assert [method.level(t) for t in range(8)] == pytest.approx(expected, abs=1e-4)
    assert method.mix(0, [group([1, 0])]) == (0, 1)  # a step that is not SFT is GRPO alone
    assert not method.mixes
    schedule = SCHEDULES[flags["controller"]](Config(steps=8, **flags))
    assert [schedule(t) for t in range(8)] == pytest.approx(expected, abs=1e-4)
    assert may_choose_sft(Config(steps=8, **flags)) == (max(expected) > 0)
    assert may_choose_grpo(Config(steps=8, **flags)) == (min(expected) < 1)
    assert not may_choose_sft(Config(steps=0, **flags))
    assert not may_choose_grpo(Config(steps=0, **flags))


@pytest.mark.parametrize("may_choose", [may_choose_sft, may_choose_grpo])
def test_sasr_may_choose_either_at_any_step(may_choose):
    assert may_choose(Config(steps=1))
    assert not may_choose(Config(steps=0))


def test_for_sasr_a_method_decides_nothing():
    method, seen = make_method(Config()), group([1, 0])
    assert (method.mixes, method.mix(0, [seen]), seen.sft, seen.asked) == (False, (0, 1), [], False)


RECORDED = [0.9, 0.1, 0.4, 0.7, 0.2, 0.6, 0.3, 0.8]


def recorded_run(folder, lines):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(folder)


def sasr_run(folder, p_of_steps=RECORDED):
    adaptive = [{"phase": "adaptive", "kind": "sft", "p_sft": p} for p in p_of_steps]
    return recorded_run(folder, [{"phase": "warmup", "kind": "sft"}, *adaptive])


def replay(run, steps=8, **flags):
    return make_method(Config(controller="replay", replay=run, steps=steps, **flags))


def test_replay_has_the_p_of_another_run_in_its_order_or_shuffled(tmp_path):
    run = sasr_run(tmp_path / "run")
    same = replay(run, replay_order="same")
    assert [same.sft_probability(t) for t in range(8)] == RECORDED
    of_seed = [[replay(run, seed=seed).sft_probability(t) for t in range(8)] for seed in (0, 0, 1)]
    assert all(sorted(p) == sorted(RECORDED) for p in of_seed)
    assert of_seed[0] == of_seed[1] != of_seed[2]
    assert RECORDED not in of_seed
    assert [replay(run, steps=5, replay_order="same").sft_probability(t) for t in range(5)] == RECORDED[:5]


def test_a_resumed_replay_goes_on_with_the_p_that_it_began_with(tmp_path):
    memory = json.dumps(replay(sasr_run(tmp_path / "run"), replay_order="same").memory)
    resumed = replay(sasr_run(tmp_path / "run", RECORDED[::-1]), replay_order="same")
    resumed.memory |= json.loads(memory)
    assert [resumed.sft_probability(t) for t in range(8)] == RECORDED


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (None, "No such file or directory"),
        ([{"phase": "adaptive", "kind": "grpo", "loss": 0.0}] * 8, "its adaptive steps have no p_sft from 0 to 1"),
        ([{"phase": "adaptive", "p_sft": None}] * 8, "its adaptive steps have no p_sft from 0 to 1"),
        ([{"phase": "adaptive", "p_sft": 1.5}] * 8, "its adaptive steps have no p_sft from 0 to 1"),
        ([{"phase": "adaptive", "kind": "mixed", "p_sft": 0.0}] * 8, "its adaptive steps have no p_sft from 0 to 1"),
        ([{"phase": "warmup"}] + [{"phase": "adaptive", "p_sft": 0.5}] * 7, "7 adaptive steps, fewer than"),
    ],
    ids=["no file", "no p", "no number", "too large", "a mixture", "too few"],
)
def test_a_run_that_cannot_be_replayed_is_named_in_one_line(lines, reason, tmp_path):
    run = recorded_run(tmp_path / "run", lines) if lines else str(tmp_path / "run")
    with pytest.raises(ValueError, match=rf"^--replay \S*run: .*{reason}[^\n]*$"):
        replay(run)


# ---- Decisions -------------------------------------------------------------------------------------------------------

DEMONSTRATION = [7, 8, 9]


def sample(reward, tokens=(1, 2), entropy=math.nan, correct=None):
    """One that is correct for a reward of 1."""
    grade = Grade(float(reward), reward == 1 if correct is None else correct, well_formed=True)
    return Sample(list(tokens), [0.0] * len(tokens), True, grade, entropy)


def group(rewards, index=0, demonstration=DEMONSTRATION, hint=()):
    return Group(index, [5, 6], list(hint), demonstration, [sample(reward) for reward in rewards])


def decide(groups, controller, t=0, steps=10, **flags):
    """The two weights; what is decided for each prompt or sample stands in `groups`."""
    return make_method(Config(controller=controller, steps=steps, **flags)).mix(t, groups)


def weights(group):
    return [sample.weight for sample in group.samples]


@pytest.mark.parametrize(("gate", "to_sft"), [(0, [0]), (1, [0, 1]), (2, [0, 1, 2])])
def test_hpt_turns_to_sft_where_at_most_gate_samples_were_right(gate, to_sft):
    groups = [group(rewards) for rewards in ([0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0])]
    assert decide(groups, "hpt", gate=gate) == (0, 1)
    for i, decided in enumerate(groups):
        assert decided.asked == (i in to_sft)
        assert decided.sft == ([([5, 6], DEMONSTRATION, 1.0)] if i in to_sft else [])
        assert weights(decided) == ([0] * 4 if i in to_sft else [1] * 4)


def test_hpt_counts_right_samples_whatever_their_reward():
    decided = group([0.5, 0.5])
    decided.samples[0] = sample(0.5, correct=True)
    decide([decided], "hpt")
    assert decided.sft == []


def test_hpt_leaves_a_prompt_without_demonstration_to_grpo():
    decided = group([0, 0], demonstration=None)
    decide([decided], "hpt")
    assert (decided.asked, decided.sft, weights(decided)) == (True, [], [1, 1])


def test_relift_collects_what_failed_the_newest_first_until_it_is_a_batch():
    relift = make_method(Config(controller="relift", buffer=3))
    assert relift.sft_probability(0) == 0
    first = [group([0, 0], 4), group([1, 0], 5), group([0, 0], 6), group([0, 0], 7, demonstration=None)]
    assert relift.mix(0, first) == (0, 1)
    assert [g.asked for g in first] == [True, False, True, True]
    assert all(g.sft == [] and weights(g) == [1, 1] for g in first), "GRPO learns from those all the same"
    assert relift.memory["collected"] == [4, 6]
    assert relift.sft_probability(1) == 0
    relift.mix(1, [group([0, 0.5], 8), group([1, 1], 9)])
    assert relift.memory["collected"] == [8, 4, 6]
    assert relift.sft_probability(2) == 1
    relift.mix(2, [group([0, 0], 10)])

    resumed = make_method(Config(controller="relift", buffer=3))
    resumed.memory = json.loads(json.dumps(relift.memory))
    for method in (relift, resumed):
        assert method.take_collected() == [10, 8, 4]
        assert (method.memory["collected"], method.sft_probability(3)) == ([6], 0)
    assert make_method(Config(controller="relift", sft_batch_size=5)).size == 5


def test_parallel_is_half_and_half_whatever_the_samples():
    assert decide([group([0, 0])], "parallel") == decide([group([1, 1])], "parallel", t=9) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("t", "mu"),
    [
        (0, 0.9),
        (2, 0.05 + 0.85 * (1 + math.sqrt(0.5)) / 2),  # a quarter of the way: cos 45 degrees
        (4, 0.475),  # half-way between 0.9 and 0.05
        (8, 0.05),  # at 0.4 of 20 steps
        (19, 0.05),
    ],
)
def test_chord_mu_falls_on_a_cosine(t, mu):
    assert decide([group([1, 0])], "chord-mu", t=t, steps=20) == pytest.approx((mu, 1 - mu))
    assert make_method(Config(controller="chord-mu", steps=20)).level(t) == pytest.approx(mu)


def test_chord_phi_keeps_mu_and_has_an_sft_loss_of_its_own():
    assert decide([group([1, 0])], "chord-phi", t=0, mu=0.3) == (0.3, 0.7)
    assert decide([group([1, 0])], "chord-phi", t=9, mu=0.3) == (0.3, 0.7)
    assert make_method(Config(controller="chord-phi")).sft_loss == "phi"


@pytest.mark.parametrize(
    ("rewards", "mu"),
    [
        ([[1, 0, 0, 0, 0]], 0.3),  # 0.5 - 0.2
        ([[0, 0, 0, 0, 0], [1, 1, 0, 0, 0]], 0.3),  # the mean is that of all samples
        ([[1, 0, 1, 0, 1]], 0),  # 0.6 is above tau
        ([[-1, -1, -1, -1, -1]], 1),  # 1.5 would leave GRPO a negative weight
    ],
)
def test_chord_reward_lets_sft_go_as_the_reward_rises(rewards, mu):
    assert decide([group(r) for r in rewards], "chord-reward", tau=0.5) == pytest.approx((mu, 1 - mu))


def test_rft_learns_its_right_samples_and_leaves_grpo_out():
    decided = group([0.0, 1.0, 0.0, 1.0], demonstration=None)
    decided.samples[1].tokens, decided.samples[3].tokens = [3], [4, 3]
    assert decide([decided, group([0, 0])], "rft") == (0, 0)
    assert decided.sft == [([5, 6], [3], 1.0), ([5, 6], [4, 3], 1.0)]
    assert not may_choose_sft(Config(controller="rft")), "no demonstration is needed"


def test_luffy_only_asks_for_the_demonstration_that_has_joined_the_group():
    groups = [group([0, 1]), group([0, 1], demonstration=None)]
    assert decide(groups, "luffy") == (0, 1)
    assert [(g.asked, g.sft, weights(g)) for g in groups] == [(True, [], [1, 1])] * 2


def test_srft_weighs_by_entropy_instead_of_advantages():
    own = [sample(1, entropy=math.log(3)), sample(0, entropy=math.log(3)), sample(1, entropy=0.0)]
    joined = Sample(DEMONSTRATION, None, True, Grade(1.0, True, True), math.log(2), advantage=0.7)
    decided = Group(0, [5, 6], [], DEMONSTRATION, [*own, joined])
    assert decide([decided], "srft") == (0, 1)
    assert [s.advantage for s in own] == pytest.approx([0.3, -1, 0.1])  # 0.1 e^(ln 3), wrong, 0.1 e^0
    assert joined.advantage == 0.7  # the group's
    ((prompt, completion, weight),) = decided.sft
    assert (prompt, completion, weight) == ([5, 6], DEMONSTRATION, pytest.approx(0.25))  # 0.5 e^(-ln 2)
    assert weights(decided) == [1, 1, 1, 1]


def test_srft_leaves_a_prompt_without_demonstration_its_advantages():
    decided = group([1, 0], demonstration=None)
    decided.samples[0].advantage, decided.samples[1].advantage = 0.5, -0.5
    decide([decided], "srft")
    assert ([s.advantage for s in decided.samples], decided.sft, decided.asked) == ([0.5, -0.5], [], True)


@pytest.mark.parametrize(
    ("tokens", "lengths"),
    [
        (12, [0, 2, 4, 6, 8, 10]),  # 2 tokens a piece, and the last sixth is kept back
        (6, [0, 1, 2, 3, 4, 5]),
        (3, [0, 0, 1, 1, 2, 2]),  # fewer tokens than pieces
        (0, [0] * 6),
    ],
)
def test_uft_gives_a_binomial_number_of_pieces(tokens, lengths):
    uft, demonstration, asked = make_method(Config(controller="uft", steps=10)), list(range(tokens)), []
    for given, length in enumerate(lengths):
        rng = SimpleNamespace(binomial=lambda n, p, given=given: asked.append((n, p)) or given)
        assert uft.hint(2, demonstration, rng) == demonstration[:length]
    assert asked == [(5, pytest.approx(0.5))] * len(lengths)  # t = 2, the third of six, is half-way from 0.95 to 0.05


@pytest.mark.parametrize(("t", "p"), [(0, 0.8897114), (2, 0.5), (5, 0.05), (6, 0), (9, 0)])
def test_uft_gives_five_times_p_pieces_on_average_and_none_late(t, p):
    uft, rng = make_method(Config(controller="uft", steps=10)), np.random.default_rng(0)
    given = [len(uft.hint(t, [1, 2, 3, 4, 5, 6], rng)) for _ in range(4000)]
    assert np.mean(given) == pytest.approx(5 * p, abs=4 * math.sqrt(5 * p * (1 - p) / 4000))
    assert uft.level(t) == pytest.approx(p)


def test_uft_learns_its_hints_a_little():
    groups = [group([1, 0], hint=[7, 8]), group([0, 0]), group([1, 0], demonstration=None)]
    assert decide(groups, "uft", t=5) == (0, 1)
    assert [g.sft for g in groups] == [[([5, 6], [7, 8], 0.001)], [], []]
    assert [g.asked for g in groups] == [True, True, True]
    late = group([1, 0], demonstration=None)
    assert decide([late], "uft", t=6) == (0, 1)
    assert not late.asked  # when no hints are given any more, none is missing


@pytest.mark.parametrize("controller", PUBLISHED)
def test_what_a_publication_sets_is_a_configuration(controller):
    config = Config(controller=controller, **PUBLISHED[controller])
    assert {name: getattr(config, name) for name in PUBLISHED[controller]} == PUBLISHED[controller]


# ---- Loss and gradient: a whole step on hand-made samples, against a formula for each method -------------------------


FREE = {"max_grad_norm": 0.0, "advantage": "centered"}
DEMONSTRATIONS = [([11, 12], [13, 14, 15]), ([16], [17, 0])]  # the next batch


def a_trainer(controller, t=0, **changes):
    """Real but for a tiny model, whose weights never move, and a verifier that likes every demonstration."""
    flags = {"task": "knights-knaves:train_size=4,test_size=2", "ood_task": "none", "device": "cpu"}
    flags |= {"hidden_size": 16, "layers": 1, "heads": 1, "warmup_steps": 2, "steps": 10, "sft_batch_size": 2}
    trainer = sasr.Trainer(Config(controller=controller, **(flags | FREE | changes)))
    trainer.model, trainer.optimizer.step, trainer.state.step = tiny_model().float(), lambda: None, 2 + t
    trainer.task.demonstrations = DEMONSTRATIONS
    trainer.task.source = dataclasses.replace(trainer.task.source, verify=lambda *_: Grade(1.0, True, True))
    return trainer


def some_groups():
    """Prompt 0: rewards 1, 0, 0; prompt 1: 0, 0, 0. Ten tokens in all."""
    first, second = group([], 0, demonstration=[7, 8, 9, 0]), group([], 1, demonstration=[10, 0])
    second.prompt = [3]
    first.samples = [sample(1, [1, 2, 0]), sample(0, [4]), sample(0, [2, 2])]
    second.samples = [sample(0, [1]), sample(0, [0]), sample(0, [18, 19])]
    return [first, second]


def step(monkeypatch, trainer, groups):
    """What `grpo_step` measures when these are the samples; its gradient stands in the model."""
    monkeypatch.setattr(sasr, "draw_groups", lambda *_: groups)
    record = {"kind": "mixed" if trainer.method.mixes else "grpo"}
    sasr.grpo_step(trainer, record, trainer.state.step - 2)
    return record


def distributions(model, prompt, completion, temperature=1.0):
    """The log-probs of all tokens where each token of a completion was drawn: [T, V]."""
    logits = model.logits(model(torch.tensor([prompt + completion])))[0, len(prompt) - 1 : -1] / temperature
    return logits - logits.exp().sum(-1, keepdim=True).log()


def of_tokens(model, prompt, completion, temperature=1.0):
    """log pi of each token: [T]"""
    return distributions(model, prompt, completion, temperature)[range(len(completion)), completion]


def nll(model, pairs):
    """Mean over all tokens."""
    return -torch.cat([of_tokens(model, *pair) for pair in pairs]).mean()


def policy_gain(model, prompt, completion, advantage, temperature=1.0):
    """Sum over tokens of ratio times advantage, with the ratio at 1."""
    logprobs = of_tokens(model, prompt, completion, temperature)
    return advantage * (logprobs - logprobs.detach()).exp().sum()


def first_group_gain(model, hint=(), temperature=1.0):
    """The sum of `some_groups`: only prompt 0 has advantages, which are the rewards minus 1/3."""
    rows = [([1, 2, 0], 2 / 3), ([4], -1 / 3), ([2, 2], -1 / 3)]
    return sum(policy_gain(model, [5, 6, *hint], tokens, advantage, temperature) for tokens, advantage in rows)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)


def assert_step(trainer, record, loss, sft=None):
    """Loss, gradient and norm; and, of the SFT loss alone, without its weight, what the metrics call `_sft`."""
    expected = gradients(trainer.model, loss)
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(norm(expected), rel=1e-5)
    for parameter, wanted in zip(trainer.model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-6)
    assert ("grad_norm_sft" in record) == (sft is not None)
    if sft is not None:
        assert record["loss_sft"] == pytest.approx(sft.item(), rel=1e-5)
        assert record["grad_norm_sft"] == pytest.approx(norm(gradients(trainer.model, sft)), rel=1e-5)


@pytest.mark.parametrize(
    ("controller", "t", "mu", "flags"),
    [
        ("parallel", 0, 0.5, {}),
        ("chord-mu", 0, 0.9, {}),
        ("chord-mu", 4, 0.05, {}),
        ("chord-mu", 2, 0.475, {"tokens_per_microbatch": 1}),  # one sequence at a time
        ("chord-mu", 2, 0.475, {"inner_updates": 2}),  # the weights do not move, so the ratio is still 1
    ],
    ids=str,
)
def test_a_mixture_has_a_mean_over_tokens_of_each_loss(controller, t, mu, flags, monkeypatch):
    trainer = a_trainer(controller, t, **flags)
    record = step(monkeypatch, trainer, some_groups())
    sft = nll(trainer.model, DEMONSTRATIONS)
    assert_step(trainer, record, mu * sft - (1 - mu) * first_group_gain(trainer.model) / 10, sft)


def test_only_samples_are_scored_at_the_temperature_they_were_drawn_at(monkeypatch):
    trainer = a_trainer("parallel", temperature=0.5)
    record = step(monkeypatch, trainer, some_groups())
    sft = nll(trainer.model, DEMONSTRATIONS)
    assert_step(trainer, record, 0.5 * sft - 0.5 * first_group_gain(trainer.model, temperature=0.5) / 10, sft)


def test_the_norms_of_a_mixture_are_those_before_clipping(monkeypatch):
    trainer = a_trainer("chord-mu", max_grad_norm=0.01)
    record = step(monkeypatch, trainer, some_groups())
    sft = nll(trainer.model, DEMONSTRATIONS)
    total = gradients(trainer.model, 0.9 * sft - 0.1 * first_group_gain(trainer.model) / 10)
    assert record["grad_norm"] == pytest.approx(norm(total), rel=1e-5)
    assert record["grad_norm_sft"] == pytest.approx(norm(gradients(trainer.model, sft)), rel=1e-5)
    assert norm([p.grad for p in trainer.model.parameters()]) == pytest.approx(0.01, rel=1e-4)


def test_a_mixture_without_a_signal_is_its_sft_part(monkeypatch):
    trainer, groups = a_trainer("parallel"), some_groups()[1:]
    record = step(monkeypatch, trainer, groups)
    sft = nll(trainer.model, DEMONSTRATIONS)
    assert_step(trainer, record, 0.5 * sft, sft)
    assert trainer.state.grpo_skipped == 0


def test_the_kl_term_is_part_of_what_one_minus_mu_weighs(monkeypatch):
    trainer = a_trainer("chord-mu", kl_coef=0.3)
    trainer.reference = tiny_model(seed=1).float()
    record = step(monkeypatch, trainer, some_groups())
    model, k3 = trainer.model, 0.0
    for g in some_groups():
        for s in g.samples:  # those without advantage, too
            in_reference = of_tokens(trainer.reference, g.prompt, s.tokens).detach()
            difference = in_reference - of_tokens(model, g.prompt, s.tokens)
            k3 = k3 + (difference.exp() - difference - 1).sum()
    sft = nll(model, DEMONSTRATIONS)
    assert_step(trainer, record, 0.9 * sft + 0.1 * (-first_group_gain(model) + 0.3 * k3) / 10, sft)


@pytest.mark.parametrize("controller", ["grpo", "parallel"])
def test_entropy_is_rewarded_at_each_sampled_token(controller, monkeypatch):
    trainer = a_trainer(controller, entropy_coef=0.2)
    record = step(monkeypatch, trainer, some_groups())
    model, entropy = trainer.model, 0.0
    for g in some_groups():
        for s in g.samples:
            logprobs = distributions(model, g.prompt, s.tokens)
            entropy = entropy - (logprobs.exp() * logprobs).sum()
    grpo, sft = -(first_group_gain(model) + 0.2 * entropy) / 10, nll(model, DEMONSTRATIONS)
    assert_step(trainer, record, *((grpo,) if controller == "grpo" else (0.5 * sft + 0.5 * grpo, sft)))


def test_chord_phi_weighs_a_token_by_p_times_one_minus_p(monkeypatch):
    trainer = a_trainer("chord-phi", mu=0.3)
    record = step(monkeypatch, trainer, some_groups())
    logprobs = torch.cat([of_tokens(trainer.model, *pair) for pair in DEMONSTRATIONS])
    p = logprobs.exp().detach()
    sft = -(p * (1 - p) * logprobs).sum() / 5
    assert_step(trainer, record, 0.3 * sft - 0.7 * first_group_gain(trainer.model) / 10, sft)


def test_hpt_adds_the_mean_over_the_demonstrations_of_failed_prompts(monkeypatch):
    trainer, groups = a_trainer("hpt"), [*some_groups(), group([0, 0, 0], 2, demonstration=None)]
    record = step(monkeypatch, trainer, groups)
    sft = nll(trainer.model, [([3], [10, 0])])
    assert_step(trainer, record, sft - first_group_gain(trainer.model) / 16, sft)  # 10 tokens, and 6 of the third group
    assert record["without_demonstration"] == 1


def test_hpt_takes_all_failed_prompts_as_one_batch_of_sft(monkeypatch):
    trainer, groups = a_trainer("hpt", gate=1), some_groups()
    record = step(monkeypatch, trainer, groups)
    sft = nll(trainer.model, [([5, 6], [7, 8, 9, 0]), ([3], [10, 0])])
    assert_step(trainer, record, sft, sft)
    assert "clip_fraction" not in record  # no GRPO at all


def test_a_step_with_nothing_to_learn_is_counted_as_skipped(monkeypatch):
    trainer, nothing = a_trainer("hpt"), [group([0, 0, 0], demonstration=None)]
    record = step(monkeypatch, trainer, nothing)
    assert trainer.state.grpo_skipped == 1
    assert "loss" not in record
    assert all(p.grad is None for p in trainer.model.parameters())


def test_rft_is_sft_on_the_right_samples(monkeypatch):
    trainer, groups = a_trainer("rft"), some_groups()
    groups[1].samples[2].grade = Grade(1.0, True, True)
    record = step(monkeypatch, trainer, groups)
    sft = nll(trainer.model, [([5, 6], [1, 2, 0]), ([3], [18, 19])])
    assert_step(trainer, record, sft, sft)


def joined_groups():
    """As `some_groups` after demonstrations took the last places: rewards 1, 0, 1 and 0, 0, 1; 12 tokens."""
    return {
        "own": [([5, 6], [1, 2, 0], 1 / 3), ([5, 6], [4], -2 / 3), ([3], [1], -1 / 3), ([3], [0], -1 / 3)],
        "demonstrations": [([5, 6], [7, 8, 9, 0], 1 / 3), ([3], [10, 0], 2 / 3)],
    }


def shaped_gain(model, prompt, completion, advantage):
    p = of_tokens(model, prompt, completion).exp()
    return advantage * (p / (p + 0.1)).sum()


@pytest.mark.parametrize("aggregation", ["token-mean", "grpo", "dr_grpo"])
def test_luffy_shapes_the_demonstration_in_the_group(aggregation, monkeypatch):
    trainer, groups = a_trainer("luffy", loss_aggregation=aggregation, max_new_tokens=9), some_groups()
    record = step(monkeypatch, trainer, groups)
    assert [s.tokens for s in (groups[0].samples[-1], groups[1].samples[-1])] == [[7, 8, 9, 0], [10, 0]]
    loss = 0.0
    for kind, gain in (("own", policy_gain), ("demonstrations", shaped_gain)):
        for prompt, tokens, advantage in joined_groups()[kind]:
            divisor = {"token-mean": 12, "grpo": 6 * len(tokens), "dr_grpo": 6 * 9}[aggregation]
            loss = loss - gain(trainer.model, prompt, tokens, advantage) / divisor
    assert_step(trainer, record, loss)
    assert record["without_demonstration"] == 0


def test_a_joined_demonstration_is_verified_for_its_prompt():
    trainer, seen = a_trainer("luffy", prompts_per_step=3), []
    verify = lambda *given: seen.append(given) or Grade(0.5, False, True, failed=True)  # noqa: E731
    trainer.task.source = dataclasses.replace(trainer.task.source, verify=verify)
    groups = sasr.next_groups(trainer, 0, t=3)
    groups[1].demonstration = None
    for g in groups:
        g.samples = [sample(1), sample(0)]
    trainer.method.join(groups, partial(sasr.add_samples, trainer))
    shown = [groups[0], groups[2]]
    texts = trainer.codec.decode([g.demonstration for g in shown])
    assert seen == [(text, trainer.task.train[g.index]) for text, g in zip(texts, shown, strict=True)]
    for g in shown:
        assert g.samples[0] == sample(1)
        assert (g.samples[1].tokens, g.samples[1].logprobs, g.samples[1].grade.reward) == (g.demonstration, None, 0.5)
    assert groups[1].samples == [sample(1), sample(0)]
    assert trainer.state.reward_failures == 2


def test_luffy_is_grpo_where_there_is_no_demonstration(monkeypatch):
    trainer, groups = a_trainer("luffy"), some_groups()
    for g in groups:
        g.demonstration = None
    record = step(monkeypatch, trainer, groups)
    assert_step(trainer, record, -first_group_gain(trainer.model) / 10)
    assert record["without_demonstration"] == 2


def test_srft_is_three_losses(monkeypatch):
    trainer, groups = a_trainer("srft"), some_groups()
    record = step(monkeypatch, trainer, groups)
    model, rows = trainer.model, joined_groups()

    def entropy(prompt, tokens):
        logprobs = distributions(model, prompt, tokens)
        return -(logprobs.exp() * logprobs).sum(-1).mean().item()

    gain = sum(shaped_gain(model, *row) for row in rows["demonstrations"])
    for prompt, tokens, _ in rows["own"]:
        right = tokens == [1, 2, 0]
        gain = gain + policy_gain(model, prompt, tokens, 0.1 * math.exp(entropy(prompt, tokens)) if right else -1.0)
    pairs = [row[:2] for row in rows["demonstrations"]]
    importance = [0.5 * math.exp(-entropy(*pair)) for pair in pairs]
    sft = -sum(w * of_tokens(model, *pair).sum() for w, pair in zip(importance, pairs, strict=True)) / 6
    assert_step(trainer, record, sft - gain / 12, sft / max(importance))  # alone, the heaviest demonstration counts 1


def test_uft_learns_a_hint_a_little_and_goes_on_from_it(monkeypatch):
    trainer, groups = a_trainer("uft"), some_groups()
    groups[0].hint, groups[1].hint = [7, 8], [10]
    record = step(monkeypatch, trainer, groups)
    sft = nll(trainer.model, [([5, 6], [7, 8]), ([3], [10])])
    assert_step(trainer, record, 0.001 * sft - first_group_gain(trainer.model, hint=[7, 8]) / 10, sft)


def test_a_hint_is_drawn_for_each_prompt_and_never_whole():
    trainer = a_trainer("uft", group_size=2, prompts_per_step=4)
    trainer.method.level = lambda t: {3: 1.0}[t]  # all five pieces
    for g in sasr.next_groups(trainer, 0, t=3):
        assert g.prompt == trainer.task.train_prompts[g.index]
        body = g.demonstration[:-1]
        assert 0 < len(body) - len(g.hint) <= len(body) / 6 + 1  # the answer is left to the model
        assert g.hint == body[: len(g.hint)]
    trainer.task.demonstration_of = [None] * 4
    assert [g.hint for g in sasr.next_groups(trainer, 0, t=3)] == [[]] * 4


def test_the_verifier_reads_hint_and_completion_while_the_sample_is_the_completion():
    trainer, seen = a_trainer("uft"), []
    verify = lambda text, example: seen.append(text) or Grade(1.0, True, True)  # noqa: E731
    trainer.task.source = dataclasses.replace(trainer.task.source, verify=verify)
    groups, completions = [group([], hint=[7, 8]), group([], 1)], [[1, 2], [3], [4], [4, 2]]
    sasr.add_samples(trainer, groups, completions, [[0.0]] * 4, [True, True, True, False])
    assert seen == trainer.codec.decode([[7, 8, 1, 2], [7, 8, 3], [4], [4, 2]])
    assert [[s.tokens for s in g.samples] for g in groups] == [completions[:2], completions[2:]]
    assert [s.finished for s in groups[1].samples] == [True, False]


def test_the_sft_step_of_relift_is_on_what_it_collected():
    trainer = a_trainer("relift", buffer=2)
    task, as_they_come = trainer.task, sasr.next_demonstrations(trainer)
    assert sorted(as_they_come) == DEMONSTRATIONS
    trainer.method.memory["collected"] = [3, 0, 2]
    expected = [(task.train_prompts[i], task.demonstration_of[i]) for i in (3, 0)]
    assert sasr.next_demonstrations(trainer) == expected
    assert trainer.method.memory["collected"] == [2]
