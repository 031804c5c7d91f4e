"""Stored tiles or slides in, features out.

In reading order: stage, engine (batches of many slides through one model), background (features of glass, a control).
"""
