"""Tiling: the tissue of each slide as squares of a fixed physical size, in one Zarr store per slide and grid."""


def stain_for_tiles(wildcards):
    """Tiles are stored as scanned; only `pixels: normalised` needs the stain before them."""
    if CONFIG["tiling"]["pixels"] == "scanned":
        return {}
    return {
        "stain": manifest("stain", wildcards.rack),
        "target": rules.make_stain_target.output.target,
    }


rule tile_slides:
    """Reads every tissue tile of a rack's slides once, at the exact mpp, and commits one store per slide."""
    input:
        unpack(stain_for_tiles),
        fetched=fetched_slides,
        manifest=rules.detect_tissue.output.manifest,
    output:
        manifest=manifest("tiles", "{rack}", grid="{grid}"),
    log:
        log_file("tile_slides/{grid}/{rack}"),
    benchmark:
        benchmark_file("tile_slides/{grid}/{rack}")
    conda:
        "../envs/slidemake.yaml"
    threads: RACK_THREADS
    resources:
        mem_mb=growing(2000),
        runtime=minutes(10, per_slide=6),
    params:
        results=OUTPUT,
        options=stage_options(CONFIG, "tiles"),
        scheduler=CONFIG["dask"]["scheduler"],
        version=STAGE_VERSIONS["tiles"],
    message:
        "Tiling the slides of rack {wildcards.rack} ({wildcards.grid})"
    script:
        "../scripts/tile_slides.py"
