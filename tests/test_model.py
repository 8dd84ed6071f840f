"""The transformer, checked against `transformers`: tiny random models of each family must give the same logits.

Every parameter is random, norms and biases too: a model with norms of 1 and biases of 0 cannot tell whether they
were used. Checkpoints are passed both ways through files. The rest is what no other library can judge: what an error
says, which bits a file keeps, and that a KV cache is invisible in the results.
"""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

import model as model_module
from model import KVCache, Linear, ModelConfig, SharedPrompts, Transformer, read_config, rope_frequencies
from rollout import resolve_device

FAMILIES = ["llama", "qwen2", "qwen3"]
SHAPE = {
    "vocab_size": 89,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped queries
    "head_dim": 16,  # not hidden_size / heads = 12
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,  # the default is 1e-6
}
TRAINED = 64  # tokens of context before the stretching of the positions; the tests run past it
ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": TRAINED},
    "yarn, attention_factor": {
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
        "attention_factor": 1.4,
    },
    "yarn, betas": {
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
        "beta_fast": 4.0,
        "beta_slow": 1.5,
    },
    "yarn, not truncated": {
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
        "beta_fast": 4.0,
        "truncate": False,
    },
}


def rope_of(name: str, theta: float = 100.0) -> dict:
    return {"rope_type": name.split(",")[0], "rope_theta": theta} | ROPES[name]


