"""Everything that a run left in, one page out.

In reading order: page, task (a task's section), figures, calibration, clinical, comparison,
stress, drift, timeline, imported (features of others), pictures; templates/.
"""
