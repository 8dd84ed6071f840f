"""The hot path: log-probs of drawn tokens, the GRPO loss, the exact KL. `reference.py` defines them.

SASR_KERNELS names the implementation. `reference` (plain PyTorch, any device) is the one there is.
"""

from __future__ import annotations

import os

from . import reference

_IMPLEMENTATIONS = {"reference": reference}
_choice = os.environ.get("SASR_KERNELS", "reference")
if _choice not in _IMPLEMENTATIONS:
    raise ImportError(f"SASR_KERNELS={_choice!r} is not available here; choose from {', '.join(_IMPLEMENTATIONS)}")

token_logprobs = _IMPLEMENTATIONS[_choice].token_logprobs
grpo_loss = _IMPLEMENTATIONS[_choice].grpo_loss
exact_kl = _IMPLEMENTATIONS[_choice].exact_kl
