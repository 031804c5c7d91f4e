"""What lies on the disk as Zarr, with its checksums: tiles of a slide, arrays of embeddings.

In reading order: integrity, arrays, jpeg_codec, tile_store, state_dicts (files of weights).
"""
