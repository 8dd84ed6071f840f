"""Adapters (LoRA), judged by `peft`: the same files must give the same logits, gradients and merged weights.

What no other library can judge is the rest: that a run trains its adapter and nothing else, samples from the merged
weights, keeps no second model, and goes on after a stop as if nothing had happened.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_run_evaluation import LINUX, planned_and_measured
from test_run_faults import determinism_put_back as determinism_put_back
from test_run_faults import same_run
from transformers import AutoModelForCausalLM

import sasr
from baselines import METHODS, SCHEDULES
from benchmarks import adapter_norms
from data import Grade, countdown
from data.batch import Batch
from data.tokenizer import Codec, train_tokenizer
from model import PROJECTIONS, ModelConfig, Transformer, read_adapter
from run.checkpoint import RunFolder
from run.evaluation import kl_to_reference
from run.lifecycle import Stopped
from run.memory import activation_bytes, memory_plan
from run.setup import Setup

SMALL = {"task": "countdown:train_size=20,test_size=4", "ood_task": "none", "warmup_steps": 2, "steps": 4}
SMALL |= {"sft_batch_size": 4, "prompts_per_step": 2, "group_size": 3, "max_new_tokens": 6, "eval_examples": 2}
SMALL |= {"eval_every": 0, "save_every": 0, "lr_schedule": "constant", "lr_warmup_steps": 0, "device": "cpu"}
SMALL |= {"warmup_lr": 0.01, "lr": 0.01, "lora_rank": 3}


# peft asks transformers for something by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def rewards_that_differ(monkeypatch):
    """An untrained model solves nothing, and GRPO skips a step without signal: reward something else instead."""
    right = lambda text, example: text == example.demonstration  # noqa: E731
    monkeypatch.setattr(countdown, "grade", lambda text, e, **_: Grade(len(text) % 3 / 2, right(text, e), False))


def write_base(path: Path, family: str = "qwen2", dtype: torch.dtype = torch.float32, large: bool = False) -> Path:
    """A tiny checkpoint with tokenizer; every parameter is random, norms and biases too."""
    tokenizer = train_tokenizer(["Use 12, 7 and 3 to make 22. 12 + 7 + 3 = 22 (12 - 3) * 7 = 63"], 290)
    sizes = (30000, 512, 2048, 8, 8, 4, 64, 1024) if large else (tokenizer.get_vocab_size(), 32, 48, 2, 4, 2, 8, 1024)
    model = Transformer(ModelConfig(*sizes, model_type=family, tie_word_embeddings=family == "qwen2", eos_token_id=0))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    model.save_pretrained(path, dtype=dtype)
    Codec(tokenizer, (0,)).save(path)
    return path


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    here = tmp_path_factory.mktemp("bases")
    paths = {family: write_base(here / family, family) for family in ("qwen2", "llama")}
    return paths | {"bf16": write_base(here / "bf16", dtype=torch.bfloat16)}


def their_adapter(base: Path, out: Path, **changes) -> PeftModel:
    """An adapter of peft's own with random A and B, saved into `out`."""
    torch.manual_seed(1)
    config = LoraConfig(
        **{"r": 3, "lora_alpha": 12, "target_modules": [*PROJECTIONS], "task_type": "CAUSAL_LM"} | changes
    )
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.1)
    theirs.save_pretrained(out)
    return theirs.eval()


def our_adapter(base: Path, adapter: Path, **options) -> Transformer:
    model = Transformer.from_pretrained(base, **options)
    model.add_adapters(*read_adapter(adapter)[0].values())
    model.load_adapter(adapter)
    return model


def config(out: Path, base: Path, **changes) -> sasr.Config:
    return sasr.Config(**SMALL | {"out": str(out), "model": str(base)} | changes)


def some_ids() -> torch.Tensor:
    return torch.randint(0, 260, (2, 20), generator=torch.Generator().manual_seed(2))


def adapted(model: Transformer) -> list[torch.Tensor]:
    """The weights that an adapter of all projections changes."""
    return [p for name, p in model.named_parameters() if name.endswith("_proj.weight")]


def adapters_of(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.trained_parameters()}


# ---- Compared with peft ----------------------------------------------------------------------------------------------


