"""Kernels are interpreted on the CPU, except in `pytest -m gpu`, where they are compiled for the card.

Triton decides which at the moment a kernel is decorated, and OpenMP how many threads it has when torch is imported, so
both have to be settled before any test module is.
"""

from __future__ import annotations

import gc
import os


def pytest_configure(config):
    if config.option.markexpr == "gpu":
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = "1"
    if "PYTEST_XDIST_WORKER" in os.environ:  # processes that work side by side would only wait for each other's threads
        os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_finish():
    gc.freeze()  # what the modules hold stays for good: a collection of garbage, 0.3 s, need not look at it again
