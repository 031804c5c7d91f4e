"""Configuration, sample sheet and racks: everything that the rules share, read once."""

import atexit
import os

from snakemake_interface_executor_plugins.settings import SharedFSUsage

from slidemake.embedding.sizes import embedding_mb
from slidemake.jobs.devices import nvidia_gpus
from slidemake.jobs.job import available_cpus, cgroup_quotas
from slidemake.configuration.load import stage_options
from slidemake.cohort.sheet import describe_tasks
from slidemake.core.words import contamination_warning
from slidemake.core.currency import identity
from slidemake.core.failures import RunError
from slidemake.workflow.snakemake_plan import attach
from slidemake.workflow.summary import slides_in_plan
from slidemake.workflow.progress import Watch
from slidemake.core.stages import STAGE_VERSIONS
from slidemake.jobs.racks import Machine
from slidemake.workflow.running import (
    check_writable,
    claim_results,
    is_run,
    refusal,
    stop_jobs_on_sigterm,
)
from slidemake.core.yaml_files import check_yaml_files
from slidemake.workflow.place import precision_hint
from slidemake.workflow.plan import mark_results_folder, plan_run, rack_size_hint

# A cluster's job reads this file again, on its node.
IN_JOB = not workflow.is_main_process
# --jobs beside --cores: an executor that is not local.
ON_CLUSTER = workflow.nodes is not None
# A GPU whose driver answers: of a cluster's jobs, their node's.
NVIDIA_GPUS, NO_GPU_BECAUSE = nvidia_gpus()
GPUS = workflow.global_resources.get("gpu") if NVIDIA_GPUS else None
# A container's or service's quota of CPU time is none of what `--cores all` looks at.
CORES = int(max(1, min([workflow.cores, *([] if ON_CLUSTER else cgroup_quotas())])))
MACHINE = Machine(
    cores=CORES,
    gpus=int(GPUS.value) if GPUS else 0,
    cluster=ON_CLUSTER,
    gpu=bool(NVIDIA_GPUS),
)

try:
    if not IN_JOB:  # Snakemake has loaded them, and takes the last of two equal keys
        check_yaml_files(workflow.config_settings.configfiles)
    PLAN = plan_run(config, BASE, MACHINE, in_job=IN_JOB)
    if not IN_JOB:
        if reason := refusal(
            Path(PLAN.output), Path(".snakemake", "locks"), sys.argv[1:]
        ):
            raise RunError(reason)
except RunError as error:
    sys.exit(f"\nslidemake cannot start.\n{error}\n")

# Jobs are told by the environment, because it changes no result.
os.environ["SLIDEMAKE_SLIDE_SECONDS"] = str(PLAN.config["slide_seconds"])
CONFIG, OUTPUT, RACKS, TASKS = PLAN.config, PLAN.output, PLAN.racks, PLAN.tasks
ENCODERS, GRIDS = PLAN.encoders, PLAN.grids
CURRENCY = attach(workflow, Path(OUTPUT), IN_JOB)
CURRENCY.racks = {rack: [row.slide_id for row in rows] for rack, rows in RACKS.items()}
CURRENCY.excluded = {row.slide_id for row in PLAN.rows if row.exclude}
CURRENCY.owners = lambda: PLAN.owners
if not IN_JOB:
    for line in [*PLAN.feature_notes(), *PLAN.outline_problems()[:20]]:
        print(f"slidemake: warning: {line}", file=sys.stderr)
    for line in describe_tasks(PLAN.rows, TASKS):
        print(f"slidemake: {line}", file=sys.stderr)
WATCH = Watch(MACHINE, CONFIG["progress_every"])
if not IN_JOB:
    WATCH.attach()
