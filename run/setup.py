"""What a run is made of before its weights: the device, the tasks as token ids, and the shape of the model."""

import contextlib
import dataclasses
import math
import os
from functools import partial

import torch

from baselines import may_choose_sft
from data import OOD_TASKS, Task, generated_task, load_task, load_task_spec
from data.batch import shuffled
from data.isolated import IsolatedVerifier
from data.tokenized import TokenizedTask
from data.tokenizer import Codec
from model import ModelConfig, Transformer, read_config, resolve_checkpoint
from rollout import resolve_device

from . import parallel
from .config import RunConfig


class Setup:
    """All but the weights. Raises ValueError naming the flag or file that is wrong, or the data that is missing."""

    def __init__(self, config: RunConfig):
        self.config, self.device = config, resolve_device(parallel.local_device(config.device))
        parallel.add_up([torch.zeros(1, device=self.device)])  # so that NCCL has its memory before a cache fills it
        if config.shard and parallel.RANKS == 1:
            raise ValueError("--shard: one process has nothing to share out; start with torchrun, or go on --no-shard")
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
            # A warning, no more: on CUDA the cumulative sums of the sampler exist in one form only.
            torch.use_deterministic_algorithms(True, warn_only=True)
        task, warmup_task, ood_tasks = load_tasks(config)
        self.checkpoint, context = None, math.inf
        if config.model:
            self.checkpoint = resolve_checkpoint(config.model, weights=False)
            self.shape = read_config(self.checkpoint)
            context = self.shape.max_position_embeddings
            prompts = {n: getattr(config, n) for n in ("prompt_format", "system", "template_args", "template_date")}
            self.codec = Codec.from_pretrained(self.checkpoint, **prompts)
        elif config.prompt_format == "chat" or config.system or config.template_args:
            raise ValueError("--prompt-format chat, --system and --template-args need --model, and its chat template")
        else:
            examples = task.train + warmup_task.train
            texts = (text for e in examples for text in (e.prompt, e.demonstration or e.answer))
            self.codec = Codec.trained_on(texts, config.vocab_size)
        limits = {n: getattr(config, n) for n in ("max_new_tokens", "max_prompt_tokens", "max_demonstration_tokens")}
        tokenize = partial(TokenizedTask, codec=self.codec, context=context, **limits)
        self.task = tokenize(task, eval_split=config.eval_split)
        self.warmup_task = self.task if warmup_task is task else tokenize(warmup_task)
        self.ood_tasks = {f"_ood{n if n > 1 else ''}": tokenize(ood) for n, ood in enumerate(ood_tasks, start=1)}
        found = self.task.demonstration_of
        self.with_demonstration = [i for i, demonstration in enumerate(found) if demonstration is not None]
        self.without_demonstration = [i for i, demonstration in enumerate(found) if demonstration is None]
        if config.total_steps:
            self.task.check_prompts()
            share, shown, total = config.demonstrated_share, len(self.with_demonstration), len(self.task.train)
            if (share > 0 and not shown) or (0 <= share < 1 and shown == total):
                found = f"{shown} of {total} prompts of {task.name} have a demonstration"
                raise ValueError(f"--demonstrated-share {share:g}: {found}")
        if config.warmup_steps:
            self.warmup_task.check_demonstrations()
        if may_choose_sft(config):
            self.task.check_demonstrations()
        for tokenized in (self.task, *self.ood_tasks.values()):
            tokenized.check_evaluated(config.eval_examples)
        graded = [] if config.reward else [self.task]  # a user's function is not for trying
        graded += [self.warmup_task] if self.warmup_task is not self.task else []
        learnt = config.warmup_steps > 0 or may_choose_sft(config)
        wrong = [check_grades(tokenized, self.codec, learnt) for tokenized in graded if config.total_steps]
        self.notes = [*self.codec.notes, *filter(None, wrong)]
        if not config.model:
            longest = max(t.context for t in (self.task, self.warmup_task, *self.ood_tasks.values()))
            tokens, end = self.codec.tokenizer.get_vocab_size(), self.codec.stop_token_ids[0]
            self.shape = ModelConfig.small(tokens, config.hidden_size, config.layers, config.heads, longest, end)

    def draw_prompts(self, number: int) -> list[int]:
        """Batch number 0, 1, ... of the training prompts, with --demonstrated-share each kind in an order of its own.

        Where a share is no whole number of prompts, batches differ by one, so that over several of them it is exact.
        """
        size, share = self.config.prompts_per_step, self.config.demonstrated_share
        draw = partial(shuffled, seed=self.config.seed, purpose="prompts")
        if share < 0:
            return draw(len(self.task.train), number * size, size)
        shown, others = self.with_demonstration, self.without_demonstration
        start, end = (round(n * size * share) for n in (number, number + 1))
        drawn = [shown[i] for i in draw(len(shown), start, end - start)]
        return drawn + [others[i] for i in draw(len(others), number * size - start, size - len(drawn))]

    def make_model(self) -> Transformer:
        """With the weights of --model, or random ones, which are the same for the same seed, as adapters are."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            if not self.checkpoint:
                return Transformer(self.shape)
            frozen = torch.bfloat16 if self.device.type == "cuda" else None  # None: as the files have it
            dtype = frozen if self.config.lora_rank else torch.float32
            model = Transformer.from_pretrained(resolve_checkpoint(self.config.model), dtype=dtype)
            if self.config.lora_rank:
                model.add_adapters(self.config.lora_rank, self.config.lora_alpha, self.config.lora_targets)
        if self.config.adapter:
            model.load_adapter(self.config.adapter)
        return model


@contextlib.contextmanager
def strictly_deterministic():
    """Within, --deterministic does not only warn: for a warning, attention on CUDA keeps its backward as it is."""
    mode = torch.get_deterministic_debug_mode()  # 0: off, 1: warns, 2: raises
    torch.set_deterministic_debug_mode(2 if mode else 0)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


def check_grades(tokenized: TokenizedTask, codec: Codec, learnt: bool, count: int = 64) -> str:
    """Grade `count` demonstrations, spread over the file, as if a model had written them: what is not right, or "".

    They go from text to tokens and back, so that tokenizer, template and verifier are tried too. Where they are not
    `learnt`, a thought that only the prompt opens is no fault: the model may close it. Raises ValueError where none is
    graded as right: then no reward could be earned.
    """
    total = len(tokenized.demonstrations)
    chosen = [i * total // count for i in range(count)] if total > count else range(total)
    texts = codec.decode([tokenized.demonstrations[i][1] for i in chosen])
    if not learnt:
        texts = [text if "</think>" in text else text.removeprefix(codec.opening) for text in texts]
    tried = [(tokenized.worked[i], text) for i, text in zip(chosen, texts, strict=True)]
    wrong = [(*pair, grade) for pair in tried if not (grade := tokenized.source.grade(pair[1], pair[0])).correct]
    if not wrong:
        return ""
    (example, text, grade), name = wrong[0], tokenized.source.name
    reason = f"reward {grade.reward:g}, {'another answer' if grade.well_formed else 'no answer found'}"
    end = f"ends in {text[-160:]!r}" if len(text) > 160 else f"is {text!r}"
    shown = f"the first (answer {example.answer[:80]!r}) {end} when read back from its tokens ({reason})"
    if len(wrong) < len(tried):
        return f"{len(wrong)} of {len(tried)} demonstrations of {name} are graded as wrong; {shown}"
    every = f"task {name}: not one of {len(tried)} demonstrations is graded as right, so no reward can be earned"
    fix = "mend the demonstrations, or choose with --verifier how answers are compared"
    raise ValueError("; ".join([every, shown, *(codec.notes or [fix])]))


def load_tasks(config: RunConfig) -> tuple[Task, Task, list[Task]]:
    """The task, the task to warm up on (often the same), and those out of domain."""
    verifier = {"verifier": config.verifier} if config.verifier else {}
    reading = {"skip_bad_lines": config.skip_bad_lines, "keep_records": bool(config.reward)}
    task = load_task_spec(config.task, config.data, config.seed, **reading, **verifier)
    options = task.verify.keywords
    if config.reward or options.get("verifier") in ("math-verify", "regex"):  # foreign, or of no bounded time
        limits = {"seconds": config.reward_seconds, "on_error": config.reward_on_error}
        task = dataclasses.replace(task, verify=IsolatedVerifier(task.name, options, config.reward, **limits))
    warmup = generated_task("--warmup-task", config.warmup_task, config.seed) if config.warmup_task else task
    if config.ood_task == "auto":
        return task, warmup, harder_tasks(config, task)
    names = [] if config.ood_task == "none" else config.ood_task.split()
    return task, warmup, [generated_task("--ood-task", name, config.seed) for name in names]


def harder_tasks(config: RunConfig, task: Task) -> list[Task]:
    """`--ood-task auto`: the task of `OOD_TASKS`, with the options of --task but those of size.

    None where --task is no generated one, has a verifier of the user's, is as hard itself, or has too few of the kind.
    """
    if config.data or config.reward or task.name not in OOD_TASKS:
        return []
    (key, value), sizes = OOD_TASKS[task.name], ("train_size", "test_size", "demonstrations", "swapped")
    if task.options.get(key, 0) >= value:
        return []
    options = {k: v for k, v in task.options.items() if k not in sizes} | {key: value, "train_size": 1}
    try:
        return [load_task(task.name, seed=config.seed, **options)]
    except ValueError:  # `dropped_report` says that there is none
        return []
