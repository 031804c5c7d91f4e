"""Are probabilities what they say, and what can be said with a promised error?

In reading order: about (all of it for a model), calibration, survival_calibration, conformal, conformal_intervals.
"""
