"""A record in, a warm model with its preprocessing out.

In reading order: registry (records of encoders.yaml), access (is a gated encoder allowed here?), architectures,
weights, loading, runtime (what makes it fast), preprocess, contamination (was it trained on this cohort?).
"""
