"""What a run is made of before its weights: the device, the tasks as token ids, and the shape of the model."""

import dataclasses
import math
import os
from functools import partial

import torch

from baselines import may_choose_sft
from data import OOD_TASKS, Task, generated_task, load_task_spec
from data.isolated import IsolatedVerifier
from data.tokenized import TokenizedTask
from data.tokenizer import Codec
from model import ModelConfig, Transformer, read_config, resolve_checkpoint
from rollout import resolve_device

from .config import RunConfig


class Setup:
    """All but the weights. Raises ValueError naming the flag or file that is wrong, or the data that is missing."""

    def __init__(self, config: RunConfig):
        self.config, self.device = config, resolve_device(config.device)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
            torch.use_deterministic_algorithms(True, warn_only=True)  # some sums over rows exist in one form only
        task, warmup_task, ood_task = load_tasks(config)
        self.checkpoint, context = None, math.inf
        if config.model:
            self.checkpoint = resolve_checkpoint(config.model, weights=False)
            self.shape = read_config(self.checkpoint)
            context = self.shape.max_position_embeddings
            prompts = {"prompt_format": config.prompt_format, "system": config.system}
            self.codec = Codec.from_pretrained(self.checkpoint, **prompts)
        elif config.prompt_format == "chat" or config.system:
            raise ValueError("--prompt-format chat and --system need --model: without one there is no chat template")
        else:
            examples = task.train + warmup_task.train
            texts = (text for e in examples for text in (e.prompt, e.demonstration or e.answer))
            self.codec = Codec.trained_on(texts, config.vocab_size)
        limits = {n: getattr(config, n) for n in ("max_new_tokens", "max_prompt_tokens", "max_demonstration_tokens")}
        tokenize = partial(TokenizedTask, codec=self.codec, context=context, **limits)
        self.task = tokenize(task, eval_split=config.eval_split)
        self.warmup_task = self.task if warmup_task is task else tokenize(warmup_task)
        self.ood_task = tokenize(ood_task) if ood_task else None
        if config.total_steps:
            self.task.check_prompts()
        if config.warmup_steps:
            self.warmup_task.check_demonstrations()
        if may_choose_sft(config):
            self.task.check_demonstrations()
        for tokenized in filter(None, (self.task, self.ood_task)):
            tokenized.check_evaluated(config.eval_examples)
        if not config.model:
            longest = max(t.context for t in (self.task, self.warmup_task, self.ood_task) if t)
            tokens, end = self.codec.tokenizer.get_vocab_size(), self.codec.stop_token_ids[0]
            self.shape = ModelConfig.small(tokens, config.hidden_size, config.layers, config.heads, longest, end)

    def make_model(self) -> Transformer:
        """With the weights of --model, or random ones, which are the same for the same seed."""
        if self.checkpoint:
            return Transformer.from_pretrained(resolve_checkpoint(self.config.model))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            return Transformer(self.shape)


def load_tasks(config: RunConfig) -> tuple[Task, Task, Task | None]:
    """The task, the task to warm up on (often the same), and the out-of-domain one (or None)."""
    verifier = {"verifier": config.verifier} if config.verifier else {}
    task = load_task_spec(config.task, config.data, config.seed, skip_bad_lines=config.skip_bad_lines, **verifier)
    options = task.verify.keywords
    if config.reward or options.get("verifier") in ("math-verify", "regex"):  # foreign, or of no bounded time
        limits = {"seconds": config.reward_seconds, "on_error": config.reward_on_error}
        task = dataclasses.replace(task, verify=IsolatedVerifier(task.name, options, config.reward, **limits))
    warmup = generated_task("--warmup-task", config.warmup_task, config.seed) if config.warmup_task else task
    ood = config.ood_task
    if ood == "auto":  # it fits the task's own defaults only, and its own verifier
        ood = "none" if config.data or config.reward else OOD_TASKS.get(config.task, "none")
    return task, warmup, None if ood == "none" else generated_task("--ood-task", ood, config.seed)