def test_a_file_may_hold_several_types(bases, tmp_path):
    base = shutil.copytree(bases["qwen2"], tmp_path / "base")
    mixed = {name: t.bfloat16().to(torch.bfloat16 if i % 2 else torch.float32) for i, (name, t) in
             enumerate(load_file(base / "model.safetensors").items())}  # fmt: skip
    save_file(mixed, base / "model.safetensors", metadata={"format": "pt"})
    trainer, plain, ids = sasr.Trainer(config(tmp_path / "x", base)), Transformer.from_pretrained(base), some_ids()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32, torch.bfloat16}
    assert torch.equal(trainer.model.logits(trainer.model(ids)), plain.logits(plain(ids)))


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("targets", [[*PROJECTIONS], ["q_proj", "v_proj"], r".*\.(up|k)_proj"], ids=str)
def test_peft_has_the_same_logits_gradients_and_merged_weights(bases, tmp_path, family, targets):
    theirs = their_adapter(bases[family], tmp_path / "a", target_modules=targets)
    ours, ids = our_adapter(bases[family], tmp_path / "a"), some_ids()
    logits = ours.logits(ours(ids))
    torch.testing.assert_close(logits, theirs(ids).logits, rtol=0, atol=1e-4)
    for model_logits in (logits, theirs(ids).logits):
        model_logits.log_softmax(-1)[..., 7].mean().backward()
    gradients = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(gradients) == len(dict(ours.trained_parameters())) > 0
    for name, p in ours.trained_parameters():
        torch.testing.assert_close(p.grad, gradients[f"base_model.model.{name}.weight"], rtol=1e-4, atol=1e-5)
        assert p.grad.any()
    assert all(p.grad is None for name, p in ours.named_parameters() if ".lora_" not in name)
    merged = theirs.merge_and_unload().state_dict()
    for name, weight in ours.merged_parameters():
        torch.testing.assert_close(weight, merged[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("base", ["llama", "bf16"])
def test_peft_opens_the_adapter_of_a_run_and_transformers_its_merged_model(bases, tmp_path, base):
    sasr.train(config(tmp_path / "x", bases[base]))
    ids, trained = some_ids(), our_adapter(bases[base], tmp_path / "x/adapter")
    plain = AutoModelForCausalLM.from_pretrained(bases[base], dtype=torch.float32)
    before = plain(ids).logits
    theirs = PeftModel.from_pretrained(plain, tmp_path / "x/adapter").eval()
    logits = trained.logits(trained(ids))
    torch.testing.assert_close(theirs(ids).logits, logits, rtol=0, atol=1e-4)
    assert (logits - before).abs().max() > 0.01
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "x/model", dtype="auto")
    assert merged.dtype == (torch.bfloat16 if base == "bf16" else torch.float32)
    weights = dict(trained.merged_parameters())
    for name, weight in load_file(tmp_path / "x/model/model.safetensors").items():
        assert torch.equal(weight, weights[name].to(weight.dtype)), "rounded once"
    about = json.loads((tmp_path / "x/adapter/adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], about["base_model_name_or_path"]) == (3, 32.0, str(bases[base]))


def test_a_run_begins_with_an_adapter_of_pefts_own(bases, tmp_path):
    their_adapter(bases["qwen2"], tmp_path / "a", target_modules=["q_proj", "down_proj"])
    changes = {"adapter": str(tmp_path / "a"), "lora_rank": 0, "kl_coef": 0.1, "reference": "initial"}
    trainer = sasr.Trainer(config(tmp_path / "x", bases["qwen2"], **changes))
    assert [getattr(trainer.config, f"lora_{name}") for name in ("rank", "alpha", "targets")] == [
        3, 12.0, "q_proj down_proj",
    ]  # fmt: skip
    stored = load_file(tmp_path / "a/adapter_model.safetensors")
    assert len(stored) == len(adapters_of(trainer.model)) == 8
    sasr.after_step(trainer)  # keeps the reference policy
    trainer.step()
    for name, kept in adapters_of(trainer.reference).items():
        assert torch.equal(kept, stored[f"base_model.model.{name}.weight"])
        assert not torch.equal(kept, adapters_of(trainer.model)[name])


# ---- What is trained -------------------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing_and_is_the_same_for_the_same_seed(bases, tmp_path):
    base, ids = Transformer.from_pretrained(bases["llama"]), some_ids()
    first, again, other = (sasr.Trainer(config(tmp_path / "x", bases["llama"], seed=seed)).model for seed in (0, 0, 1))
    assert torch.equal(first.logits(first(ids)), base.logits(base(ids)))
    for name, p in adapters_of(first).items():
        bound = 1 / math.sqrt(p.shape[1])  # of Kaiming's uniform distribution, as peft draws it
        assert p.dtype == torch.float32
        assert (0.8 * bound < p.abs().max() <= bound) if name.endswith("A") else not p.any()
        assert torch.equal(p, adapters_of(again)[name])
        assert name.endswith("B") or not torch.equal(p, adapters_of(other)[name])


@pytest.mark.parametrize("base", ["qwen2", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_steps_move_a_and_b_and_nothing_else_and_the_loss_falls(bases, tmp_path, base, checkpointing):
    changes = {"warmup_steps": 8, "gradient_checkpointing": checkpointing, "sft_batch_size": 20}
    trainer = sasr.Trainer(config(tmp_path / "x", bases[base], **changes))
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if ".lora_" not in name}
    before, losses = adapters_of(trainer.model), []
    for step in range(8):
        record = trainer.step()
        trainer.state.finish_step(record, 0.0)
        losses.append(record["loss"])
        if step == 1:
            for name, p in trainer.model.trained_parameters():
                assert not torch.equal(p, before[name]), name
                assert p.grad.any()
                assert p.grad.dtype == trainer.optimizer.state[p]["exp_avg"].dtype == torch.float32
    assert losses[1] < losses[0]
    assert losses[-1] < losses[0] - 0.3
    for name, p in trainer.model.named_parameters():
        if name in frozen:
            assert torch.equal(p, frozen[name])
            assert p.dtype == (torch.bfloat16 if base == "bf16" else torch.float32)
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups if group["params"]} == {0.0}


def test_gradient_checkpointing_changes_no_gradient(bases, tmp_path):
    found = []
    for checkpointing in (False, True):
        trainer = sasr.Trainer(config(tmp_path / "x", bases["bf16"], gradient_checkpointing=checkpointing))
        trainer.step()
        found.append([p.grad for _, p in trainer.model.trained_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("base", ["llama", "bf16"])
def test_the_gradient_norm_depends_neither_on_padding_nor_on_the_cut(bases, tmp_path, base):
    trainer = sasr.Trainer(config(tmp_path / "x", bases[base]))
    sasr.sft_step(trainer, {"kind": "sft"})  # so that B is not zero
    generator = torch.Generator().manual_seed(3)
    ids = lambda n: torch.randint(1, 260, (n,), generator=generator).tolist()  # noqa: E731
    rows = [(ids(3 + i % 4), ids(1 + 5 * i)) for i in range(6)]
    measured = []
    for max_tokens in (10**6, 60, 1):
        part = sasr.Part(Batch.of(rows), sasr.sft_objective)
        stats = sasr.accumulate_gradient(trainer.model, [part], trainer.config, max_tokens)
        measured.append((stats["grad_norm"], stats["padding_fraction"]))
    norms, padding = zip(*measured, strict=True)
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)
    assert padding[0] > padding[1] > padding[2] == 0
    assert norms[0] > 0


# ---- What samples are drawn from -------------------------------------------------------------------------------------


def test_samples_come_from_the_merged_weights_which_a_cpu_has_only_while_it_samples(bases, tmp_path):
    trainer, seen = sasr.Trainer(config(tmp_path / "x", bases["bf16"])), []
    for _ in range(2):
        sasr.sft_step(trainer, {"kind": "sft"})
        assert trainer.sampler.head.is_meta
        with trainer.fresh_sampler() as sampler:
            seen.append(adapted := dict(sampler.named_parameters()))
            wanted = dict(trainer.model.merged_parameters())
            assert adapted.keys() == wanted.keys()
            for name, weight in adapted.items():
                assert weight.dtype == torch.float32
                assert torch.equal(weight, wanted[name].float())
    assert not torch.equal(*(of["model.layers.0.mlp.up_proj.weight"] for of in seen))
    assert torch.equal(*(of["model.embed_tokens.weight"] for of in seen))
    record = {"kind": "grpo"}
    sasr.grpo_step(trainer, record, 0)
    assert record["grad_norm"] > 0
    assert record["sampler_gap"] < 1e-5
    assert trainer.sampler.head.is_meta


def test_a_copy_that_is_there_is_refreshed_in_place_and_rounded_once(bases, tmp_path):
    """As on CUDA, whose graphs read the addresses of the sampler's weights."""
    trainer = sasr.Trainer(config(tmp_path / "x", bases["qwen2"]))
    trainer.sampler.bfloat16()
    with trainer.fresh_sampler() as sampler:
        first = [(p.data_ptr(), p.clone()) for p in sampler.parameters()]
        sasr.sft_step(trainer, {"kind": "sft"})
        with trainer.fresh_sampler():
            wanted = [merged.bfloat16() for _, merged in trainer.model.merged_parameters()]
            for p, (address, before), merged in zip(sampler.parameters(), first, wanted, strict=True):
                assert p.data_ptr() == address
                assert torch.equal(p, merged)
                assert torch.equal(p, before) == (not any(p is of for of in adapted(sampler)))


@pytest.mark.gpu
def test_on_a_card_the_base_is_in_bf16_and_the_copy_of_the_sampler_stays(bases, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    changes = {"device": "cuda", "kl_coef": 0.1, "reference": "initial", "inner_updates": 2}
    trainer = sasr.Trainer(config(tmp_path / "x", bases["llama"], **changes))
    addresses = []
    for _ in range(3):
        sasr.after_step(trainer)
        addresses.append([p.data_ptr() for p in trainer.sampler.parameters()])
        records = [{"kind": "sft"}, {"kind": "grpo"}]
        sasr.sft_step(trainer, records[0])
        sasr.grpo_step(trainer, records[1], 0)
        assert all(record["grad_norm"] > 0 for record in records)
        assert records[1]["sampler_gap"] < 0.05
    assert addresses[0] == addresses[1] == addresses[2]
    assert {p.dtype for p in trainer.sampler.parameters()} == {torch.bfloat16}
    for name, p in trainer.model.named_parameters():
        assert p.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16)


@pytest.mark.parametrize("reference", ["initial", "warmup"])
def test_a_reference_policy_costs_no_model(bases, tmp_path, reference):
    trainer = sasr.Trainer(config(tmp_path / "x", bases["bf16"], kl_coef=0.1, reference=reference, eval_kl=True))
    at = {}
    for step in range(4):
        sasr.after_step(trainer)
        at[step] = adapters_of(trainer.model)
        trainer.state.finish_step(trainer.step(), 0.0)
    kept = trainer.reference
    own = {p.data_ptr() for name, p in kept.named_parameters() if ".lora_" in name}
    shared = {p.data_ptr() for p in trainer.model.parameters()} & {p.data_ptr() for p in kept.parameters()}
    assert len(shared) == len(list(kept.parameters())) - len(own)
    for frozen, step in ((kept, 0 if reference == "initial" else 2), (trainer.warmed_up, 2)):
        assert all(torch.equal(p, at[step][name]) for name, p in frozen.trained_parameters())
        assert not any(p.requires_grad for p in frozen.parameters())
    batch = Batch([[5, 6, 7]], [[8, 9, 10]])
    assert kl_to_reference(trainer.model, kept, batch, 100) > 0
    if reference == "initial":  # the base itself
        base = Transformer.from_pretrained(bases["bf16"])
        found = [sasr.compute_logprobs(model, batch, 100)[0] for model in (kept, base)]
        assert torch.equal(*found)


def test_an_offloaded_reference_leaves_the_base_where_it_is(bases, tmp_path):
    trainer = sasr.Trainer(config(tmp_path / "x", bases["qwen2"], kl_coef=0.1, offload_reference=True))
    reference = trainer.frozen_copy()
    moved = []
    reference.to = lambda device: moved.append(str(device)) or reference
    with trainer.on_device(reference):
        pass
    assert moved == ["cpu"]  # to the device, and not back


@pytest.mark.nightly
@pytest.mark.parametrize(("backend", "checkpointing"), [("aot_eager", True), ("inductor", False)])
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_a_compiled_model_takes_the_same_steps_and_sees_a_new_adapter(
    bases, tmp_path, backend, checkpointing, monkeypatch
):
    whole = Transformer.compile
    monkeypatch.setattr(Transformer, "compile", lambda self, **options: whole(self, backend=backend, **options))
    torch._dynamo.reset()
    their_adapter(bases["bf16"], tmp_path / "a")
    found, ids = [], some_ids()
    for compiled in (False, True):
        changes = {"compile": compiled, "gradient_checkpointing": checkpointing, "lora_alpha": 12.0}
        trainer = sasr.Trainer(config(tmp_path / "x", bases["bf16"], **changes))
        assert (trainer.model._compiled_call_impl is not None) == compiled
        records = [{"kind": kind} for kind in ("sft", "grpo", "sft")]
        sasr.sft_step(trainer, records[0])
        sasr.grpo_step(trainer, records[1], 0)
        sasr.sft_step(trainer, records[2])
        assert records[1]["sampler_gap"] < 1e-4
        trainer.model.load_adapter(tmp_path / "a")
        loaded = trainer.model(ids)
        found.append(([record["grad_norm"] for record in records], loaded))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-3)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-4)
    plain = our_adapter(bases["bf16"], tmp_path / "a", dtype=torch.float32)
    torch.testing.assert_close(found[1][1], plain(ids), rtol=0, atol=1e-4)


# ---- A run: stopped, resumed, branched ------------------------------------------------------------------------------


def stopped(configuration: sasr.Config, step: int, monkeypatch) -> Path:
    """The folder of a run that is stopped after so many steps."""
    original = sasr.Trainer.step

    def step_and_stop(trainer):
        trainer.interrupt.signal = 15 if trainer.state.step == step - 1 else 0
        return original(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(sasr.Trainer, "step", step_and_stop)
        with pytest.raises(Stopped):
            sasr.train(configuration)
    return Path(configuration.out)


KL = {"kl_coef": 0.05, "controller": "alternate", "separate_moments": True}


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(bases, tmp_path, monkeypatch):
    sasr.train(config(tmp_path / "whole", bases["bf16"]))

    original = RunFolder.log

    def log(folder, record):
        if record["step"] == 5:
            raise SystemExit
        original(folder, record)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "log", log)
        with pytest.raises(SystemExit):
            sasr.train(config(tmp_path / "x", bases["bf16"], save_every=3))
    sasr.resume(str(tmp_path / "x"))
    same_run(tmp_path / "x", tmp_path / "whole")


@pytest.mark.parametrize(
    "changes",
    [
        KL | {"reference": "initial", "eval_kl": True},
        KL | {"reference": "warmup", "controller": "sasr", "signal": "kl"},
    ],
    ids=["initial", "warmup"],
)
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(bases, tmp_path, changes, monkeypatch):
    sasr.train(config(tmp_path / "whole", bases["bf16"], **changes))
    for step in (1, 4):
        out = stopped(config(tmp_path / f"cut{step}", bases["bf16"], **changes), step, monkeypatch)
        sasr.resume(str(out))
        same_run(out, tmp_path / "whole")
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (out / "adapter" / name).read_bytes() == (tmp_path / "whole/adapter" / name).read_bytes()
    saved = RunFolder(tmp_path / "whole").find_checkpoint().tensors()
    assert all(".lora_" in name for name in saved)
    assert {name.partition(".")[0] for name in saved} == {
        "model", "optimizer", "grpo_optimizer", "reference", "warmed_up",
    }  # fmt: skip


@pytest.mark.parametrize("reference", ["initial", "warmup"])
def test_a_branch_of_a_warm_up_goes_on_as_a_run_of_its_own(bases, tmp_path, reference, monkeypatch):
    their_adapter(bases["qwen2"], tmp_path / "a")
    begun = {"adapter": str(tmp_path / "a")}
    source = stopped(config(tmp_path / "warm-up", bases["qwen2"], **begun), 2, monkeypatch)
    changes = KL | {"reference": reference}
    sasr.resume(str(source), changes | {"out": str(tmp_path / "branch")})
    sasr.train(config(tmp_path / "whole", bases["qwen2"], **begun | changes))
    same_run(tmp_path / "branch", tmp_path / "whole")


def test_a_resume_needs_the_base_and_the_same_one(bases, tmp_path, monkeypatch):
    base = shutil.copytree(bases["qwen2"], tmp_path / "base")
    out = stopped(config(tmp_path / "x", base), 3, monkeypatch)
    base.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"--model \S+base: no such directory.*--model names its new place"):
        sasr.resume(str(out))
    shutil.copytree(bases["qwen2"], base)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 1e-6
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"other weights \(\*.safetensors\) than when it was written: .*--model"):
        sasr.resume(str(out))
    sasr.resume(str(out), {"model": str(tmp_path / "moved")})
    sasr.train(config(tmp_path / "whole", tmp_path / "moved"))
    same_run(out, tmp_path / "whole")


