"""A model and a slide in, what the model looked at out: scores of tiles, heatmaps, galleries, outlines.

In reading order: stage, imported (places without tiles), explanation, pictures.
"""
