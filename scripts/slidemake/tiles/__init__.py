"""A mask and a grid in, a store of tiles out.

In reading order: grid (which tiles), stage, reading (pixels of many tiles), quality.
"""