def test_a_resume_with_an_adapter_that_is_gone_or_another_says_so(bases, tmp_path, monkeypatch):
    their_adapter(bases["qwen2"], tmp_path / "a")
    out = stopped(config(tmp_path / "x", bases["qwen2"], adapter=str(tmp_path / "a")), 3, monkeypatch)
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(ValueError, match=r"--adapter \S+a: no such file or folder; --adapter names its new place"):
        sasr.resume(str(out))
    tensors = load_file(tmp_path / "b/adapter_model.safetensors")
    save_file({name: t * 2 for name, t in tensors.items()}, tmp_path / "b/adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"other adapter \(\*.safetensors\) than when it was written: .*--adapter"):
        sasr.resume(str(out), {"adapter": str(tmp_path / "b")})
    save_file(tensors, tmp_path / "b/adapter_model.safetensors", metadata={"format": "pt"})
    their_adapter(bases["qwen2"], tmp_path / "b")
    sasr.resume(str(out), {"adapter": str(tmp_path / "b")})


def test_a_finished_run_may_be_branched_with_its_adapter(bases, tmp_path):
    sasr.train(config(tmp_path / "x", bases["qwen2"]))
    sasr.resume(str(tmp_path / "x"), {"out": str(tmp_path / "y"), "save_dtype": "bfloat16"})
    files = [tmp_path / out / "adapter/adapter_model.safetensors" for out in "xy"]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert {t.dtype for t in load_file(tmp_path / "y/model/model.safetensors").values()} == {torch.bfloat16}


QUICK = ("sasr", "chord-mu")


@pytest.mark.parametrize(
    "controller",
    [pytest.param(c, marks=() if c in QUICK else pytest.mark.nightly) for c in ("sasr", *SCHEDULES, *METHODS)],
)
def test_every_controller_trains_adapters(bases, tmp_path, controller):
    replayed = ["--replay", str(tmp_path / "sasr")] if controller == "replay" else []
    values = dataclasses.asdict(config("", bases["qwen2"])) | {"controller": "sasr", "out": str(tmp_path / "sasr")}
    for name in ("sasr", controller) if replayed else (controller,):
        values |= {"controller": name, "out": str(tmp_path / name)}
        values |= {"replay": replayed[1]} if name == "replay" else {}
        summary = sasr.train(sasr.Config(**values))
    assert summary["sft_steps"] + summary["grpo_steps"] + summary["mixed_steps"] == 4
    assert summary["bad_steps"] == 0
    trained = load_file(tmp_path / controller / "adapter/adapter_model.safetensors")
    assert all(t.any() for t in trained.values())


def test_deterministic_runs_are_the_same_to_the_bit(bases, tmp_path, determinism_put_back):
    for name in "ab":
        sasr.train(config(tmp_path / name, bases["bf16"], deterministic=True, steps=2))
    same_run(tmp_path / "a", tmp_path / "b")


def test_an_adapter_is_graded_alone(bases, tmp_path, capsys):
    their_adapter(bases["qwen2"], tmp_path / "a")
    our_adapter(bases["qwen2"], tmp_path / "a").save_pretrained(tmp_path / "merged")
    Codec.from_pretrained(bases["qwen2"], prompt_format="raw").save(tmp_path / "merged")
    flags = ["--eval-only", "--task", SMALL["task"], "--ood-task", "none", "--eval-examples", "4", "--device", "cpu"]
    flags += ["--max-new-tokens", "6"]
    assert (
        sasr.main(
            [*flags, "--model", str(bases["qwen2"]), "--adapter", str(tmp_path / "a"), "--out", str(tmp_path / "x")]
        )
        == 0
    )
    assert sasr.main([*flags, "--model", str(tmp_path / "merged"), "--out", str(tmp_path / "y")]) == 0
    assert sasr.main([*flags, "--model", str(bases["qwen2"]), "--out", str(tmp_path / "z")]) == 0
    samples = [(tmp_path / out / "samples.jsonl").read_text() for out in "xyz"]
    assert samples[0] == samples[1] != samples[2]


# ---- What does not fit -----------------------------------------------------------------------------------------------


def about(**changes):
    def change(adapter: Path) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def tensors(change):
    def rewrite(adapter: Path) -> None:
        file = adapter / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return rewrite


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda a: shutil.rmtree(a), "a: no directory of peft, as adapter_config.json is not there"),
        (lambda a: (a / "adapter_config.json").write_text("[]"), "adapter_config.json: not a JSON object"),
        (lambda a: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin"), "safetensors is not there"),
        (lambda a: (a / "adapter_model.safetensors").write_bytes(b"x" * 20), "safetensors: not a readable safetensors"),
        (about(peft_type="LOHA"), "adapter_config.json: peft_type 'LOHA' is not supported, only plain LoRA"),
        (about(use_dora=True), "adapter_config.json: use_dora True is not supported"),
        (about(use_rslora=True), "adapter_config.json: use_rslora True is not supported"),
        (about(rank_pattern={"q_proj": 2}), "adapter_config.json: rank_pattern {'q_proj': 2} is not supported"),
        (about(bias="all"), "adapter_config.json: bias 'all' is not supported"),
        (about(init_lora_weights="pissa"), "adapter_config.json: init_lora_weights 'pissa' is not supported"),
        (about(some_new_way=[1]), "adapter_config.json: some_new_way [1] is not supported"),
        (about(r=10**9), "adapter_config.json: r 1000000000: must be a whole number from 1 to 4096"),
        (about(r=2), "lora_A.weight has shape [3, 48], but r is 2"),
        (about(lora_alpha="x"), "adapter_config.json: lora_alpha 'x': must be a number"),
        (tensors(lambda t: {}), "adapter_model.safetensors: there are no tensors in it"),
        (tensors(lambda t: t | {"x.weight": torch.zeros(2)}), "surplus tensor 'x.weight', which is no A or B"),
        (tensors(lambda t: t | {A: t[A].int()}), f"surplus tensor '{A}', which is no A or B"),
        (tensors(lambda t: t | {A: t[A][0]}), f"surplus tensor '{A}', which is no A or B"),
        (tensors(lambda t: t | {A: t[A][:, :8].clone()}), "lora_A has shape [3, 8], but the model asks for [3, 32]"),
        (tensors(lambda t: {n: v for n, v in t.items() if n != A}), "missing tensor for model.layers.0.self_attn"),
        (tensors(lambda t: t | {A.replace("layers.0", "layers.9"): t[A].clone()}), "surplus tensor for model.layers.9"),
    ],
)  # fmt: skip
def test_a_bad_or_foreign_adapter_is_one_line_and_nothing_is_written(bases, tmp_path, capsys, damage, says):
    their_adapter(bases["qwen2"], tmp_path / "a")
    damage(tmp_path / "a")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name != "lora_rank"]
    flags += [f"--model={bases['qwen2']}", f"--adapter={tmp_path / 'a'}", f"--out={tmp_path / 'x'}"]
    capsys.readouterr()
    assert sasr.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert str(tmp_path / "a") in line
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": ""}, "--lora-rank and --adapter need --model"),
        ({"lora_targets": "q_proj embed_tokens"}, "--lora-targets q_proj embed_tokens: choose from q_proj, k_proj"),
        ({"lora_targets": ""}, "--lora-targets : choose from q_proj, k_proj"),
        ({"lora_rank": -1}, "--lora-rank -1: must be a whole number from 0 to 4096"),
        ({"lora_alpha": 0.0}, "--lora-alpha 0.0: must be a number from 1e-06"),
        ({"lora_rank": 4, "adapter": "a"}, "--lora-rank 4: --adapter a has 3"),
        ({"lora_alpha": 8.0, "adapter": "a"}, "--lora-alpha 8.0: --adapter a has 12.0"),
        ({"lora_targets": "q_proj", "adapter": "a"}, "--lora-targets q_proj: --adapter a has q_proj k_proj v_proj"),
    ],
)
def test_flags_that_do_not_fit_are_named(bases, tmp_path, changes, says):
    if "adapter" in changes:
        their_adapter(bases["qwen2"], tmp_path / "a")
        says = says.replace("--adapter a", f"--adapter {tmp_path / 'a'}")
        changes = changes | {"adapter": str(tmp_path / "a")}
    with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
        config(tmp_path / "x", bases["qwen2"], **changes)


