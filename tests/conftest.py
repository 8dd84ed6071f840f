"""Kernels are interpreted on the CPU, except in `pytest -m gpu`, where they are compiled for the card.

Triton decides which at the moment a kernel is decorated, so it has to be settled before any test module is imported.
"""

from __future__ import annotations

import os


def pytest_configure(config):
    if config.option.markexpr == "gpu":
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = "1"
