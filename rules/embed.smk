"""Embedding: all tiles of a rack through warm encoders, on a GPU or on the CPU."""

DEVICE = CONFIG["embedding"]["device"]
# A cluster gives the GPU that gpu=1 asks for.
ON_GPU = DEVICE == "cuda" or bool(PLAN.place["gpu"])
EMBED_THREADS = RACK_THREADS if IN_JOB else MACHINE.embedding_threads(ON_GPU)

# One rule per grid: encoders that take the same tiles share a job, so that each tile is read once for all of them.
for GRID in GRIDS:

    rule:
        name:
            f"embed_tiles_{GRID}" if len(GRIDS) > 1 else "embed_tiles"
        input:
            manifest=manifest("tiles", "{rack}", grid=GRID),
            stain=rules.fit_stain.output.manifest,
            target=rules.make_stain_target.output.target,
            fetched=fetched_slides if CONFIG["tiling"]["store"] == "coords" else [],
        output:
            manifests=[
                manifest("embed", "{rack}", encoder=encoder)
                for encoder in PLAN.encoders_of(GRID)
            ],
        log:
            log_file(f"embed_tiles/{GRID}/{{rack}}"),
        benchmark:
            benchmark_file(f"embed_tiles/{GRID}/{{rack}}")
        conda:
            "../envs/slidemake.yaml"
        threads: EMBED_THREADS
        resources:
            gpu=0 if DEVICE == "cpu" else 1,
            mem_mb=growing(
                embedding_mb(
                    len(PLAN.encoders_of(GRID)),
                    "cuda" if ON_GPU else "cpu",
                    EMBED_THREADS,
                    CONFIG["embedding"]["batch_size"],
                    PLAN.tile_px(GRID),
                )
            ),
            runtime=minutes(20, per_slide=6),
        params:
            results=OUTPUT,
            encoders=[PLAN.encoder_record(e) for e in PLAN.encoders_of(GRID)],
            stains=[PLAN.stain_method_of(e) for e in PLAN.encoders_of(GRID)],
            options=stage_options(CONFIG, "embed"),
            place=PLAN.place,
            files=PLAN.weights_files(PLAN.encoders_of(GRID)),
            version=STAGE_VERSIONS["embed"],
        message:
            f"Embedding the tiles of rack {{wildcards.rack}} with {', '.join(PLAN.encoders_of(GRID))}"
        script:
            "../scripts/embed_tiles.py"


rule embed_background:
    """A sample of tiles without tissue through the same encoder: what a model could learn of slides that is no disease."""
    input:
        fetched=fetched_slides,
        manifest=rules.detect_tissue.output.manifest,
    output:
        manifest=manifest("background", "{rack}", encoder="{encoder}"),
    log:
        log_file("embed_background/{encoder}/{rack}"),
    benchmark:
        benchmark_file("embed_background/{encoder}/{rack}")
    conda:
        "../envs/slidemake.yaml"
    threads: RACK_THREADS
    resources:
        gpu=0 if DEVICE == "cpu" else 1,
        mem_mb=growing(3000),
        runtime=minutes(20, per_slide=1),
    params:
        results=OUTPUT,
        encoder=lambda wildcards: PLAN.encoder_record(wildcards.encoder),
        embedding=stage_options(CONFIG, "embed"),
        place=PLAN.place,
        options=stage_options(CONFIG, "background"),
        tolerance=CONFIG["tiling"]["mpp_tolerance"],
        files=lambda wildcards: PLAN.weights_files([wildcards.encoder]),
        version=STAGE_VERSIONS["background"],
    message:
        "Embedding background of the slides of rack {wildcards.rack} with {wildcards.encoder}"
    script:
        "../scripts/embed_background.py"