def randomise(model: torch.nn.Module, seed: int = 0, scale: float = 0.2) -> torch.nn.Module:
    """Every parameter random: norms in [0.5, 1.5], biases and matrices normal, large enough for peaked attention."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, scale, generator=generator)
    return model


def their_model(family: str, **config) -> torch.nn.Module:
    """A tiny random model of transformers, fp32."""
    rope = config.pop("rope_parameters", {"rope_type": "default", "rope_theta": 500.0})
    # Their end tokens default to ids that need not exist here.
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = transformers.AutoConfig.for_model(family, **(SHAPE | ids | {"rope_parameters": rope} | config))
    return randomise(transformers.AutoModelForCausalLM.from_config(config)).eval()


def our_copy(theirs: torch.nn.Module) -> Transformer:
    """Their weights in our model, without a file between."""
    ours = Transformer(ModelConfig.from_dict(theirs.config.to_dict()))
    tied = theirs.config.tie_word_embeddings
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not (tied and k == "lm_head.weight")})
    return ours


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    if isinstance(model, Transformer):
        return model.logits(model(input_ids))
    return model(input_ids).logits


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


def random_model(family: str = "qwen3", *, tied: bool = False, seed: int = 0, **config) -> Transformer:
    shape = {"model_type": family, "tie_word_embeddings": tied} | SHAPE | config
    return randomise(Transformer(ModelConfig.from_dict(shape)), seed)


# ----------------------------------------------------------------------------- the computation


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family, tied):
    theirs = their_model(family, tie_word_embeddings=tied)
    input_ids = random_ids(3, 33)
    expected = logits_of(theirs, input_ids)
    assert expected.std() > 0.3  # a flat model would agree with anything
    assert_close(logits_of(our_copy(theirs), input_ids), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_decides_the_logits(family):
    """So that agreement with transformers says something about each of them."""
    model = random_model(family)
    before = logits_of(model, random_ids(2, 9))
    for name, parameter in model.named_parameters():
        if name.endswith("k_proj.bias"):
            continue  # checked by parity alone: part of it shifts all scores of a query alike
        original = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(-0.5)
        assert (logits_of(model, random_ids(2, 9)) - before).abs().max() > 1e-3, name
        with torch.no_grad():
            parameter.copy_(original)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_transformers(family):
    theirs = their_model(family, tie_word_embeddings=True)
    ours = our_copy(theirs)
    input_ids = random_ids(2, 12)
    F.cross_entropy(ours.logits(ours(input_ids))[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()).backward()
    F.cross_entropy(theirs(input_ids).logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()).backward()
    expected = dict(theirs.named_parameters())
    assert {name for name, _ in ours.named_parameters()} == set(expected)
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, expected[name].grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_rows_padded_on_the_right_equal_their_attention_mask(family):
    theirs = their_model(family)
    input_ids, lengths = random_ids(4, 17), torch.tensor([5, 17, 1, 11])
    real = torch.arange(17) < lengths[:, None]
    with torch.no_grad():
        expected = theirs(input_ids, attention_mask=real.long()).logits
    ours = our_copy(theirs)
    assert_close(logits_of(ours, input_ids)[real], expected[real])
    other_pads = torch.where(real, input_ids, random_ids(4, 17, seed=9))
    assert torch.equal(logits_of(ours, other_pads)[real], logits_of(ours, input_ids)[real])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_ragged_prefill_then_one_token_a_step_equals_their_full_forward(family):
    theirs = their_model(family)
    ours = our_copy(theirs)
    lengths, steps = [3, 9, 1, 6], 7
    rows = [random_ids(length + steps, seed=length) for length in lengths]
    expected = [logits_of(theirs, row[None])[0] for row in rows]

    cache = KVCache(ours.config, 4, max(lengths) + steps, dtype=torch.float32, device="cpu")
    prompts = torch.stack(
        [F.pad(row[:n], (0, max(lengths) - n), value=7) for row, n in zip(rows, lengths, strict=True)]
    )
    logits = ours.logits(ours(prompts, cache=cache))
    for row, n in enumerate(lengths):
        assert_close(logits[row, :n], expected[row][:n])
    for step in range(steps):
        positions = torch.tensor(lengths)[:, None] + step
        tokens = torch.stack([row[n + step] for row, n in zip(rows, lengths, strict=True)])[:, None]
        logits = ours.logits(ours(tokens, positions=positions, cache=cache))[:, 0]
        assert_close(logits, torch.stack([expected[row][n + step] for row, n in enumerate(lengths)]))


@torch.no_grad()
def test_a_prompt_read_in_chunks_equals_one_read_at_once():
    model, input_ids = random_model(), random_ids(2, 20)
    cache = KVCache(model.config, 2, 20, dtype=torch.float32, device="cpu")
    chunks, start = [], 0
    for size in (4, 1, 9, 6):
        positions = torch.arange(start, start + size).expand(2, -1)
        chunks.append(model.logits(model(input_ids[:, start : start + size], positions=positions, cache=cache)))
        start += size
    assert_close(torch.cat(chunks, dim=1), logits_of(model, input_ids), 1e-5)


@torch.no_grad()
def test_positions_are_those_given():
    """Without a cache only differences of positions matter; a gap between two tokens is one."""
    model, input_ids = random_model(), random_ids(1, 8)
    plain = model(input_ids)
    assert_close(model(input_ids, positions=torch.arange(100, 108)[None]), plain)
    gap = torch.tensor([[0, 1, 2, 3, 40, 41, 42, 43]])
    assert (model(input_ids, positions=gap) - plain)[:, 4:].abs().max() > 1e-2


@torch.no_grad()
def test_copied_cache_rows_keep_their_continuation():
    """Fan-out, and then a gap closed by a row from behind it; each row must still be its own sequence."""
    model = random_model()
    prompts, new = random_ids(3, 6), random_ids(4, 3, seed=4)
    cache = KVCache(model.config, 3, 6, dtype=torch.float32, device="cpu")
    model(prompts, cache=cache)

    fan_out = torch.tensor([1, 0, 1, 2])
    prefilled, cache = cache, KVCache(model.config, 4, 9, dtype=torch.float32, device="cpu")
    cache.copy_rows(torch.arange(4), prefilled, fan_out)
    sequences = torch.cat((prompts[fan_out], new), dim=1)
    expected = logits_of(model, sequences)
    first = model(new[:, :1], positions=torch.full((4, 1), 6), cache=cache)
    assert_close(model.logits(first)[:, 0], expected[:, 6], 1e-5)

    kept = torch.tensor([3, 1])
    cache.copy_rows(torch.tensor([0]), cache.view(4, 7), torch.tensor([3]))
    for step in (1, 2):
        view = cache.view(2, 7 + step)
        hidden = model(new[kept, step : step + 1], positions=torch.full((2, 1), 6 + step), cache=view)
        assert_close(model.logits(hidden)[:, 0], expected[kept, 6 + step], 1e-5)


@torch.no_grad()
def test_the_first_rows_of_a_cache_share_its_memory_and_copied_rows_do_not():
    model = random_model()
    cache = KVCache(model.config, 2, 8, dtype=torch.float32, device="cpu")
    model(random_ids(2, 4), cache=cache)
    before = cache.keys.clone()
    fanned = KVCache(model.config, 2, 8, dtype=torch.float32, device="cpu")
    fanned.copy_rows(torch.tensor([1, 0]), cache, torch.tensor([0, 0]))
    model(random_ids(2, 1), positions=torch.tensor([[0], [1]]), cache=fanned)  # overwrites prompt slots
    assert torch.equal(cache.keys, before)
    model(random_ids(1, 1), positions=torch.tensor([[4]]), cache=cache.view(1, 5))
    changed = (cache.keys != before).any(-1)[:, :, 0]  # [L, B, S]
    assert changed[:, 0, 4].all()
    assert changed.sum() == model.config.num_hidden_layers, "that slot of that row, in every layer, and nothing else"


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_completions_of_shared_prompts_have_the_states_and_gradients_of_whole_sequences(family, checkpointing):
    """Against theirs, which reads every sequence whole; ragged prompts, one of them with no completion."""
    theirs = their_model(family)
    ours, theirs = our_copy(theirs).double(), theirs.double()
    lengths, prompt_index, time = [5, 2, 9, 4], torch.tensor([2, 0, 0, 2, 1]), 6
    prompts, completions = random_ids(4, 9), random_ids(5, time, seed=2)
    weights = torch.randn(5, time, SHAPE["vocab_size"], generator=torch.Generator().manual_seed(3)).double()

    sequences = [torch.cat((prompts[q, : lengths[q]], completions[b])) for b, q in enumerate(prompt_index.tolist())]
    expected = torch.stack([theirs(s[None]).logits[0, -time:] for s in sequences])
    (expected * weights).sum().backward()

    ours.gradient_checkpointing = checkpointing
    shared = SharedPrompts(torch.tensor(lengths), prompt_index)
    ours(prompts, cache=shared)
    positions = torch.tensor(lengths)[prompt_index, None] + torch.arange(time)
    found = ours.logits(ours(completions, positions, shared))
    (found * weights).sum().backward()

    assert_close(found, expected, 1e-5)  # theirs has its angles and norms in fp32
    for name, parameter in theirs.named_parameters():
        assert_close(
            ours.get_parameter(name).grad / parameter.grad.norm(), parameter.grad / parameter.grad.norm(), 1e-6
        )


@pytest.mark.parametrize("slots", [5, 8, 13])
@pytest.mark.parametrize("time", [1, 3])
def test_the_bias_of_a_mask_has_a_row_per_query_head_and_rows_that_begin_at_multiples_of_8(time, slots):
    model = random_model()  # two query heads share keys
    mask = torch.rand(4, 1, time, slots, generator=torch.Generator().manual_seed(0)) < 0.5
    bias = model._attention_bias(mask, torch.float32)
    assert torch.equal(bias, torch.where(mask, 0.0, -torch.inf).repeat(1, 1, 2, 1))
    assert all(stride % 8 == 0 for stride in bias.stride()[:-1])
    assert bias.stride(-1) == 1
    q, k, v = torch.randn(4, 2, 2 * time, 16), *torch.randn(2, 4, 2, slots, 16)
    mask = mask | (torch.arange(slots) == 0)  # every token attends to something
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=model._attention_bias(mask, torch.float32))
    assert_close(found, F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(1, 1, 2, 1)), 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@torch.no_grad()
def test_decoding_with_a_bias_on_a_card_gives_what_the_bool_mask_gives_here(dtype, tolerance):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, prompts, lengths = random_model().to(dtype), random_ids(3, 9), torch.tensor([9, 4, 1])
    new, states = random_ids(3, 1, seed=2), []
    for device in (torch.device("cpu"), resolve_device("cuda")):
        model = model.to(device)
        cache = KVCache(model.config, 3, 13, dtype=dtype, device=device)
        model(prompts.to(device), cache=cache)
        states.append(model(new.to(device), lengths[:, None].to(device), cache).float().cpu())
    assert_close(states[1], states[0], tolerance)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(64, 1), (128, 1), (5, 3), (129, 1), (1, 1)], ids=str)
@torch.no_grad()
def test_few_rows_through_a_large_matrix_give_the_product(shape, bias):
    generator = torch.Generator().manual_seed(0)
    layer, x = Linear(512, 640, bias=bias), torch.randn(*shape, 512, generator=generator)
    found = layer(x)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)
    assert found.is_contiguous() == (
        math.prod(shape) > 128 or math.prod(shape) == 1
    )  # whether it was computed transposed
    assert found.view(*shape, 8, 80).shape == (*shape, 8, 80)  # heads are cut out of it


@pytest.fixture
def unwritten_memory_is_nan(monkeypatch):
    """torch.empty hands out NaN, as recycled memory may at any time."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(was)


