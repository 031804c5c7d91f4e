"""Everything that a run left in, one page out.

In reading order: page, task and outcome_task (a task's section), figures, outcome_figures, calibration, comparison,
stress, drift, timeline, pictures; templates/.
"""
