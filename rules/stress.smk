"""What tiles do to figures: under stress (compressed, blurred, dimmed, restained, rescaled), and without normalisation."""


rule stress_test:
    """Embeds a sample of the tested patients' tiles again, corrupted, and predicts it out of fold."""
    input:
        trained=f"{OUTPUT}/tasks/{{task}}/{{model}}/train.json",
        splits=rules.split_cohort.output.splits,
        slides=rules.cohort_table.output.slides,
        tiles=lambda wildcards: manifests(
            "tiles",
            grid=PLAN.grid_of(PLAN.encoder_of(wildcards.task, wildcards.model)),
        ),
        stain=of_all_racks(manifests("stain")),
        target=rules.make_stain_target.output.target,
    output:
        result=f"{OUTPUT}/tasks/{{task}}/{{model}}/stress.json",
        table=f"{OUTPUT}/tasks/{{task}}/{{model}}/stress.csv",
    log:
        log_file("stress_test/{task}/{model}"),
    benchmark:
        benchmark_file("stress_test/{task}/{model}")
    conda:
        "../envs/slidemake.yaml"
    threads: EMBED_THREADS
    resources:
        gpu=0 if DEVICE == "cpu" else 1,
        mem_mb=growing(4000),
        runtime=minutes(240),
    params:
        results=OUTPUT,
        encoder=lambda wildcards: PLAN.encoder_record(
            PLAN.encoder_of(wildcards.task, wildcards.model)
        ),
        stain=lambda wildcards: PLAN.stain_method_of(
            PLAN.encoder_of(wildcards.task, wildcards.model)
        ),
        embedding=stage_options(CONFIG, "embed"),
        place=PLAN.place,
        evaluation=stage_options(CONFIG, "evaluate"),
        options=stage_options(CONFIG, "stress"),
        files=lambda wildcards: PLAN.weights_files(
            [PLAN.encoder_of(wildcards.task, wildcards.model)]
        ),
        version=STAGE_VERSIONS["stress"],
    message:
        "Testing {wildcards.model} of task {wildcards.task} under stress"
    script:
        "../scripts/stress_test.py"


rule compare_stain:
    """What stain normalisation does to a linear probe: a sample of tiles with and without it."""
    input:
        splits=rules.split_cohort.output.splits,
        slides=rules.cohort_table.output.slides,
        tiles=lambda wildcards: manifests(
            "tiles", grid=PLAN.grid_of(PLAN.stain_compared()[wildcards.task])
        ),
        stain=of_all_racks(manifests("stain")),
        target=rules.make_stain_target.output.target,
    output:
        result=f"{OUTPUT}/tasks/{{task}}/stain.json",
    log:
        log_file("compare_stain/{task}"),
    benchmark:
        benchmark_file("compare_stain/{task}")
    conda:
        "../envs/slidemake.yaml"
    threads: EMBED_THREADS
    resources:
        gpu=0 if DEVICE == "cpu" else 1,
        mem_mb=growing(4000),
        runtime=minutes(240),
    params:
        results=OUTPUT,
        encoder=lambda wildcards: PLAN.encoder_record(
            PLAN.stain_compared()[wildcards.task]
        ),
        stain=lambda wildcards: PLAN.stain_method_of(
            PLAN.stain_compared()[wildcards.task]
        ),
        embedding=stage_options(CONFIG, "embed"),
        place=PLAN.place,
        seed=CONFIG["evaluation"]["seed"],
        version=STAGE_VERSIONS["stain"],
    message:
        "Comparing task {wildcards.task} with and without stain normalisation"
    script:
        "../scripts/compare_stain.py"
