"""Evaluation: greedy answers, and drawn ones (`--eval-samples`), to the first examples, their grades, and scores."""

import dataclasses
from collections.abc import Callable

import torch

import kernels
from baselines import Group
from data import Example, Grade
from data.batch import Batch, rng_for
from data.tokenized import TokenizedTask
from model import Transformer, completion_hidden
from rollout import SamplingParams

from . import parallel
from .checkpoint import RunFolder, default_out
from .config import RunConfig
from .report import dropped_report, provenance, score_table
from .scores import scores_of

EVAL_ROWS = 256  # answers that an evaluation draws at once


def evaluate(trainer) -> dict[str, float]:
    """Scores (`scores.scores_of`), also out of domain (`_ood`, `_ood2`); the answers go to `trainer.answers`.

    Also `kl`, from the reference policy or, with --eval-kl, from that at the end of the warm-up: over the whole
    vocabulary, in nats per token of the greedy answers.
    """
    trainer.answers = []
    if not trainer.task.evaluated:
        return {}
    with trainer.interrupt.at_once(), trainer.fresh_sampler():
        scores, greedy = evaluate_task(trainer, trainer.task, trainer.config.eval_split)
        for suffix, task in trainer.ood_tasks.items():
            of_ood, _ = evaluate_task(trainer, task, suffix.removeprefix("_"))
            scores |= {f"{name}{suffix}": value for name, value in of_ood.items()}
        frozen = trainer.warmed_up if trainer.config.eval_kl else trainer.reference
        if frozen is not None:
            asked = [i for i, answer in enumerate(greedy) if answer]  # a prompt that does not fit has none
            batch = Batch([trainer.task.eval_prompts[i] for i in asked], [greedy[i] for i in asked])
            with trainer.on_device(frozen) as reference:
                scores["kl"] = trainer.budget.retry_on_oom(kl_to_reference, trainer.model, reference, batch)
    trainer.state.reward_failures += sum(answer["failed"] for answer in trainer.answers)
    return scores


def evaluate_task(trainer, tokenized: TokenizedTask, split: str) -> tuple[dict[str, float], list[list[int]]]:
    """Scores on the first examples, and the greedy answers as token ids."""
    config, stops = trainer.config, trainer.codec.stops
    greedy = SamplingParams(tokenized.max_new_tokens, temperature=0, **stops)
    answers = draw_answers(trainer, tokenized, greedy, 1)  # [examples][1 + eval_samples]
    if config.eval_samples:
        params = SamplingParams(tokenized.max_new_tokens, config.eval_temperature, **stops)
        sampled = draw_answers(trainer, tokenized, params, config.eval_samples)
        answers = [first + more for first, more in zip(answers, sampled, strict=True)]
    examples, wrong = tokenized.evaluated[: config.eval_examples], Grade(0.0, correct=False, well_formed=False)

    def graded(some: list[tuple[Example, bool, list[str]]]) -> list[list[Grade]]:
        """Of examples, whether their prompts fit, and their answers."""
        grade = tokenized.source.grade
        return [[grade(text, example) if fits else wrong for text in texts] for example, fits, texts in some]

    fits = [prompt is not None for prompt in tokenized.eval_prompts[: config.eval_examples]]
    texts_of = [trainer.codec.decode(completions) for completions in answers]
    grades = parallel.in_shares(graded, list(zip(examples, fits, texts_of, strict=True)))
    for index, (example, texts) in enumerate(zip(examples, texts_of, strict=True)):
        for sample, (text, grade) in enumerate(zip(texts, grades[index], strict=True)):
            answer = {"split": split, "index": index, "sample": sample, "prompt": example.prompt}
            answer |= {"answer": example.answer, "completion": text}
            trainer.answers.append(answer | dataclasses.asdict(grade))
    scores = scores_of(examples, [of[0] for of in grades], [of[1:] for of in grades], config.seed)
    return scores, [completions[0] for completions in answers]


def draw_answers(trainer, tokenized: TokenizedTask, params: SamplingParams, samples: int) -> list[list[list[int]]]:
    """[examples][samples] completions as token ids; empty ones where the prompt does not fit."""
    config, at_once = trainer.config, max(1, EVAL_ROWS // samples)
    prompts = tokenized.eval_prompts[: config.eval_examples]
    asked = [prompt for prompt in prompts if prompt is not None]
    seed = int(rng_for(config.seed, "evaluation", trainer.state.step).integers(2**63))
    generator = torch.Generator(trainer.device).manual_seed(seed)
    options = {"memory_limit": int(1e9 * config.rollout_memory), "samplers": {}, "generator": generator}
    groups: list[list[list[int]]] = []
    for start in range(0, len(asked), at_once):
        part = asked[start : start + at_once]
        groups += [[] for _ in part]
        for drawn in range(0, samples, EVAL_ROWS):
            size = min(EVAL_ROWS, samples - drawn)
            trainer.interrupt.check()
            completions = parallel.generate(trainer.sampler, part, params, group_size=size, **options).completions
            for i, group in enumerate(groups[start:]):
                group += completions[i * size : (i + 1) * size]
        trainer.progress.show(f"evaluating {tokenized.source.name}: {len(groups)}/{len(asked)}")
    answered = iter(groups)
    return [next(answered) if prompt is not None else [[]] * samples for prompt in prompts]


@torch.no_grad()
def kl_to_reference(model: Transformer, reference: Transformer, batch: Batch, max_tokens: int) -> float:
    """KL(model || reference) in nats, exact over the vocabulary, mean over the completion tokens of a batch."""
    total, tokens = 0.0, sum(map(len, batch.completions))
    with parallel.together(model, reference):
        for micro in parallel.micro_batches(batch, max_tokens, model):
            with torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda"):
                hidden, ref_hidden = completion_hidden(model, micro), completion_hidden(reference, micro)
                total += kernels.exact_kl(hidden, model.head, ref_hidden, reference.head).sum().item()
    return sum(parallel.gather(total)) / max(tokens, 1)


def kl_of_samples(trainer, groups: list[Group]) -> float:
    """How far the policy is from that at the end of the warm-up, in nats a token of its own samples (`--signal kl`)."""
    batch = Batch.of((group.prompt, sample.tokens) for group in groups for sample in group.samples)
    with trainer.on_device(trainer.warmed_up) as warmed_up:
        return trainer.budget.retry_on_oom(kl_to_reference, trainer.model, warmed_up, batch)


def evaluate_only(config: RunConfig, make_trainer: Callable) -> None:
    """Grade --model: show a table, then write the answers to OUT/samples.jsonl and the scores to OUT/summary.json."""
    if not config.model:
        raise ValueError("--eval-only needs --model, a checkpoint directory")
    config = dataclasses.replace(config, warmup_steps=0, steps=0)
    folder = RunFolder(config.out or default_out(config, "eval"))
    folder.check_unused()
    trainer = make_trainer(config)
    evaluated = len(trainer.task.evaluated[: config.eval_examples])
    if not evaluated:
        raise ValueError(f"task {config.task}: there are no {config.eval_split} examples to evaluate")
    for line in dropped_report(trainer):
        trainer.progress.say(line)
    with folder.locked(new=True):
        with trainer.progress:
            scores = evaluate(trainer)
        print("\n".join(score_table(scores, f"{config.task}, {evaluated} {config.eval_split} examples")), flush=True)
        folder.write_jsonl("samples.jsonl", trainer.answers)
        about = {"reward_failures": trainer.state.reward_failures, "config": dataclasses.asdict(config)}
        folder.write_json("summary.json", scores | about | provenance(trainer.device))
    print(f"written to {folder.path}")
