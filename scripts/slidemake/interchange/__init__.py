"""Features of other tools in, ours out: whoever has features needs no slides here, and can take ours elsewhere.

In reading order: sources (which file is a slide's), encoder (what is known of who made them), features (what a file of
features says), hdf5_features, array_features and spatial_features (the formats), reading (which of them a file is),
placing (coordinates in level-0 px, what does not fit), stage (one slide's features become an embedding store). And out:
stored (a slide's features and places), export_features and export_tables (the formats), export (the target).
"""
