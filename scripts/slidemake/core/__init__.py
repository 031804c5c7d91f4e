"""What every room stands on: errors that say what to do, files that are whole or absent, tables that are sealed.

Knows no slide and no patient, and imports nothing of slidemake. In reading order: failures, stages (one record a
stage), files (atomic files, fingerprints), tables, csv_cells, json_schemas, yaml_files, marker (slidemake.json),
content (what a slide is by content), currency (are results current?), bundle_place (whose is a bundle?), words,
addresses, spacing, onednn.
"""