@pytest.mark.parametrize("grown", [False, True], ids=["made with room", "copied into room"])
@torch.no_grad()
def test_cache_slots_that_were_never_written_change_nothing(grown, unwritten_memory_is_nan):
    """A short row beside a long one has slots between its own last token and the cache's length."""
    assert torch.empty(1).isnan().all()
    model = random_model()
    long, short = random_ids(1, 11)[0], random_ids(1, 5, seed=3)[0]
    cache = KVCache(model.config, 2, 8 if grown else 11, dtype=torch.float32, device="cpu")
    model(torch.stack((long[:8], F.pad(short[:2], (0, 6)))), cache=cache)
    if grown:
        small, cache = cache, KVCache(model.config, 2, 11, dtype=torch.float32, device="cpu")
        cache.copy_rows(torch.arange(2), small, torch.arange(2))
    for step in range(3):
        tokens, positions = torch.stack((long[8 + step], short[2 + step])), torch.tensor([8 + step, 2 + step])
        logits = model.logits(model(tokens[:, None], positions=positions[:, None], cache=cache))[:, 0]
        assert_close(logits[0], logits_of(model, long[None])[0, 8 + step], 1e-5)
        assert_close(logits[1], logits_of(model, short[None])[0, 2 + step], 1e-5)


def test_gradient_checkpointing_changes_memory_and_not_the_gradients(monkeypatch):
    monkeypatch.setattr(torch, "get_rng_state", None)  # nothing in a layer is random: no state is read, nor kept
    model, input_ids = random_model("qwen2"), random_ids(2, 10)
    calls = []
    model.model["layers"][0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))

    def loss_and_gradients():
        model.zero_grad()
        loss = F.cross_entropy(model.logits(model(input_ids)).flatten(0, 1), input_ids.flatten())
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    plain_loss, plain = loss_and_gradients()
    assert len(calls) == 1
    model.gradient_checkpointing = True
    loss, gradients = loss_and_gradients()
    assert len(calls) == 3  # once forward, once again in backward
    assert torch.equal(loss, plain_loss)
    for name, gradient in gradients.items():
        assert_close(gradient, plain[name], 1e-7)


