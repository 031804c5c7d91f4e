"""Pixels of an overview in, a mask of tissue out, as a picture and as GeoJSON.

In reading order: stage, detection (methods by name), density (the default), pixels, glass, structure, artefacts (pen,
folds, bubbles), focus, geometry (outlines and shares of tiles), models (learned ones), preview.
"""
