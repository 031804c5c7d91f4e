"""New slides beside those that a model was trained on: are they of the same kind?

In reading order: reference (what a bundle keeps of its training patients), judgement, stage.
"""
