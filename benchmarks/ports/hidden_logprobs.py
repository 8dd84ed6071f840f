"""Log-probs, entropies and KL of a `transformers` model from its hidden states, without an [N, V] tensor of logits.

`kernels.token_logprobs` and `kernels.exact_kl` take the last hidden states and the output matrix. They are not for a
model that does more to its logits: a bias, Gemma 2's soft cap, the scale of Cohere or Granite.
"""

import torch
from torch import Tensor

import kernels


def completion_hidden(model, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
    """The hidden states [N, D] that predict the N completion tokens, row by row; all arguments [B, T]."""
    hidden = model.get_decoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # [B, T, D]
    return hidden[:, :-1][completion_mask[:, 1:].bool()]  # the state before a token predicts it


def completion_logprobs(
    model, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of each completion token in nats, both [N] and differentiable; the arguments as above."""
    hidden = completion_hidden(model, input_ids, attention_mask, completion_mask)
    targets = input_ids[:, 1:][completion_mask[:, 1:].bool()]  # [N]
    return kernels.token_logprobs(hidden, model.get_output_embeddings().weight, targets, temperature)


@torch.no_grad()
def completion_kl(model, reference, *batch: Tensor) -> Tensor:
    """KL(model || reference) over the whole vocabulary at each completion token, [N]; batch: the three above."""
    states = [(completion_hidden(m, *batch), m.get_output_embeddings().weight) for m in (model, reference)]
    return kernels.exact_kl(*states[0], *states[1])
