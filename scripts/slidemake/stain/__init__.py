"""Pixels of tissue in, a judged stain transform out, and its use on the CPU and on a device.

In reading order: stage, fit (stains of a slide, and the transform to a target), vectors, colour, judgement (is a fit
fit for use?), targets, on_device.
"""
