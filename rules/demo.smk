"""The built-in demo cohort, drawn by slidemake itself; only when the configuration has a `demo` section."""

if CONFIG["demo"]:

    rule draw_demo_slides:
        """Draws the slides of the demo's sheet (H&E of 30 patients from 3 sites) and their truth masks."""
        input:
            sheet=CONFIG["sheet"],
        output:
            manifest=f"{OUTPUT}/manifests/demo.json",
        log:
            f"{OUTPUT}/logs/draw_demo_slides.log",
        benchmark:
            f"{OUTPUT}/benchmarks/draw_demo_slides.tsv"
        conda:
            "../envs/slidemake.yaml"
        threads: 2
        resources:
            mem_mb=growing(1600),
            runtime=minutes(60),
        params:
            side=CONFIG["demo"]["side"],
            seed=CONFIG["demo"]["seed"],
            made=[row.path for row in PLAN.rows],
            version=STAGE_VERSIONS["demo"],
        message:
            "Drawing the slides of the demo cohort"
        script:
            "../scripts/draw_demo_slides.py"
