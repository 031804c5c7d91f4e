"""Configuration, sample sheet and racks: everything that the rules share, read once."""

import os
import shutil

from slidemake.configuration import stage_options
from slidemake.failures import RunError
from slidemake.provenance import STAGE_VERSIONS
from slidemake.setup import mark_results_folder, plan_run

try:
    PLAN = plan_run(config, Path(workflow.basedir))
except RunError as error:
    sys.exit(f"\nslidemake cannot start.\n{error}\n")

CONFIG, OUTPUT, RACKS, TASKS = PLAN.config, PLAN.output, PLAN.racks, PLAN.tasks
ENCODERS, GRIDS = PLAN.encoders, PLAN.grids
# A rack's CPU stages work on one slide after the other; with fewer racks than cores each job gets several threads.
RACK_THREADS = max(1, min(4, (workflow.cores or 2) // max(1, len(RACKS))))


wildcard_constraints:
    rack=r"r\d+",
    grid=r"\d+px_[0-9.]+mpp",
    encoder=r"[A-Za-z0-9_.-]+",
    task=r"[A-Za-z0-9_.-]+",
    model=r"[A-Za-z0-9_.-]+",


def manifest(stage, rack, **where):
    """Path of a stage's manifest: manifests/<stage>[/<grid or encoder or task/model>]/<rack>.json."""
    return "/".join([OUTPUT, "manifests", stage, *where.values(), f"{rack}.json"])


def manifests(stage, **where):
    """Manifests of a stage over all racks."""
    return [manifest(stage, rack, **where) for rack in RACKS]


def log_file(name):
    return f"{OUTPUT}/logs/{name}.log"


def benchmark_file(name):
    return f"{OUTPUT}/benchmarks/{name}.tsv"
