"""Embedding: all tiles of a rack through one warm encoder, on a GPU or on the CPU."""

DEVICE = CONFIG["embedding"]["device"]
HAS_GPU = DEVICE != "cpu" and (
    shutil.which("nvidia-smi") is not None or os.path.exists("/dev/nvidia0")
)


rule embed_tiles:
    """One feature vector per tile; stain, resize and scaling happen on the device, in the same pass."""
    input:
        manifest=lambda wildcards: manifest(
            "tiles", wildcards.rack, grid=PLAN.grid_of(wildcards.encoder)
        ),
        stain=rules.fit_stain.output.manifest,
        target=rules.make_stain_target.output.target,
    output:
        manifest=manifest("embed", "{rack}", encoder="{encoder}"),
    log:
        log_file("embed_tiles/{encoder}/{rack}"),
    benchmark:
        benchmark_file("embed_tiles/{encoder}/{rack}")
    threads: max(1, (workflow.cores or 4) // 2) if HAS_GPU else (workflow.cores or 4)
    resources:
        gpu=0 if DEVICE == "cpu" else 1,
        mem_mb=4000,
    params:
        results=OUTPUT,
        encoder=lambda wildcards: PLAN.encoder_record(wildcards.encoder),
        stain=lambda wildcards: PLAN.stain_method_of(wildcards.encoder),
        options=stage_options(CONFIG, "embed"),
        version=STAGE_VERSIONS["embed"],
    message:
        "Embedding the tiles of rack {wildcards.rack} with {wildcards.encoder}"
    script:
        "../scripts/embed_tiles.py"
