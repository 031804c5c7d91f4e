"""Comparing the models of a task: average ranks over folds and their critical difference, axes of sweeps."""


rule compare_models:
    """One table of all models of a task, by rank, with what cannot be told apart."""
    input:
        metrics=rules.evaluate.output.metrics,
    output:
        result=f"{OUTPUT}/tasks/{{task}}/comparison.json",
        table=report(
            f"{OUTPUT}/tasks/{{task}}/comparison.csv",
            caption="../docs/report/comparison.rst",
            category="Metrics",
            labels={"task": "{task}"},
        ),
    log:
        log_file("compare_models/{task}"),
    benchmark:
        benchmark_file("compare_models/{task}")
    conda:
        "../envs/slidemake.yaml"
    resources:
        mem_mb=growing(1000),
        runtime=minutes(30),
    params:
        level=CONFIG["evaluation"]["level"],
        axes=lambda wildcards: PLAN.sweep_axes(wildcards.task),
        version=STAGE_VERSIONS["compare"],
    message:
        "Comparing the models of task {wildcards.task}"
    script:
        "../scripts/compare_models.py"
