"""Rule embed_tiles: tile stores of a rack -> one embedding store for each and encoder, a manifest per encoder."""

from functools import partial
from pathlib import Path

from slidemake.core.files import read_json
from slidemake.embedding.stage import Lane, make_slide_job, process_rack
from slidemake.encoders.access import resolve_weights
from slidemake.encoders.registry import EncoderRecord, identity, weights_sha256
from slidemake.encoders.runtime import effective_precision
from slidemake.jobs.devices import claimed_device
from slidemake.jobs.job import job
from slidemake.jobs.memory import keep_freed_memory
from slidemake.jobs.racks import read_manifest, run_rack

with job(snakemake) as sm:  # noqa: F821
    keep_freed_memory()  # before torch allocates: large activations would be unmapped at every layer
    import torch
    from slidemake.encoders.loading import load_encoder

    torch.set_num_threads(sm.threads)
    options, results, target = dict(sm.params.options), Path(sm.params.results), read_json(sm.input.target)
    lanes = []
    with claimed_device(options["device"]) as device:
        for found, stain, manifest in zip(sm.params.encoders, sm.params.stains, sm.output.manifests, strict=True):
            record = EncoderRecord.from_dict(dict(found))
            precision = effective_precision(options["precision"], record.precision, torch.device(device))
            known = identity(record, weights_sha256(resolve_weights(record)), precision)
            load = partial(load_encoder, record, device, precision, compile_model=options["compile"])
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
