"""A sheet in, checked rows of slides and labels out; and the table of slides that a run ends with.

In reading order: sheet (checks between rows), sheet_table (reads CSV), sheet_checks (single cells), spellings,
label_checks, table (slides.csv, failures.csv).
"""
