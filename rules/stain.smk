"""Stain: one fit per slide on pooled tissue pixels, and the reference that slides are brought to."""


rule fit_stain:
    """Stain matrix and concentrations of every slide of a rack, as data: no pixel is changed here."""
    input:
        fetched=fetched_slides,
        manifest=rules.detect_tissue.output.manifest,
    output:
        manifest=manifest("stain", "{rack}"),
    log:
        log_file("fit_stain/{rack}"),
    benchmark:
        benchmark_file("fit_stain/{rack}")
    conda:
        "../envs/slidemake.yaml"
    threads: RACK_THREADS
    resources:
        mem_mb=growing(2000),
        runtime=minutes(10, per_slide=2),
    params:
        results=OUTPUT,
        options=PLAN.stain_options,
        version=STAGE_VERSIONS["stain"],
    message:
        "Fitting the stain of the slides of rack {wildcards.rack}"
    script:
        "../scripts/fit_stain.py"


rule make_stain_target:
    """The reference: TIAToolbox's image, an image of your own, the median of the cohort, or a bundle's own."""
    input:
        manifests=of_all_racks(
            manifests("stain")
            if PLAN.stain_target == "cohort" and not PLAN.bundle and not PLAN.imports
            else []
        ),
        image=(
            PLAN.stain_target
            if PLAN.stain_target not in ("cohort", "tiatoolbox") and not PLAN.bundle
            else []
        ),
    output:
        target=f"{OUTPUT}/cohort/stain_target.json",
    log:
        log_file("make_stain_target"),
    benchmark:
        benchmark_file("make_stain_target")
    localrule: True
    conda:
        "../envs/slidemake.yaml"
    resources:
        mem_mb=growing(1000),
        runtime=minutes(30),
    params:
        results=OUTPUT,
        target=PLAN.stain_target,
        options=PLAN.stain_options,
        record=PLAN.stain_target_record,
        version=STAGE_VERSIONS["stain"],
    message:
        "Making the stain reference ({params.target})"
    script:
        "../scripts/make_stain_target.py"
