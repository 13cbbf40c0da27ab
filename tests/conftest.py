"""One thread per process, and property tests that draw the same examples on every run."""

import os

from hypothesis import settings

from multiview_sets import toy_set  # noqa: F401 a fixture for every test

# Two OpenMP threads that share busy cores make a step ten times slower. Before torch is imported, and for the
# processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("restrike", deadline=None, derandomize=True, max_examples=25, database=None)
settings.load_profile("restrike")
