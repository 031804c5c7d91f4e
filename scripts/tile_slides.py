"""Rule tile_slides: slides of a rack with their tissue -> one tile store each, manifest."""

from pathlib import Path

from slidemake.core.files import read_json
from slidemake.jobs.job import job
from slidemake.jobs.memory import keep_freed_memory
from slidemake.jobs.racks import read_manifest, run_rack
from slidemake.stain.stage import slide_transform
from slidemake.tiles.grid import parse_grid
from slidemake.tiles.stage import process_slide

with job(snakemake) as sm:  # noqa: F821
    keep_freed_memory()  # every stored tile would be unmapped again
    results, options = Path(sm.params.results), dict(sm.params.options)
    grid = parse_grid(sm.wildcards.grid, options.pop("stride_px", None))
    target = read_json(sm.input.target) if options["pixels"] == "normalised" else None

    def work(record: dict) -> dict:
        stain = slide_transform(results, record["slide_id"], target) if target else None
        return process_slide(
            record, grid, results, options, threads=sm.threads, scheduler=sm.params.scheduler, stain=stain
        )

    run_rack("tiles", sm.output.manifest, read_manifest(sm.input.manifest, "tissue"), work, rack=sm.wildcards.rack)