@torch.no_grad()
def test_a_bf16_model_turns_by_the_angles_of_an_fp32_one(monkeypatch):
    used, original = [], model_module.apply_rotary
    monkeypatch.setattr(model_module, "apply_rotary", lambda x, *angles: used.append(angles) or original(x, *angles))
    model, positions = random_model(), torch.arange(200, 204)[None]
    for _ in range(2):
        model(random_ids(1, 4), positions)
        model.bfloat16()
    exact, halved = used[0], used[-1]
    for ours, theirs in zip(halved, exact, strict=True):
        assert torch.equal(ours, theirs)
        assert not torch.equal(theirs.bfloat16().float(), theirs)  # rounding would have shown


def test_halving_the_model_does_not_round_the_rotary_frequencies():
    model = random_model(rope_theta=1e6)
    exact = model.frequencies.clone()
    model.bfloat16()
    assert model.head.dtype == torch.bfloat16
    assert model.frequencies.dtype == torch.float32
    assert torch.equal(model.frequencies, exact)
    assert not torch.equal(exact.bfloat16().float(), exact)  # rounding would have shown
    assert model(random_ids(1, 4)).dtype == torch.bfloat16


def test_one_seed_gives_one_set_of_weights():
    config = ModelConfig.from_dict({"model_type": "qwen2", "initializer_range": 0.05} | SHAPE)

    def weights(seed: int) -> dict:
        torch.manual_seed(seed)
        return Transformer(config).state_dict()

    first, again, other = weights(5), weights(5), weights(6)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_new_weights_follow_the_initializer_range_with_zero_biases_and_unit_norms():
    torch.manual_seed(0)
    config = ModelConfig.from_dict({"model_type": "qwen2", "initializer_range": 0.05} | SHAPE)
    for name, weight in Transformer(config).state_dict().items():
        if "norm" in name:
            assert (weight == 1).all(), name
        elif name.endswith("bias"):
            assert (weight == 0).all(), name
        else:
            assert 0.045 < weight.std() < 0.055, name


