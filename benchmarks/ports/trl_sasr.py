"""SASR in TRL 1.16: a `GRPOTrainer` whose optimizer steps are SFT or GRPO, by the p_t of `sasr.SasrController`."""

import random

from trl import GRPOTrainer

from sasr import SasrController


class SasrTrainer(GRPOTrainer):
    """Leave `num_iterations` and `steps_per_generation` as they are: then a GRPO step samples for itself alone."""

    def __init__(self, *args, demonstrations, warmup_steps: int, gamma: float = 1.0, **kwargs):
        """demonstrations: iterator over micro-batches: input_ids, attention_mask, labels (-100 where not learnt)."""
        super().__init__(*args, **kwargs)
        self.demonstrations, self.warmup_steps = demonstrations, warmup_steps
        self.controller, self.kind = SasrController(gamma), None

    def choose(self) -> str:
        if self.state.global_step < self.warmup_steps:
            return "warmup"
        p = self.controller.sft_probability()  # equation (1)
        self._metrics["train"]["p_sft"].append(p)
        return "sft" if random.Random(f"{self.args.seed} {self.state.global_step}").random() < p else "grpo"

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.kind = self.kind or self.choose()  # by the first micro-batch of a step
        if self.kind == "grpo":
            return super().training_step(model, inputs, num_items_in_batch)
        batch = {key: value.to(model.device) for key, value in next(self.demonstrations).items()}
        loss = model.train()(**batch).loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()

    def _get_grad_norm(self, model, grad_norm=None):  # once a step; the norm is the one from before clipping
        norm, kind, self.kind = super()._get_grad_norm(model, grad_norm), self.kind, None
        if kind != "grpo":
            (self.controller.observe_warmup if kind == "warmup" else self.controller.observe_sft)(norm)
        return norm
