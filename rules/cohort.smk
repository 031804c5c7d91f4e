"""The cohort as a whole: which slides made it, which did not and why, and whether to go on."""


rule cohort_table:
    """slides.csv (one row a slide: sheet, status, figures) and failures.csv (reason and remedy)."""
    input:
        sheet=CONFIG["sheet"] or [],
        screen=of_all_racks(manifests("screen")),
        tissue=of_all_racks(SLIDE_MANIFESTS["tissue"]),
        stain=of_all_racks(SLIDE_MANIFESTS["stain"]),
        target=rules.make_stain_target.output.target,
        tiles=of_all_racks(
            [path for grid in GRIDS for path in manifests("tiles", grid=grid)]
        ),
        embed=of_all_racks([path for e in ENCODERS for path in feature_manifests(e)]),
    output:
        slides=f"{OUTPUT}/cohort/slides.csv",
        failures=f"{OUTPUT}/cohort/failures.csv",
        seal=f"{OUTPUT}/cohort/tables.json",
    log:
        log_file("cohort_table"),
    benchmark:
        benchmark_file("cohort_table")
    conda:
        "../envs/slidemake.yaml"
    resources:
        mem_mb=growing(1000),
        runtime=minutes(30),
    params:
        results=OUTPUT,
        sheet=CONFIG["sheet"],
        duplicates=CONFIG["screening"]["duplicates"],
    message:
        "Writing the table of the cohort and of its failures"
    script:
        "../scripts/cohort_table.py"


rule check_cohort:
    """Ends the run when more slides failed than `max_failed_fraction` allows; the tables stay."""
    input:
        slides=rules.cohort_table.output.slides,
        failures=rules.cohort_table.output.failures,
        seal=rules.cohort_table.output.seal,
    output:
        passed=f"{OUTPUT}/cohort/passed.json",
    log:
        log_file("check_cohort"),
    benchmark:
        benchmark_file("check_cohort")
    localrule: True
    conda:
        "../envs/slidemake.yaml"
    resources:
        mem_mb=growing(500),
        runtime=minutes(30),
    params:
        max_failed_fraction=CONFIG["max_failed_fraction"],
    message:
        "Checking that at most {params.max_failed_fraction:.0%} of the slides failed"
    script:
        "../scripts/check_cohort.py"


rule cohort:
    """Everything up to the embeddings, with the cohort's tables (a run without a task)."""
    input:
        rules.check_cohort.output.passed,
