"""A line of JSON for each test as soon as it ends: `python -m pytest -p benchmarks.pytest_rows`.

pytest keeps the tracebacks for its end, which a run that is cut off never sees.
"""

from __future__ import annotations

import json


def pytest_runtest_logreport(report):
    if report.when == "call" or not report.passed:  # a skip or an error may come from setup
        row = {"test": report.nodeid, "result": report.outcome, "seconds": round(report.duration, 2)}
        if not report.passed:
            row["why"] = report.longreprtext[-2000:]
        print("\n" + json.dumps(row), flush=True)
