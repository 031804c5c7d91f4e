"""Rule embed_background: slides of a rack with their tissue -> mean feature of each slide's background, manifest."""

from functools import cache, partial
from pathlib import Path

from slidemake.embedding.background import embed_background
from slidemake.embedding.stage import warm_encoder
from slidemake.encoders.access import resolve_weights
from slidemake.encoders.registry import EncoderRecord, identity, weights_sha256
from slidemake.encoders.runtime import effective_precision
from slidemake.jobs.devices import claimed_device
from slidemake.jobs.job import job
from slidemake.jobs.memory import keep_freed_memory
from slidemake.jobs.racks import read_manifest, run_rack
from slidemake.tiles.grid import parse_grid

with job(snakemake) as sm:  # noqa: F821
    keep_freed_memory()  # before torch allocates
    import torch

    torch.set_num_threads(sm.threads)
    record = EncoderRecord.from_dict(dict(sm.params.encoder))
    with claimed_device(sm.params.embedding["device"]) as device:
        precision = effective_precision(sm.params.embedding["precision"], record.precision, torch.device(device))
        known = identity(record, weights_sha256(resolve_weights(record)), precision)
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
