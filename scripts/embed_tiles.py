"""Rule embed_tiles: tile stores of a rack -> one embedding store each, manifest."""

from functools import partial
from pathlib import Path

from slidemake.adapter import job
from slidemake.devices import claimed_device
from slidemake.embedding import make_slide_job, process_rack
from slidemake.encoder_runtime import effective_precision, keep_freed_memory
from slidemake.encoders import EncoderRecord, identity, resolve_weights, weights_sha256
from slidemake.provenance import read_json
from slidemake.racks import read_manifest, run_rack

with job(snakemake) as sm:  # noqa: F821
    keep_freed_memory()  # before torch allocates: large activations would be unmapped at every layer
    import torch
    from slidemake.encoder_loading import load_encoder

    torch.set_num_threads(sm.threads)
    options, record = dict(sm.params.options), EncoderRecord.from_dict(dict(sm.params.encoder))
    results, target = Path(sm.params.results), read_json(sm.input.target)
    with claimed_device(options["device"]) as device:
        precision = effective_precision(options["precision"], record.precision, torch.device(device))
        known = identity(record, weights_sha256(resolve_weights(record)), precision)
        process_rack(
            read_manifest(sm.input.manifest, "tiles"),
            partial(load_encoder, record, device, precision),
            partial(make_slide_job, results, record, known, sm.params.stain, target, options["features"]),
            partial(run_rack, "embed", sm.output.manifest, rack=sm.wildcards.rack),
            device=device,
            dtype=options["features"],
            batch_size=options["batch_size"],
            threads=sm.threads,
        )
