"""Labels of patients in, folds out: who is trained on, who is validated on, who is tested.

In reading order: make, methods, site_preserved, patients, files (splits that others made), leakage, shuffled (folds of
the control with shuffled labels), table.
"""
