"""Import: features of other tools, instead of tiles and an encoder."""

if PLAN.imports:

    def features_of_rack(wildcards):
        """Files of features that are there; a slide without one is a failure record."""
        files = PLAN.feature_files(wildcards.rack)
        return user_inputs(path for paths in files.values() for path in paths)

    rule import_features:
        """Files of features of a rack's slides -> an embedding store each, checked against slide and encoder."""
        input:
            features=features_of_rack,
            screen=manifest("screen", "{rack}"),
        output:
            manifest=manifest("import", "{rack}", encoder="{encoder}"),
        log:
            log_file("import_features/{encoder}/{rack}"),
        benchmark:
            benchmark_file("import_features/{encoder}/{rack}")
        conda:
            "../envs/slidemake.yaml"
        threads: RACK_THREADS
        resources:
            mem_mb=growing(2000),
            runtime=minutes(10, per_slide=1),
        params:
            results=OUTPUT,
            rows=lambda wildcards: PLAN.feature_rows(wildcards.rack),
            sources=lambda wildcards: PLAN.feature_files(wildcards.rack),
            encoder=lambda wildcards: PLAN.encoder_record(wildcards.encoder),
            options=stage_options(CONFIG, "import"),
            version=STAGE_VERSIONS["import"],
            files=lambda wildcards: braced(
                p for ps in PLAN.feature_files(wildcards.rack).values() for p in ps
            ),
        message:
            "Importing the features of rack {wildcards.rack} ({wildcards.encoder})"
        script:
            "../scripts/import_features.py"
