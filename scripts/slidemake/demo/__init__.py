"""The drawn cohort of the demo: tissue that looks like tissue, with a truth that is known.

In reading order: cohort, layout (which tissue is where), histology, sprites, glands, bank, scanner.
"""
