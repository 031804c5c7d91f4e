"""Tissue detection on the overview of each slide."""


rule detect_tissue:
    """Mask, outlines (GeoJSON, editable in QuPath), areas and QC fractions of every slide of a rack."""
    input:
        fetched=fetched_slides,
        manifest=rules.screen_slides.output.manifest,
        outlines=lambda wildcards: user_inputs(
            sorted(PLAN.outlines(wildcards.rack).values())
        ),
    output:
        manifest=manifest("tissue", "{rack}"),
    log:
        log_file("detect_tissue/{rack}"),
    benchmark:
        benchmark_file("detect_tissue/{rack}")
    conda:
        "../envs/slidemake.yaml"
    threads: RACK_THREADS
    resources:
        mem_mb=growing(2000),
        runtime=minutes(10, per_slide=2),
    params:
        results=OUTPUT,
        outlines=lambda wildcards: PLAN.outlines(wildcards.rack),
        options=stage_options(CONFIG, "tissue"),
        version=STAGE_VERSIONS["tissue"],
        files=lambda wildcards: braced(PLAN.outlines(wildcards.rack).values()),
    message:
        "Finding tissue on the slides of rack {wildcards.rack}"
    script:
        "../scripts/detect_tissue.py"
