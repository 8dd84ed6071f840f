"""`rollout.generate` in a loop that trains a `transformers` model: token ids in, token ids out.

The sampler works on the foreign model's own tensors (parameters have the same names), so an optimizer step is seen at
once and no weight is kept twice. After what gives the model other tensors, such as `model.to("cuda")`, make a new one.
For a checkpoint in a folder, `Transformer.from_pretrained(folder)` is a sampler.
"""

import torch

from model import ModelConfig, Transformer
from rollout import Rollout, SamplingParams, generate


def sampler_for(model) -> Transformer:
    """For a `transformers` model of a kind that model.py knows; ValueError names what another one asks for."""
    with torch.device("meta"):  # shapes only
        sampler = Transformer(ModelConfig.from_dict(model.config.to_dict()))
    own = model.state_dict()
    weights = {name: own[name] for name in sampler.state_dict()}  # a tied output matrix is the embedding here
    sampler.load_state_dict(weights, assign=True)
    return sampler.requires_grad_(False)


def sample(sampler: Transformer, prompts: list[list[int]], *, samples: int = 1, seed: int = 0, **params) -> Rollout:
    """`samples` completions of each prompt, prompt-major, with their log-probs; params: of `SamplingParams`."""
    stops = sampler.config.eos_token_id  # one, several, or none
    stops = tuple(stops) if isinstance(stops, list) else () if stops is None else (stops,)
    generator = torch.Generator(sampler.device).manual_seed(seed)
    params = SamplingParams(**{"stop_token_ids": stops} | params)
    return generate(sampler, prompts, params, group_size=samples, generator=generator)