# ----------------------------------------------------------------------------- rotary positions


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_stretched_positions_equal_theirs_beyond_the_trained_context(family, name, tmp_path):
    theirs = their_model(family, rope_parameters=rope_of(name))
    ours = our_copy(theirs)
    theirs_rope = theirs.model.rotary_emb
    torch.testing.assert_close(ours.frequencies, theirs_rope.inv_freq, rtol=1e-6, atol=0)
    assert ours.rope_factor == pytest.approx(theirs_rope.attention_scaling)
    input_ids = random_ids(1, 2 * TRAINED)
    expected = logits_of(theirs, input_ids)
    assert_close(logits_of(ours, input_ids), expected)
    ours.save_pretrained(tmp_path)  # and our config.json says the same to them
    reread = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_close(logits_of(reread, input_ids), expected)


def test_each_kind_of_stretching_gives_its_own_frequencies():
    """Else the comparison above could pass with the kinds confused."""
    seen = {}
    for name in ROPES:
        config = ModelConfig.from_dict({"model_type": "llama", "rope_parameters": rope_of(name)} | SHAPE)
        frequencies, factor = rope_frequencies(config)
        seen[name] = (*frequencies.tolist(), factor)
    assert len(set(seen.values())) == len(ROPES)


def test_linear_stretching_by_hand():
    config = {"model_type": "llama", "rope_theta": 81.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    frequencies, factor = rope_frequencies(ModelConfig.from_dict(SHAPE | config | {"head_dim": 4}))
    torch.testing.assert_close(frequencies, torch.tensor([1 / 2, 1 / 9 / 2]))
    assert factor == 1.0


# ----------------------------------------------------------------------------- config.json


def config_json(**changes) -> dict:
    return SHAPE | {"model_type": "llama", "rope_theta": 5e5} | changes


def test_rope_keys_of_transformers_4_and_5_read_the_same():
    old = config_json(rope_theta=777.0, rope_scaling={"type": "linear", "factor": 4.0})
    new = config_json(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 777.0})
    del new["rope_theta"]
    config = ModelConfig.from_dict(old)
    assert config == ModelConfig.from_dict(new)
    assert config.rope_theta == 777.0
    assert config.rope_scaling == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 777.0},
        {"rope_theta": 777.0, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
        {"rope_theta": 777.0, "rope_scaling": {"rope_type": "default"}},
    ],
)
def test_default_positions_have_no_scaling(keys):
    config = ModelConfig.from_dict(SHAPE | {"model_type": "llama"} | keys)
    assert config.rope_theta == 777.0
    assert config.rope_scaling is None


def test_reading_a_config_leaves_the_dictionary_as_it_was():
    given = config_json(rope_scaling={"type": "linear", "factor": 4.0})
    copy = json.loads(json.dumps(given))
    ModelConfig.from_dict(given)
    assert given == copy


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_comes_back_from_its_own_dictionary(family, name):
    rope = {k: v for k, v in rope_of(name).items() if k != "rope_theta"}
    given = config_json(
        model_type=family,
        rope_scaling=None if name == "default" else rope,
        tie_word_embeddings=True,
        initializer_range=0.03,
        bos_token_id=0,  # an id of 0 is an id
        eos_token_id=[0, 7],
        pad_token_id=3,
    )
    config = ModelConfig.from_dict(given)
    written = config.to_dict()
    assert {key: written[key] for key in given} == given
    assert ModelConfig.from_dict(json.loads(json.dumps(written))) == config
    assert written["architectures"] == [transformers.AutoModelForCausalLM._model_mapping[_their_class(family)].__name__]


