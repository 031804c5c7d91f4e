"""Explanation: where on each slide the model looked, by models that never saw the slide's patient."""


rule explain_slides:
    """Attention and leave-one-tile-out per tile, heatmap (PNG, GeoJSON), tiles with most and least attention."""
    input:
        trained=f"{OUTPUT}/tasks/{{task}}/{{model}}/train.json",
        predictions=f"{OUTPUT}/tasks/{{task}}/{{model}}/predictions_patients.csv",
        splits=rules.split_cohort.output.splits,
        embed=lambda wildcards: manifest(
            PLAN.features_stage,
            wildcards.rack,
            encoder=PLAN.encoder_of(wildcards.task, wildcards.model),
        ),
    output:
        manifest=manifest("explain", "{rack}", task="{task}", model="{model}"),
    log:
        log_file("explain_slides/{task}/{model}/{rack}"),
    benchmark:
        benchmark_file("explain_slides/{task}/{model}/{rack}")
    conda:
        "../envs/slidemake.yaml"
    threads: 1
    resources:
        mem_mb=growing(2000),
        runtime=minutes(10, per_slide=5),
    params:
        results=OUTPUT,
        # No input: that its folds are one says enough, and every job would look through all inputs of the table's job.
        slides=f"{OUTPUT}/cohort/slides.csv",
        encoder=lambda wildcards: PLAN.encoder_of(wildcards.task, wildcards.model),
        task=lambda wildcards: PLAN.task_options(wildcards.task),
        options=stage_options(CONFIG, "explain"),
        remote=lambda wildcards: (
            PLAN.remote_rows(wildcards.rack)
            if CONFIG["tiling"]["store"] == "coords"
            else []
        ),
        fetching=CONFIG["remote"],
        # The demo draws them in the same run, after the plan has looked.
        files=lambda wildcards: (
            [] if CONFIG["demo"] else PLAN.truth_files(wildcards.rack)
        ),
        version=STAGE_VERSIONS["explain"],
    message:
        "Explaining {wildcards.model} on the slides of rack {wildcards.rack}"
    script:
        "../scripts/explain_slides.py"
