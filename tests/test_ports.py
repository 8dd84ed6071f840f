"""The parts of the project in other people's code: benchmarks/ports, each beside what it must equal there."""

import copy
import itertools
import math
import random
import zlib
from pathlib import Path

import pytest
import torch
import transformers

from benchmarks import step
from benchmarks.ports import grpo_loop, hidden_logprobs, mixing, sampler
from model import Transformer
from run.setup import load_task_spec
from sasr import group_advantages

PORTS = sorted((Path(__file__).resolve().parents[1] / "benchmarks/ports").glob("*.py"))
SHAPE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "eos_token_id": 3}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0}


def foreign(kind="qwen2", seed=0, **changes):
    """A `transformers` model whose tokens are far from equally likely."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **SHAPE | {"initializer_range": 0.3} | changes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def some_batch(rows=8, prompt=5, completion=6):
    """input_ids, attention_mask, completion_mask: prompts padded on the left, completions on the right."""
    torch.manual_seed(1)
    input_ids = torch.randint(4, 97, (rows, prompt + completion))
    starts, ends = torch.randint(0, prompt, (rows, 1)), prompt + torch.randint(1, completion + 1, (rows, 1))
    places = torch.arange(prompt + completion)
    attention_mask = ((places >= starts) & (places < ends)).long()
    return input_ids, attention_mask, attention_mask * (places >= prompt)


REWARDS = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.5, 0.0]])


@pytest.mark.parametrize("file", PORTS, ids=lambda file: file.stem)
def test_a_port_is_short(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 40


# ----------------------------------------------------------------------------- GRPO in a bare loop


def test_the_loss_of_the_bare_loop_is_the_papers():
    """Token by token, in Python; the second update has ratios that are not 1, and some that are clipped."""
    model, reference, batch = foreign(), foreign(initializer_range=0.25), some_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    policies = [copy.deepcopy(model)]
    optimizer.register_step_post_hook(lambda *_: policies.append(copy.deepcopy(model)))
    losses = grpo_loop.grpo_step(model, optimizer, batch, REWARDS, reference=reference, kl_coef=0.1, updates=2)

    input_ids, attention_mask, completion_mask = batch
    first, second, ref = (m(input_ids, attention_mask=attention_mask).logits for m in (*policies[:2], reference))
    clipped = 0
    for policy, loss in zip((first, second), losses, strict=True):
        terms = []
        for row, group in enumerate(REWARDS.repeat_interleave(4, dim=0).tolist()):
            mean = sum(group) / 4
            spread = math.sqrt(sum((r - mean) ** 2 for r in group) / 4)
            advantage = (group[row % 4] - mean) / (spread + 1e-4)
            for place in completion_mask[row].nonzero().flatten().tolist():
                token = input_ids[row, place]
                now, old, near = (m[row, place - 1].log_softmax(-1)[token].item() for m in (policy, first, ref))
                ratio = math.exp(now - old)
                gain = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
                clipped += gain != ratio * advantage
                terms.append(gain - 0.1 * (math.exp(near - now) - (near - now) - 1))
        assert loss == pytest.approx(-sum(terms) / len(terms), abs=1e-5)
    assert clipped > 0
    assert losses[0] != pytest.approx(losses[1], abs=1e-3)


# ----------------------------------------------------------------------------- hidden states


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma"])  # gemma: no model of ours; its head is the embedding
def test_log_probs_from_hidden_states_are_those_of_the_models_own_logits(kind):
    model, (input_ids, attention_mask, completion_mask) = foreign(kind), some_batch()
    batch, chosen = (input_ids, attention_mask, completion_mask), completion_mask[:, 1:].bool()
    logits = model(input_ids, attention_mask=attention_mask).logits[:, :-1][chosen]
    expected = (logits / 0.7).log_softmax(-1)
    found, entropy = hidden_logprobs.completion_logprobs(model, *batch, temperature=0.7)
    torch.testing.assert_close(found, expected.gather(1, input_ids[:, 1:][chosen][:, None])[:, 0])
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1))

    reference = foreign(kind, seed=5)
    other = reference(input_ids, attention_mask=attention_mask).logits[:, :-1][chosen].log_softmax(-1)
    own = logits.log_softmax(-1)
    kl = hidden_logprobs.completion_kl(model, reference, *batch)
    torch.testing.assert_close(kl, (own.exp() * (own - other)).sum(-1))
    assert kl.min() > 0.01


def test_the_gradient_of_those_log_probs_is_that_of_the_models_own_loss():
    model, (input_ids, attention_mask, completion_mask) = foreign(tie_word_embeddings=True), some_batch()
    labels = input_ids.masked_fill(completion_mask == 0, -100)
    model(input_ids, attention_mask=attention_mask, labels=labels).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logprobs, _ = hidden_logprobs.completion_logprobs(model, input_ids, attention_mask, completion_mask)
    (-logprobs.mean()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-5, rtol=1e-4)


# ----------------------------------------------------------------------------- the sampler


@pytest.mark.parametrize("tied", [True, False])
def test_the_sampler_writes_what_generate_writes_also_after_a_step(tied, tmp_path):
    model = foreign(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    samples, prompts = sampler.sampler_for(model), [[5, 6, 7, 8], [9, 10], [40]]
    optimizer, texts = torch.optim.SGD(model.parameters(), lr=0.5), []
    for _ in range(2):
        found = sampler.sample(samples, prompts, max_new_tokens=12, temperature=0)
        for prompt, tokens in zip(prompts, found.completions, strict=True):
            ids = torch.tensor([prompt])
            settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12}
            assert tokens == model.generate(ids, **settings)[0, len(prompt) :].tolist()
        texts.append(found.completions)
        model(input_ids=torch.arange(20)[None], labels=torch.arange(20)[None]).loss.backward()
        optimizer.step()
    assert texts[0] != texts[1]
    from_folder = sampler.sample(Transformer.from_pretrained(tmp_path), prompts, max_new_tokens=12, temperature=0)
    assert from_folder.completions == texts[0]  # from before the step
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_sampler_draws_groups_and_refuses_what_it_cannot_run():
    found = sampler.sample(sampler.sampler_for(foreign()), [[5], [6, 7]], samples=3, seed=4, max_new_tokens=5)
    assert len(found.completions) == len(found.logprobs) == 6
    for tokens, logprobs, finished in zip(found.completions, found.logprobs, found.finished, strict=True):
        assert len(tokens) == len(logprobs) <= 5
        assert finished == (tokens[-1] == SHAPE["eos_token_id"])
    with pytest.raises(ValueError, match="model_type 'gemma' is not one of"):
        sampler.sampler_for(foreign("gemma", hidden_act="silu"))


# ----------------------------------------------------------------------------- decisions


@pytest.mark.parametrize(("step", "mu"), [(0, 0.9), (4, 0.475), (8, 0.05), (19, 0.05)])
def test_chord_mu_needs_the_step_alone(step, mu):
    assert mixing.chord_mu(step, 20) == pytest.approx((mu, 1 - mu))


@pytest.mark.parametrize(("gate", "learnt"), [(0, [True, False, False]), (1, [True, True, False])])
def test_hpt_needs_the_rewards_alone(gate, learnt):
    rewards, demonstrated = [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], [True, True, False]
    sft, weights = mixing.hpt(rewards, demonstrated, gate)
    assert sft == learnt
    assert weights == [[0.0] * 4 if turned else [1.0] * 4 for turned in learnt]


# ----------------------------------------------------------------------------- TRL

TINY = {"task": "countdown:train_size=64,test_size=1", "warmup_steps": 2}


@pytest.fixture(scope="module")
def trl():
    return pytest.importorskip("trl", reason="TRL is not installed: pip install trl==1.16.0")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small model of ours with its tokenizer, as `transformers` opens it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(step.TASKS, "small", TINY)
        folder = tmp_path_factory.mktemp("trl")
        return step.make_checkpoint("small", folder / "model", "cpu")["model"]


def trl_arguments(trl, checkpoint, folder, **changes):
    """What a GRPOTrainer is made of: a reward that no group agrees on, two groups of four to a micro-batch."""
    plain = {"num_generations": 4, "max_completion_length": 8, "beta": 0.0, "top_k": 0, "use_cpu": True, "bf16": False}
    plain |= {"per_device_train_batch_size": 8, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    plain |= {"gradient_checkpointing": False, "dataloader_pin_memory": False, "logging_steps": 1, "seed": 3}
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.pad_token = tokenizer.eos_token
    prompts = [{"prompt": example.prompt} for example in load_task_spec(TINY["task"], "", 0).train]
    return {
        "model": transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
        "reward_funcs": lambda completions, **_: [zlib.crc32(text.encode()) / 2**32 for text in completions],
        "args": trl.GRPOConfig(output_dir=str(folder), **plain | changes),
        "train_dataset": pytest.importorskip("datasets").Dataset.from_list(prompts),
        "processing_class": tokenizer,
    }


@pytest.mark.nightly
@pytest.mark.parametrize("accumulated", [1, 2])
def test_ten_steps_of_the_trl_trainer_are_chosen_by_p_t(trl, checkpoint, tmp_path, accumulated):
    """The norms are taken here anew from the gradients as they are before TRL clips them, p_t from those norms."""
    from benchmarks.ports.trl_sasr import SasrTrainer

    norms = []

    class Watched(SasrTrainer):
        def _clip_grad_norm(self, model):
            squares = sum(p.grad.double().square().sum().item() for p in model.parameters())
            norms.append((self.kind, math.sqrt(squares)))
            return super()._clip_grad_norm(model)

    changes = {"max_steps": 10, "max_grad_norm": 0.01, "learning_rate": 1e-3}
    changes |= {"gradient_accumulation_steps": accumulated}
    arguments, batches = trl_arguments(trl, checkpoint, tmp_path, **changes), []
    for example in load_task_spec(TINY["task"], "", 0).train:
        ids = arguments["processing_class"](example.prompt + example.demonstration, return_tensors="pt")["input_ids"]
        batches.append({"input_ids": ids, "labels": ids})
    untrained = copy.deepcopy(arguments["model"])
    trainer = Watched(**arguments, demonstrations=itertools.cycle(batches), warmup_steps=3, gamma=1.0)
    trainer.train()

    (sum(untrained(**batch).loss for batch in batches[:accumulated]) / accumulated).backward()
    of_sft = torch.nn.utils.get_total_norm([p.grad for p in untrained.parameters()]).item()
    assert norms[0] == ("warmup", pytest.approx(of_sft, rel=1e-4))
    assert [kind for kind, _ in norms[:3]] == ["warmup"] * 3
    assert {kind for kind, _ in norms[3:]} == {"sft", "grpo"}
    g_warmup = g_last = norms[2][1]
    logged = {line["step"] - 1: line for line in trainer.state.log_history if "loss" in line}
    for number, (kind, norm) in enumerate(norms):
        assert logged[number]["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert norm > 0.01
        if number < 3:
            continue
        p = g_last / (g_last + g_warmup)
        assert logged[number]["p_sft"] == pytest.approx(p, rel=1e-4)
        assert kind == ("sft" if random.Random(f"3 {number}").random() < p else "grpo")
        assert ("reward" in logged[number]) == (kind == "grpo")
        g_last = norm if kind == "sft" else g_last


@pytest.mark.nightly
def test_the_bare_loop_has_the_loss_of_trl(trl, checkpoint, tmp_path):
    """Old and reference policy, masks, clipping, and the mean over the batch's tokens."""
    arguments = trl_arguments(trl, checkpoint, tmp_path, beta=0.1, use_bias_correction_kl=False)
    trainer = trl.GRPOTrainer(**arguments)
    model, batch = trainer.model.eval(), some_batch()
    reference, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=0.05)
    reference.load_state_dict({name: tensor * 1.01 for name, tensor in model.state_dict().items()})
    input_ids, attention_mask, completion_mask = batch
    advantages = group_advantages(REWARDS).flatten()
    with torch.no_grad():
        old, ref = (grpo_loop.token_logprobs(m, input_ids, attention_mask)[:, 4:] for m in (model, reference))
    inputs = {"prompt_ids": input_ids[:, :5], "prompt_mask": attention_mask[:, :5], "advantages": advantages}
    inputs |= {"completion_ids": input_ids[:, 5:], "completion_mask": completion_mask[:, 5:]}
    inputs |= {"old_per_token_logps": old, "ref_per_token_logps": ref, "num_items_in_batch": completion_mask.sum()}
    theirs = []

    def loss_of_trl(*_):
        with torch.no_grad():
            theirs.append(trainer._compute_loss(model, inputs).item())

    loss_of_trl()
    optimizer.register_step_post_hook(loss_of_trl)
    ours = grpo_loop.grpo_step(model, optimizer, batch, REWARDS, reference=reference, kl_coef=0.1, updates=3)
    assert ours == pytest.approx(theirs[:3], abs=1e-5)
    assert len({round(loss, 4) for loss in ours}) == 3


@pytest.mark.nightly
def test_the_standard_deviation_of_trl_divides_by_one_less(trl):
    spread = trl.trainer.utils.nanstd(REWARDS, dim=1, keepdim=True)
    theirs = (REWARDS - REWARDS.mean(dim=1, keepdim=True)) / (spread + 1e-4)
    torch.testing.assert_close(theirs, group_advantages(REWARDS) * math.sqrt(3 / 4), atol=1e-3, rtol=1e-3)
