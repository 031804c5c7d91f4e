"""Snakemake whose Slurm plugin asks for the state of its jobs every second, and submits them at once.

By itself it waits 5 s before it submits a job, and 5 s and more between two looks, which is kind to a cluster that is
shared and long in a test. Nothing else is changed, and nothing in the jobs.
"""

import time
from types import SimpleNamespace

import snakemake_executor_plugin_slurm as plugin
from snakemake.cli import main

plugin.time = SimpleNamespace(time=time.time, sleep=lambda seconds: None)
plugin.Executor.next_seconds_between_status_checks = property(lambda self: 1.0, lambda self, seconds: None)

if __name__ == "__main__":
    main()