def _their_class(family: str) -> type:
    return type(transformers.AutoConfig.for_model(family))


def test_absent_head_keys_follow_from_the_others():
    given = config_json()
    del given["head_dim"], given["num_key_value_heads"]
    config = ModelConfig.from_dict(given)
    assert (config.head_dim, config.num_key_value_heads) == (12, 4)


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "model_type",
    ],
)
def test_a_missing_key_is_named(key):
    given = config_json()
    del given[key]
    with pytest.raises(ValueError, match=f"config: .*{key}"):
        ModelConfig.from_dict(given)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type 'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "mscale"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale_all_dim": 1.0}}, "mscale"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"head_dim": 15}, "head_dim 15"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_implemented_is_refused_by_name(changes, says):
    with pytest.raises(ValueError, match=f"config: .*{re.escape(says)}"):
        ModelConfig.from_dict(config_json(**changes))


def test_harmless_values_of_the_refused_keys_are_accepted():
    ModelConfig.from_dict(
        config_json(
            hidden_act="silu",
            attention_bias=False,
            mlp_bias=None,
            use_sliding_window=False,
            sliding_window=4096,
            layer_types=["full_attention"] * 2,
        )
    )


# ----------------------------------------------------------------------------- checkpoints between the two libraries


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard_size", ["1GB", "30KB"], ids=["one file", "sharded"])
def test_ours_loads_what_theirs_saved(family, tied, shard_size, tmp_path):
    theirs = their_model(family, tie_word_embeddings=tied)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 2) == (shard_size == "30KB")
    input_ids = random_ids(2, 19)
    assert_close(logits_of(Transformer.from_pretrained(tmp_path), input_ids), logits_of(theirs, input_ids))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_theirs_loads_what_ours_saved(family, tied, tmp_path):
    ours = random_model(family, tied=tied, rope_theta=500.0)
    ours.save_pretrained(tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert type(theirs).__name__ == ours.config.to_dict()["architectures"][0]
    input_ids = random_ids(2, 19)
    assert_close(logits_of(ours, input_ids), logits_of(theirs, input_ids))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_weights_come_back_bit_for_bit(family, tied, tmp_path):
    model = random_model(family, tied=tied, eos_token_id=[3, 4])
    model.save_pretrained(tmp_path / "deep" / "folder")
    again = Transformer.from_pretrained(str(tmp_path / "deep" / "folder"))
    assert again.config == model.config
    weights = again.state_dict()
    assert list(weights) == list(model.state_dict())
    assert ("lm_head.weight" in weights) != tied
    for name, weight in model.state_dict().items():
        assert torch.equal(weights[name], weight), name
    assert all(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_files_load_into_fp32_and_back(half, tmp_path):
    theirs = their_model("qwen3").to(half)
    theirs.save_pretrained(tmp_path / "half")
    ours = Transformer.from_pretrained(tmp_path / "half")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    for name, weight in ours.state_dict().items():
        assert weight.dtype == torch.float32, name
        assert torch.equal(weight, stored[name].float()), name

    ours.save_pretrained(tmp_path / "full")
    back = Transformer.from_pretrained(tmp_path / "full", dtype=half)
    for name, weight in back.state_dict().items():
        assert weight.dtype == half, name
        assert torch.equal(weight, stored[name]), name

    back.save_pretrained(tmp_path / "again")  # a file keeps the type of the weights, and says so
    assert {tensor.dtype for tensor in load_file(tmp_path / "again" / "model.safetensors").values()} == {half}
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == str(half)[len("torch.") :]


# ----------------------------------------------------------------------------- broken checkpoints


@pytest.fixture
def saved(tmp_path):
    random_model().save_pretrained(tmp_path)
    return tmp_path


def rewrite(path, change) -> None:
    """Apply `change` to the dictionary of tensors in path/model.safetensors."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


NORM = "model.layers.1.input_layernorm.weight"


def test_a_missing_tensor_is_named(saved):
    rewrite(saved, lambda tensors: tensors.pop(NORM))
    with pytest.raises(ValueError, match=rf"{re.escape(str(saved))}.*missing.*{re.escape(NORM)}"):
        Transformer.from_pretrained(saved)


def test_a_surplus_tensor_is_named(saved):
    rewrite(saved, lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"model\.safetensors: surplus.*model\.layers\.2\.mlp\.up_proj\.weight"):
        Transformer.from_pretrained(saved)


def test_biases_that_the_family_does_not_have_are_surplus(saved):
    rewrite(saved, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj\.bias.*qwen3"):
        Transformer.from_pretrained(saved)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(saved):
    rewrite(saved, lambda tensors: tensors.update({NORM: torch.ones(47)}))
    with pytest.raises(ValueError, match=rf"model\.safetensors: tensor {re.escape(NORM)} .*\[47\].*\[48\]"):
        Transformer.from_pretrained(saved)


def test_stored_rotary_frequencies_of_old_exports_are_passed_over(saved):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(saved, lambda tensors: tensors.update({name: torch.ones(8)}))
    assert torch.equal(Transformer.from_pretrained(saved).frequencies, random_model().frequencies)


def test_a_directory_without_safetensors_says_what_it_looked_for(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"{re.escape(str(saved))}.*model\.safetensors"):
        Transformer.from_pretrained(saved)


def test_a_directory_without_a_config_says_so(tmp_path):
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}.config\.json: no such file"):
        Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1, 2]", '"text"'])
def test_a_config_file_that_is_no_json_object_is_named(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_config(tmp_path)


def test_errors_of_the_config_name_its_file(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    with pytest.raises(ValueError, match=rf"{re.escape(str(saved))}.config\.json: .*hidden_act='gelu'"):
        Transformer.from_pretrained(saved)


@pytest.mark.parametrize("shard", ["model-00002-of-00002.safetensors", "../x", "/etc/hostname"])
def test_an_index_may_only_name_files_of_its_own_directory(saved, shard):
    checkpoint = saved / "checkpoint"
    checkpoint.mkdir()
    (saved / "config.json").rename(checkpoint / "config.json")
    (saved / "model.safetensors").rename(saved / "x")  # a good file, where ../x would find it
    index = {"metadata": {}, "weight_map": {NORM: shard}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"index\.json: .*{re.escape(repr(shard))}"):
        Transformer.from_pretrained(checkpoint)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_an_index_that_is_not_one_is_named(saved, content):
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        Transformer.from_pretrained(saved)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 4096], ids=["empty", "short", "long"])
def test_garbage_in_the_weights_file_is_named(saved, content):
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(saved))}.model\.safetensors: not a readable"):
        Transformer.from_pretrained(saved)


def test_a_weights_file_that_was_cut_off_is_named(saved):
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable"):
        Transformer.from_pretrained(saved)


def test_a_tied_model_accepts_its_head_stored_twice(tmp_path):
    model = random_model(tied=True)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(Transformer.from_pretrained(tmp_path).head, model.head)


def test_a_tied_model_accepts_its_head_stored_instead_of_the_embedding(tmp_path):
    model = random_model(tied=True)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert torch.equal(Transformer.from_pretrained(tmp_path).head, model.head)


@pytest.mark.parametrize("files", [1, 2], ids=["one file", "embedding in the first of two"])
def test_a_tied_model_refuses_a_head_that_differs(tmp_path, files):
    """Whichever of the two comes first in the files."""
    random_model(tied=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"] + 0.1}
    if files == 1:
        save_file(tensors | head, tmp_path / "model.safetensors")
    else:
        (tmp_path / "model.safetensors").unlink()
        save_file(tensors, tmp_path / "a.safetensors")
        save_file(head, tmp_path / "b.safetensors")
        weight_map = dict.fromkeys(tensors, "a.safetensors") | {"lm_head.weight": "b.safetensors"}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"\.safetensors: .*lm_head\.weight.*tied"):
        Transformer.from_pretrained(tmp_path)
