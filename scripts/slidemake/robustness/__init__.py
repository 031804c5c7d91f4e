"""Can a model be believed: shortcuts that the features hold, and pictures made worse on purpose.

In reading order: shortcuts, linear_probe, shortcut_words, neighbours, background_control, near_duplicates,
stain_comparison, corruptions, stress, stress_stage.
"""
