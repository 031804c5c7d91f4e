"""A run as a whole, in Snakemake's own process and around it.

In reading order: plan (configuration and sheet to what rules need), place (where it embeds, in which precision),
imported (features of others), slide_fates (what becomes of a rack's slides), snakemake_plan (which jobs run, by
digests), summary, running (one run at a time, stopped in order), progress, verify and verify_plan (is everything as
written?).
"""
