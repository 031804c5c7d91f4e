"""The report: one HTML file that needs no network; also part of `snakemake --report`."""

EXPLAINED = {task: PLAN.explained_model(task) for task in TASKS}


rule write_report:
    """Cohort, failures, QC, metrics, curves, heatmaps, throughput and provenance in one page."""
    input:
        passed=rules.check_cohort.output.passed,
        slides=rules.cohort_table.output.slides,
        failures=rules.cohort_table.output.failures,
        target=rules.make_stain_target.output.target,
        metrics=[f"{OUTPUT}/tasks/{task}/metrics.json" for task in TASKS],
        comparisons=[f"{OUTPUT}/tasks/{task}/comparison.json" for task in TASKS],
        drift=DRIFT if PLAN.bundle else [],
        stress=[
            f"{OUTPUT}/tasks/{task}/{model}/stress.json"
            for task, model in PLAN.stressed_models().items()
        ],
        stain=[f"{OUTPUT}/tasks/{task}/stain.json" for task in PLAN.stain_compared()],
        shortcuts=[
            f"{OUTPUT}/tasks/{task}/shortcuts/{encoder}.json"
            for task in TASKS
            for encoder in PLAN.probed(task)
        ],
        external=(
            rules.evaluate_bundle.output.metrics
            if PLAN.bundle and CONFIG["bundle_label"]
            else []
        ),
        explained=of_all_racks(
            [
                manifest("explain", rack, task=task, model=model)
                for task, model in EXPLAINED.items()
                if model
                for rack in RACKS
            ]
        ),
        manifests=of_all_racks(
            [
                *manifests("screen"),
                *SLIDE_MANIFESTS["tissue"],
                *SLIDE_MANIFESTS["stain"],
                *[path for grid in GRIDS for path in manifests("tiles", grid=grid)],
                *[path for e in ENCODERS for path in feature_manifests(e)],
            ]
        ),
    output:
        html=report(
            f"{OUTPUT}/report/index.html",
            caption="../docs/report/report.rst",
            category="Report",
        ),
        seal=f"{OUTPUT}/report/report.json",
    log:
        log_file("write_report"),
    benchmark:
        benchmark_file("write_report")
    conda:
        "../envs/slidemake.yaml"
    resources:
        mem_mb=growing(2000),
        runtime=minutes(60),
    params:
        results=OUTPUT,
        tasks={
            task: {"models": PLAN.models_of(task), "explained": EXPLAINED[task]}
            for task in TASKS
        },
        encoders={slug: ENCODERS[slug].licence for slug in sorted(ENCODERS)},
        grids=sorted(GRIDS),
        config={key: value for key, value in CONFIG.items() if key != "progress_every"},
        configfiles=[
            os.path.relpath(path) for path in workflow.config_settings.configfiles
        ],
        version=STAGE_VERSIONS["report"],
    message:
        "Writing the report"
    script:
        "../scripts/write_report.py"
