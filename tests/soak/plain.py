"""What only costs time where results are compared with each other: read by the warm process before all else.

Of the report nothing is compared, so its figures are not drawn; permutations of probes, which all runs do alike, are
few; which packages are installed is looked up once.
"""

from __future__ import annotations

from functools import cache

import slidemake.core.files as files
import slidemake.report.figures as figures

files.versions = cache(files.versions)
files.versions()
figures.as_svg = lambda figure: ""

import slidemake.robustness.shortcuts as shortcuts  # noqa: E402 (it takes over what is set above)

for probe in (shortcuts.label_null, shortcuts.optimism):
    probe.__defaults__ = (2,)
