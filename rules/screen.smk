"""Screening: can the slide be read, how large is a pixel, what is it by content."""


def slides_of_rack(wildcards):
    """Slide files that are there. One that is missing becomes a failure record, not an error of the whole plan."""
    if CONFIG["demo"]:
        return []
    return user_inputs(row.path for row in RACKS[wildcards.rack] if row.path)


rule screen_slides:
    """Opens every slide of a rack, checks samples of its pixels and writes slide.json with the reader to use."""
    input:
        slides=slides_of_rack,
        fetched=fetched_slides,
        demo=rules.draw_demo_slides.output.manifest if CONFIG["demo"] else [],
    output:
        manifest=manifest("screen", "{rack}"),
    log:
        log_file("screen_slides/{rack}"),
    benchmark:
        benchmark_file("screen_slides/{rack}")
    conda:
        "../envs/slidemake.yaml"
    threads: RACK_THREADS
    resources:
        mem_mb=growing(1500),
        runtime=minutes(10, per_slide=1),
    params:
        **({"features": True} if PLAN.imports else {}),  # a slide that is not there is then no failure
        results=OUTPUT,
        rows=lambda wildcards: PLAN.screening_rows(wildcards.rack),
        options=stage_options(CONFIG, "screen"),
        version=STAGE_VERSIONS["screen"],
        files=lambda wildcards: braced(row.path for row in RACKS[wildcards.rack]),
    message:
        "Screening the slides of rack {wildcards.rack}"
    script:
        "../scripts/screen_slides.py"
