"""Multiple-instance learning: folds of patients, one model per fold and repeat, predictions out of fold, metrics."""

# Folds are trained side by side, and models and controls are jobs of their own: together they have the cores.
TRAINED_MODELS = sum(len(PLAN.models_of(task)) for task in TASKS)
TRAINING_THREADS = RACK_THREADS if IN_JOB else MACHINE.training_threads(TRAINED_MODELS)


rule split_cohort:
    """Folds at patient level, with a report on balance; a patient in two folds stops the run."""
    input:
        slides=rules.cohort_table.output.slides,
        passed=rules.check_cohort.output.passed,
        given=lambda wildcards: PLAN.split_files(wildcards.task),
    output:
        splits=f"{OUTPUT}/tasks/{{task}}/splits.csv",
        report=f"{OUTPUT}/tasks/{{task}}/splits.json",
    log:
        log_file("split_cohort/{task}"),
    benchmark:
        benchmark_file("split_cohort/{task}")
    localrule: True
    conda:
        "../envs/slidemake.yaml"
    resources:
        mem_mb=growing(500),
        runtime=minutes(30),
    params:
        task=lambda wildcards: PLAN.task_options(wildcards.task),
        version=STAGE_VERSIONS["splits"],
    message:
        "Assigning the patients of task {wildcards.task} to folds"
    script:
        "../scripts/split_cohort.py"


rule pack_bags:
    """All tiles of a cohort in one array, for its training jobs to share.

    Not `temp`: Snakemake would train every model again when the array has to be made again for one that was added.
    """
    input:
        slides=rules.cohort_table.output.slides,
        embed=lambda wildcards: feature_manifests(wildcards.encoder),
    output:
        features=f"{OUTPUT}/cohort/bags/{{encoder}}.npy",
        places=f"{OUTPUT}/cohort/bags/{{encoder}}.places",
        index=f"{OUTPUT}/cohort/bags/{{encoder}}.json",
    log:
        log_file("pack_bags/{encoder}"),
    benchmark:
        benchmark_file("pack_bags/{encoder}")
    conda:
        "../envs/slidemake.yaml"
    resources:
        mem_mb=growing(1500),
        runtime=minutes(60),
    params:
        results=OUTPUT,
        version=STAGE_VERSIONS["bags"],
    message:
        "Packing the embeddings of {wildcards.encoder} for training"
    script:
        "../scripts/pack_bags.py"


def bags_of(wildcards):
    """The packed embeddings that a model trains on, and their index."""
    encoder = PLAN.encoder_of(wildcards.task, wildcards.model)
    return [
        f"{OUTPUT}/cohort/bags/{encoder}{suffix}"
        for suffix in (".npy", ".json", ".places")
    ]


rule check_leakage:
    """Slides of two patients in different folds that look identical stop the run before anything is trained."""
    input:
        splits=rules.split_cohort.output.splits,
        bags=[
            f"{OUTPUT}/cohort/bags/{{encoder}}{suffix}" for suffix in (".npy", ".json")
        ],
    output:
        report=f"{OUTPUT}/tasks/{{task}}/leakage/{{encoder}}.json",
    log:
        log_file("check_leakage/{task}/{encoder}"),
    benchmark:
        benchmark_file("check_leakage/{task}/{encoder}")
    conda:
        "../envs/slidemake.yaml"
    resources:
        mem_mb=growing(1500),
        runtime=minutes(60),
    params:
        threshold=lambda wildcards: PLAN.task_options(wildcards.task)["splits"][
            "near_duplicate"
        ],
        version=STAGE_VERSIONS["splits"],
    message:
        "Looking for slides that are alike in different folds of task {wildcards.task}"
    script:
        "../scripts/check_leakage.py"


rule probe_shortcuts:
    """What the embeddings know of site and scanner, and whether it would help a model with the label."""
    input:
        background=lambda wildcards: (
            manifests("background", encoder=wildcards.encoder)
            if wildcards.encoder in PLAN.background_encoders()
            else []
        ),
        slides=rules.cohort_table.output.slides,
        splits=rules.split_cohort.output.splits,
        bags=[
            f"{OUTPUT}/cohort/bags/{{encoder}}{suffix}" for suffix in (".npy", ".json")
        ],
    output:
        report=f"{OUTPUT}/tasks/{{task}}/shortcuts/{{encoder}}.json",
    log:
        log_file("probe_shortcuts/{task}/{encoder}"),
    benchmark:
        benchmark_file("probe_shortcuts/{task}/{encoder}")
    conda:
        "../envs/slidemake.yaml"
    resources:
        mem_mb=growing(1500),
        runtime=minutes(60),
    params:
        results=OUTPUT,
        seed=CONFIG["evaluation"]["seed"],
        version=STAGE_VERSIONS["evaluate"],
    message:
        "Probing the embeddings of {wildcards.encoder} for shortcuts in task {wildcards.task}"
    script:
        "../scripts/probe_shortcuts.py"


