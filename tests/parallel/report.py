"""Writes the tables of docs/parallelism.md from the last test run: `python -m tests.parallel.report`."""

CACHE_KEY = "graftwork/parallelism"