# ---- The plan of its memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "frozen", "device"), [("bf16", 2, "cpu"), ("llama", 4, "cpu"), ("llama", 2, "cuda")])
def test_a_plan_counts_adapters_where_it_counted_a_model(bases, tmp_path, base, frozen, device, capsys):
    setup = Setup(config(tmp_path / "x", bases[base], kl_coef=0.1))
    setup.device = torch.device(device)
    plan, model = memory_plan(setup), sasr.Trainer(setup.config).model
    adapters = sum(p.numel() for _, p in model.trained_parameters())
    parameters = sum(p.numel() for p in model.parameters()) - adapters
    assert plan["weights"] == 4 * adapters + frozen * parameters
    assert plan["optimizer"] == 8 * adapters
    assert plan["gradients"] == 4 * adapters
    assert plan["reference"] == (2 if device == "cuda" else 4) * adapters
    assert plan["sampler's copy"] == (2 * parameters if device == "cuda" else 0)
    merged = 4 * parameters if device == "cpu" else 0
    whole = memory_plan(Setup(dataclasses.replace(setup.config, lora_rank=0)))
    assert device == "cuda" or plan["evaluation"] == whole["evaluation"] + merged
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    assert sasr.main(["--dry-run", *flags, f"--model={bases[base]}"]) == 0
    assert "rollout cache" in capsys.readouterr().out


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_base_keeps_copies_of_its_weights_only_where_they_are_cast(checkpointing):
    shape = ModelConfig(1000, 64, 256, 4, 4, 4, 16, 512)
    of_layer = 4 * 64 * 64 + 3 * 64 * 256
    found = {
        key: activation_bytes(shape, 1, checkpointing, *key) for key in [(c, f) for c in (0, 1) for f in (0, 2, 4)]
    }
    layers = 1 if checkpointing else 4
    assert found[False, 2] - found[False, 4] == 4 * (layers * of_layer + 1000 * 64)
    assert found[False, 0] - found[False, 4] == 4 * 1000 * 64 - 4 * 1000  # the head's gradient, a second row of logits
    assert found[True, 0] - found[True, 2] >= 2 * 3 * of_layer + 6 * 1000 * 64 - (4 * 64 * 64)