rule train_aggregator:
    """Trains a model (or a control) on every fold of every repeat; writes bundles and out-of-fold predictions."""
    input:
        slides=rules.cohort_table.output.slides,
        splits=rules.split_cohort.output.splits,
        bags=bags_of,
        leakage=lambda wildcards: (
            f"{OUTPUT}/tasks/{wildcards.task}/leakage/"
            f"{PLAN.encoder_of(wildcards.task, wildcards.model)}.json"
        ),
        target=rules.make_stain_target.output.target,
    output:
        manifest=f"{OUTPUT}/tasks/{{task}}/{{model}}/train.json",
        slides=f"{OUTPUT}/tasks/{{task}}/{{model}}/predictions_slides.csv",
        patients=f"{OUTPUT}/tasks/{{task}}/{{model}}/predictions_patients.csv",
        curves=f"{OUTPUT}/tasks/{{task}}/{{model}}/curves.csv",
    log:
        log_file("train_aggregator/{task}/{model}"),
    benchmark:
        benchmark_file("train_aggregator/{task}/{model}")
    conda:
        "../envs/slidemake.yaml"
    threads: TRAINING_THREADS
    resources:
        mem_mb=growing(2500 + 500 * TRAINING_THREADS),
        runtime=minutes(240),
    params:
        encoder=lambda wildcards: PLAN.encoder_of(wildcards.task, wildcards.model),
        task=lambda wildcards: PLAN.task_options(wildcards.task),
        options=lambda wildcards: PLAN.model_options(wildcards.task, wildcards.model),
        context=lambda wildcards: PLAN.bundle_context(wildcards.task, wildcards.model),
        version=STAGE_VERSIONS["train"],
    message:
        "Training {wildcards.model} for task {wildcards.task}"
    script:
        "../scripts/train_aggregator.py"


# Not where a bundle is applied: one that lies in this very folder of results would be a file to make, of no task.
if TASKS:

    rule describe_training:
        """What a model's training slides were like, kept with its bundle: new slides are compared with it (`predict`)."""
        input:
            train=f"{OUTPUT}/tasks/{{task}}/{{model}}/train.json",
            predictions=f"{OUTPUT}/tasks/{{task}}/{{model}}/predictions_patients.csv",
            slides=rules.cohort_table.output.slides,
            splits=rules.split_cohort.output.splits,
            bags=bags_of,
        output:
            reference=f"{OUTPUT}/tasks/{{task}}/{{model}}/bundle/reference.json",
        log:
            log_file("describe_training/{task}/{model}"),
        benchmark:
            benchmark_file("describe_training/{task}/{model}")
        conda:
            "../envs/slidemake.yaml"
        resources:
            mem_mb=growing(1500),
            runtime=minutes(60),
        params:
            results=OUTPUT,
            version=STAGE_VERSIONS["drift"],
        message:
            "Describing the training slides of {wildcards.model} for task {wildcards.task}"
        script:
            "../scripts/describe_training.py"


rule evaluate:
    """Metrics with patient-level intervals for every model and control of a task, and what they allow to say."""
    input:
        predictions=lambda wildcards: [
            f"{OUTPUT}/tasks/{wildcards.task}/{model}/predictions_patients.csv"
            for model in PLAN.models_of(wildcards.task)
        ],
        slides=rules.cohort_table.output.slides,
        splits=rules.split_cohort.output.splits,
    output:
        metrics=f"{OUTPUT}/tasks/{{task}}/metrics.json",
        table=report(
            f"{OUTPUT}/tasks/{{task}}/metrics.csv",
            caption="../docs/report/metrics.rst",
            category="Metrics",
            labels={"task": "{task}"},
        ),
        curves=f"{OUTPUT}/tasks/{{task}}/curves.json",
    log:
        log_file("evaluate/{task}"),
    benchmark:
        benchmark_file("evaluate/{task}")
    conda:
        "../envs/slidemake.yaml"
    resources:
        mem_mb=growing(1500),
        runtime=minutes(60),
    params:
        models=lambda wildcards: PLAN.models_of(wildcards.task),
        type=lambda wildcards: PLAN.task_options(wildcards.task)["type"],
        split=lambda wildcards: PLAN.task_options(wildcards.task)["splits"]["method"],
        options=stage_options(CONFIG, "evaluate"),
        contamination=lambda wildcards: PLAN.contamination_of(wildcards.task),
        version=STAGE_VERSIONS["evaluate"],
    message:
        "Evaluating the models of task {wildcards.task}"
    script:
        "../scripts/evaluate.py"
