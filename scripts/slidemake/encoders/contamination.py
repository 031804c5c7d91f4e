"""Was the encoder pretrained on the slides that it is now evaluated on?

An encoder's record names the public collections of its pretraining (`corpora`). Which collection a cohort is from is
told by `evaluation.public_cohort`, by a column `cohort` of the sheet, or by the form of its ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from slidemake.encoders.registry import EncoderRecord, contaminated

# Ids as the collections give them; matched at the start of a slide's, a patient's or a file's name.
IDS = {
    "TCGA": re.compile(r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(?![A-Z0-9])"),
    "CPTAC": re.compile(r"C3[LN]-\d{5}(?!\d)"),
    "GTEx": re.compile(r"GTEX-[A-Z0-9]{4,6}(?![A-Z0-9])"),
    "CAMELYON17": re.compile(r"patient_\d{3}_node_\d(?!\d)"),
    "CAMELYON16": re.compile(r"(?:normal|tumor)_\d{3}(?!\d)"),
}
SHARE = 0.5  # of the slides that must have such ids


def public_cohorts(slides: Iterable[Mapping[str, Any]], told: str | None = None) -> list[str]:
    """Names of the public collections that the slides are from, as far as one can tell; sorted.

    slides: rows with slide_id and, if known, patient_id, path and cohort. A collection is recognised by ids when at
    least half of the slides carry its kind; `told` is the configuration's word for it.
    """
    rows = list(slides)
    found = {told} if told else set()
    found |= {str(row["cohort"]).strip() for row in rows if str(row.get("cohort") or "").strip()}
    for name, pattern in IDS.items():
        hits = sum(any(pattern.match(text) for text in _names(row)) for row in rows)
        if rows and hits >= SHARE * len(rows):
            found.add(name)
    return sorted(found)


def _names(row: Mapping[str, Any]) -> list[str]:
    return [str(row.get("slide_id") or ""), str(row.get("patient_id") or ""), str(row.get("path") or "").split("/")[-1]]


def contamination(records: Mapping[str, EncoderRecord], cohorts: Iterable[str]) -> dict[str, list[str]]:
    """{encoder: corpora of its pretraining that the cohort is from}, those that have any."""
    text = " ".join(cohorts)
    found = {name: contaminated(record, text) for name, record in records.items()}
    return {name: corpora for name, corpora in sorted(found.items()) if corpora}
