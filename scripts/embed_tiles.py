"""Rule embed_tiles: tile stores of a rack -> one embedding store for each and encoder, a manifest per encoder."""

from functools import partial
from pathlib import Path

from slidemake.core.files import read_json
from slidemake.embedding.stage import (
    Lane,
    device_on_demand,
    known_encoder,
    loaded_encoder,
    make_slide_job,
    process_rack,
)
from slidemake.jobs.job import job
from slidemake.jobs.racks import read_manifest, run_rack

with job(snakemake) as sm:  # noqa: F821
    options, results, target = dict(sm.params.options), Path(sm.params.results), read_json(sm.input.target)
    lanes = []
    with device_on_demand(options, sm.params.place, sm.threads) as device:
        for found, stain, manifest in zip(sm.params.encoders, sm.params.stains, sm.output.manifests, strict=True):
            record, precision, known = known_encoder(found, sm.params.place)
            load = partial(loaded_encoder, record, device, precision, options["compile"])
            make = partial(make_slide_job, results, record, known, stain, target, options["features"])
            run = partial(run_rack, "embed", manifest, rack=sm.wildcards.rack, background=True)
            lanes.append(Lane(load, make, run))
        process_rack(
            read_manifest(sm.input.manifest, "tiles"),
            lanes,
            device=device,
            dtype=options["features"],
            batch_size=options["batch_size"],
            threads=sm.threads,
        )