# CPU stages work on one slide after the other; each job gets several threads where there are fewer racks than cores, and
# on a cluster, whose jobs do not share `cores` (there they are those of a node).
RACK_THREADS = max(
    1, min(4, MACHINE.cores // (1 if ON_CLUSTER else max(1, len(RACKS))))
)
if IN_JOB:
    # Under a name of our own, because an array's task loses Slurm's variables before its last process reads this.
    os.environ.setdefault(
        "SLIDEMAKE_JOB_CPUS",
        os.environ.get("SLURM_CPUS_PER_TASK") or str(available_cpus()),
    )
    RACK_THREADS = int(os.environ["SLIDEMAKE_JOB_CPUS"])
LARGEST_RACK = max(map(len, RACKS.values()), default=0)


def growing(mem_mb):
    """Memory that grows with each attempt: for profiles with `retries`."""
    return lambda wildcards, attempt: mem_mb * attempt


def minutes(base, per_slide=0):
    """Time limit (used on clusters) of a job: so much, and so much for each slide of a rack; grows with each attempt.

    The same for all racks, also for one that is not full: the jobs of a Slurm array have one limit for all.
    """
    return lambda wildcards, attempt: (base + per_slide * LARGEST_RACK) * attempt


def check_executor():
    """Refuse what an executor would do to the results, before a job is sent; some settings are known when a run starts."""
    if SharedFSUsage.INPUT_OUTPUT not in workflow.storage_settings.shared_fs_usage:
        sys.exit(
            "\nslidemake cannot start.\nIts jobs need a file system that they all share: stores of tiles and embeddings "
            "are not among the files that Snakemake moves from node to node (docs/guide.md, Kubernetes).\n"
        )
    if problem := array_jobs_problem():
        sys.exit(f"\nslidemake cannot start.\n{problem}\n")


def array_jobs_problem():
    """Why Slurm's job arrays would hang, or None. The executor plugin loses jobs that are ready and not handed over
    together with the others of their rule (its issue 473), so nothing may hold some of them back.
    """
    if not getattr(workflow.executor_settings, "array_jobs", None):
        return None
    ready = max(
        len(RACKS) * max(1, len(TASKS)),
        sum(len(PLAN.models_of(task)) for task in TASKS),
    )
    scheduling = workflow.scheduling_settings
    per_timespan = scheduling.max_jobs_per_timespan
    gpus = workflow.global_resources.get("gpu")
    limits = {
        "jobs": workflow.nodes,
        "max-jobs-per-timespan": per_timespan.max_jobs if per_timespan else None,
        "scheduler-subsample": scheduling.subsample,
        "resources gpu": gpus.value if gpus else None,
    }
    small = [f"{k}={v}" for k, v in limits.items() if v is not None and int(v) < ready]
    if not small:
        return None
    return (
        f"slurm-array-jobs: {ready} jobs of one rule can be ready at once here, and {', '.join(small)} would make them "
        "hang. Raise that, or switch arrays off (--slurm-array-jobs '')."
    )


def start_run(files):
    """What a run does before its first job. `files`: those that it will write, as far as they are known."""
    check_executor()
    try:
        check_writable(files)
        claim_results(Path(OUTPUT))
    except RunError as error:
        sys.exit(f"\nslidemake cannot start.\n{error}\n")
    if not ON_CLUSTER:
        stop_jobs_on_sigterm()
    mark_results_folder(
        Path(OUTPUT),
        PLAN.rack_size if RACKS else None,
        PLAN.racks_on_disk if REMOTE_RACKS else None,
        PLAN,
    )
    WATCH.begin([rule.name for rule in workflow.rules if rule.output])
    if CORES < workflow.cores:
        print(
            f"slidemake: warning: --cores is {workflow.cores}, and this process may use {CORES} CPUs: give --cores {CORES}",
            file=sys.stderr,
        )
    for hint in filter(
        None,
        [
            rack_size_hint(PLAN, MACHINE),
            precision_hint(CONFIG["embedding"], ENCODERS, PLAN.place),
        ],
    ):
        print(f"slidemake: {hint}", file=sys.stderr)
    wanted = CONFIG["embedding"]["device"] == "auto" and not PLAN.imports
    if NO_GPU_BECAUSE and not ON_CLUSTER and wanted:
        print(
            f"slidemake: warning: this machine's GPU is not used, {NO_GPU_BECAUSE}; the CPU takes many times as long",
            file=sys.stderr,
        )
    for record in ENCODERS.values():
        if record.domain_warning:
            print(f"slidemake: warning: {record.domain_warning}", file=sys.stderr)
    for encoder, corpora in PLAN.contamination.items():
        print(
            f"slidemake: warning: {contamination_warning(encoder, corpora)}",
            file=sys.stderr,
        )


def slides_of_plan():
    """What a dry run says of slides."""
    return slides_in_plan(CURRENCY.racks, CURRENCY.fates(), Path(OUTPUT))


if not IN_JOB and not is_run(sys.argv[1:]):
    WATCH.on_plan = slides_of_plan


def end_run():
    """What a run says at its end."""
    WATCH.end()
    for line in WATCH.summary(Path(OUTPUT), sum(map(len, RACKS.values()))):
        print(f"slidemake: {line}", file=sys.stderr)


if not IN_JOB:
    check_executor()


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


def feature_manifests(encoder):
    """Manifests over all racks that vouch for the features of an encoder, embedded here or imported."""
    return manifests(PLAN.features_stage, encoder=encoder)


# Where features are imported, slides are neither masked nor tiled.
SLIDE_MANIFESTS = {
    stage: [] if PLAN.imports else manifests(stage) for stage in ("tissue", "stain")
}


def user_inputs(paths):
    """Files of users as inputs: those that are there (one that is missing is its slide's failure, not the plan's end),
    without those whose names Snakemake would take for patterns; these are in the params, see `braced`.
    """
    return [path for path in paths if "{" not in path and identity(path) != "absent"]


def braced(paths):
    """Files of users with braces in their paths: for params.files, so that they are noticed like other inputs."""
    return [path for path in paths if "{" in path]


def of_all_racks(files):
    """A list of files of all racks as an input function. For every file of a plain list that is an input of a rule with
    `rules.x.output` among its other inputs, Snakemake hashes the whole list: a plan quadratic in the number of racks.
    """
    return lambda wildcards: files


def log_file(name):
    return f"{OUTPUT}/logs/{name}.log"


def benchmark_file(name):
    return f"{OUTPUT}/benchmarks/{name}.tsv"
