"""Prediction: a trained bundle on slides that it has never seen, from slide file to probability."""

if PLAN.bundle:

    rule predict_slides:
        """Applies the bundle to the embeddings of every slide of the sheet."""
        input:
            slides=rules.cohort_table.output.slides,
            passed=rules.check_cohort.output.passed,
            bundle=f"{CONFIG['bundle']}/bundle.json",
            weights=PLAN.bundle_weights,
            embed=of_all_racks(
                [path for e in ENCODERS for path in feature_manifests(e)]
            ),
        output:
            slides=f"{OUTPUT}/predictions/slides.csv",
            patients=f"{OUTPUT}/predictions/patients.csv",
            seal=f"{OUTPUT}/predictions/tables.json",
        log:
            log_file("predict_slides"),
        benchmark:
            benchmark_file("predict_slides")
        conda:
            "../envs/slidemake.yaml"
        resources:
            mem_mb=growing(2000),
            runtime=minutes(60),
        params:
            results=OUTPUT,
            bundle=CONFIG["bundle"],
            encoder=next(iter(ENCODERS)),
            version=STAGE_VERSIONS["predict"],
        message:
            "Predicting the slides of {CONFIG[sheet]} with {params.bundle}"
        script:
            "../scripts/predict_slides.py"

    rule evaluate_bundle:
        """Metrics of the bundle on a cohort that it was not trained on; nothing is fitted."""
        input:
            patients=rules.predict_slides.output.patients,
            slides=rules.cohort_table.output.slides,
            bundle=f"{CONFIG['bundle']}/bundle.json",
        output:
            metrics=f"{OUTPUT}/predictions/metrics.json",
            table=f"{OUTPUT}/predictions/metrics.csv",
            curves=f"{OUTPUT}/predictions/curves.json",
        log:
            log_file("evaluate_bundle"),
        benchmark:
            benchmark_file("evaluate_bundle")
        conda:
            "../envs/slidemake.yaml"
        resources:
            mem_mb=growing(1500),
            runtime=minutes(60),
        params:
            label=CONFIG["bundle_label"],
            options=stage_options(CONFIG, "evaluate"),
            version=STAGE_VERSIONS["evaluate"],
        message:
            "Evaluating {CONFIG[bundle]} on {CONFIG[sheet]}"
        script:
            "../scripts/evaluate_bundle.py"

    rule watch_drift:
        """Compares the new slides with those that the bundle was trained on: as a whole, by site and by month."""
        input:
            slides=rules.cohort_table.output.slides,
            patients=rules.predict_slides.output.patients,
            reference=f"{CONFIG['bundle']}/reference.json",
        output:
            drift=f"{OUTPUT}/predictions/drift.json",
            table=f"{OUTPUT}/predictions/drift.csv",
        log:
            log_file("watch_drift"),
        benchmark:
            benchmark_file("watch_drift")
        conda:
            "../envs/slidemake.yaml"
        resources:
            mem_mb=growing(2000),
            runtime=minutes(60),
        params:
            results=OUTPUT,
            bundle=CONFIG["bundle"],
            encoder=next(iter(ENCODERS)),
            version=STAGE_VERSIONS["drift"],
        message:
            "Comparing the new slides with the training slides of {params.bundle}"
        script:
            "../scripts/watch_drift.py"

    # A bundle that an older slidemake made, or a fold's own, has no reference.
    DRIFT = (
        [rules.watch_drift.output.drift]
        if os.path.exists(rules.watch_drift.input.reference)
        else []
    )

    rule predict:
        """The target of `snakemake predict --config bundle=DIR sheet=new.csv output=DIR`."""
        input:
            rules.predict_slides.output.slides,
            rules.predict_slides.output.patients,
            rules.evaluate_bundle.output.metrics if CONFIG["bundle_label"] else [],
            DRIFT,