@LINUX
@pytest.mark.nightly
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_process_that_trains_adapters_grows_as_planned(tmp_path, checkpointing, dtype):
    changes = {"sft_batch_size": 8, "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 32, "kl_coef": 0.1}
    changes |= {"model": str(write_base(tmp_path / "base", dtype=dtype, large=True)), "lora_rank": 16}
    planned, measured = planned_and_measured(**changes, gradient_checkpointing=checkpointing)
    assert measured == pytest.approx(planned, rel=0.1)


def test_norms_under_adapters_are_measured_beside_those_of_all_weights(bases, capsys):
    """By autograd, on the one batch: that of a fresh adapter, and that of the weights themselves."""
    flags = {**SMALL, "steps": 1, "model": bases["llama"]}
    assert adapter_norms.main([f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["next"] for row in rows] == ["sft", "sft", rows[2]["next"], ""]
    assert rows[0]["adapter"] == rows[0]["B"]  # A has no gradient while B is zero
    assert all(row["adapter"] > row["B"] > 0 for row in rows[1:])
    trainer = sasr.Trainer(sasr.Config(**{**SMALL, "model": str(bases["llama"])}))
    batch = Batch.of(sasr.demonstrations(trainer, trainer.task, 0, "probe"))
    plain, losses = Transformer.from_pretrained(bases["llama"]), []
    for prompt, completion in zip(batch.prompts, batch.completions, strict=True):
        logprobs = plain.logits(plain(torch.tensor([prompt + completion]))).log_softmax(-1)[0, len(prompt) - 1 : -1]
        losses.append(-logprobs[range(len(completion)), completion])
    loss = torch.cat(losses).mean()
    loss.backward()
    assert rows[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    norm = torch.stack([p.grad.norm() for p in plain.parameters()]).norm().item()
    assert rows[0]["all weights"] == pytest.approx(norm, rel=1e-4)
    assert adapter_norms.main(["--model", str(bases["llama"])]) == 2
    assert capsys.readouterr().err.endswith("with --lora-rank or --adapter\n")
