"""What the user asked for: a YAML file in, a checked and completed configuration out.

In reading order: load, schema (config.schema.json: keys, defaults, errors in words), checks (between keys), presets,
sweeps, page (docs/configuration.md).
"""
