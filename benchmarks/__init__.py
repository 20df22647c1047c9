"""Measurements of speed and memory; run `python -m benchmarks.speed --help` in the checkout."""

import os

# The profiler of torch, which counts memory here, talks too much.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
