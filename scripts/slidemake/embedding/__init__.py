"""Stored tiles or slides in, features out.

In reading order: stage, engine (batches of many slides, read and written), forward (one batch on its device), sizes,
background (features of glass, a control).
"""
