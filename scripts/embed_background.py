"""Rule embed_background: slides of a rack with their tissue -> mean feature of each slide's background, manifest."""

from functools import cache, partial
from pathlib import Path

from slidemake.embedding.background import embed_background
from slidemake.embedding.stage import device_on_demand, known_encoder, warm_encoder
from slidemake.jobs.job import job
from slidemake.jobs.racks import read_manifest, run_rack
from slidemake.tiles.grid import parse_grid

with job(snakemake) as sm:  # noqa: F821
    record, precision, known = known_encoder(sm.params.encoder, sm.params.place)
    with device_on_demand(sm.params.embedding, sm.params.place, sm.threads) as device:
        forward = cache(partial(warm_encoder, record, device, precision))  # loaded when a slide is not finished
        run_rack(
            "background",
            sm.output.manifest,
            read_manifest(sm.input.manifest, "tissue"),
            lambda slide: embed_background(
                slide,
                parse_grid(record.grid),
                Path(sm.params.results),
                sm.wildcards.encoder,
                known,
                dict(sm.params.options),
                sm.params.tolerance,
                forward,
            ),
            rack=sm.wildcards.rack,
        )
