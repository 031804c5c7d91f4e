"""Configuration, sample sheet and racks: everything that the rules share, read once."""

import os
import shutil

from slidemake.adapter import available_cpus
from slidemake.configuration import stage_options
from slidemake.contamination import in_words
from slidemake.failures import RunError
from slidemake.progress import Watch
from slidemake.provenance import STAGE_VERSIONS
from slidemake.racks import Machine
from slidemake.running import claim_results, refusal, stop_jobs_on_sigterm
from slidemake.setup import mark_results_folder, plan_run, rack_size_hint

HAS_GPU = shutil.which("nvidia-smi") is not None or os.path.exists("/dev/nvidia0")
# A cluster's job reads this file again, on its node.
IN_JOB = not workflow.is_main_process
# --jobs beside --cores: an executor that is not local.
ON_CLUSTER = workflow.nodes is not None
GPUS = workflow.global_resources.get("gpu") if HAS_GPU else None
MACHINE = Machine(
    cores=workflow.cores, gpus=int(GPUS.value) if GPUS else 0, cluster=ON_CLUSTER
)

try:
    PLAN = plan_run(config, Path(workflow.basedir), MACHINE, in_job=IN_JOB)
    if not IN_JOB:
        if reason := refusal(
            Path(PLAN.output), Path(".snakemake", "locks"), sys.argv[1:]
        ):
            raise RunError(reason)
except RunError as error:
    sys.exit(f"\nslidemake cannot start.\n{error}\n")

CONFIG, OUTPUT, RACKS, TASKS = PLAN.config, PLAN.output, PLAN.racks, PLAN.tasks
ENCODERS, GRIDS = PLAN.encoders, PLAN.grids
WATCH = Watch(MACHINE, CONFIG["progress_every"])
if not IN_JOB:
    WATCH.attach()
# CPU stages work on one slide after the other; each job gets several threads where there are fewer racks than cores, and
# on a cluster, whose jobs do not share `cores` (there they are those of a node).
RACK_THREADS = max(
    1, min(4, MACHINE.cores // (1 if ON_CLUSTER else max(1, len(RACKS))))
)
if IN_JOB:
    RACK_THREADS = int(os.environ.get("SLURM_CPUS_PER_TASK") or available_cpus())


def growing(mem_mb):
    """Memory that grows with each attempt: for profiles with `retries`."""
    return lambda wildcards, attempt: mem_mb * attempt


def minutes(base, per_slide=0):
    """Time limit (used on clusters) of a job: so much, and so much for each slide of its rack; grows with each attempt."""

    def runtime(wildcards, attempt):
        slides = len(RACKS[wildcards.rack]) if per_slide else 0
        return (base + per_slide * slides) * attempt

    return runtime


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


def of_all_racks(files):
    """A list of files of all racks as an input function. For every file of a plain list that is an input of a rule with
    `rules.x.output` among its other inputs, Snakemake hashes the whole list: a plan quadratic in the number of racks.
    """
    return lambda wildcards: files


def log_file(name):
    return f"{OUTPUT}/logs/{name}.log"


def benchmark_file(name):
    return f"{OUTPUT}/benchmarks/{name}.tsv"
