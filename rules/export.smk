"""Export: features, labels, folds, predictions and heatmaps in the layouts of other tools."""

EXPORTED = CONFIG["export"]["formats"]


rule export_results:
    """Each format in a folder of its own below exports/, whole or not at all; the manifest says what is there."""
    input:
        slides=rules.cohort_table.output.slides,
        passed=rules.check_cohort.output.passed,
        embed=of_all_racks([path for e in ENCODERS for path in feature_manifests(e)]),
        splits=[f"{OUTPUT}/tasks/{task}/splits.csv" for task in TASKS],
        predictions=[
            f"{OUTPUT}/tasks/{task}/{model}/predictions_patients.csv"
            for task in TASKS
            for model in (TASKS[task]["models"] if "anndata" in EXPORTED else [])
        ],
        explained=of_all_racks(
            [
                manifest("explain", rack, task=task, model=model)
                for task, model in EXPLAINED.items()
                if model and "qupath" in EXPORTED
                for rack in RACKS
            ]
        ),
    output:
        manifest=f"{OUTPUT}/exports/export.json",
    log:
        log_file("export_results"),
    benchmark:
        benchmark_file("export_results")
    conda:
        "../envs/slidemake.yaml"
    resources:
        mem_mb=growing(2000),
        runtime=minutes(60, per_slide=1),
    params:
        results=OUTPUT,
        formats=EXPORTED,
        encoders=sorted(ENCODERS),
        tasks={
            task: {"models": TASKS[task]["models"], "explained": EXPLAINED[task]}
            for task in TASKS
        },
        version=STAGE_VERSIONS["export"],
    message:
        "Exporting features and tables for {params.formats}"
    script:
        "../scripts/export_results.py"


rule export:
    """The target of `snakemake export --config ...`: everything that `export.formats` names."""
    input:
        rules.export_results.output.manifest,
