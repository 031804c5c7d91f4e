"""Does the label follow the site, and do the models profit from it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slidemake.statistics.association import association_test
from slidemake.tasks.base import Predictions
from slidemake.tasks.controls import REFERENCE


def confounding(tables: Sequence[Predictions], entries: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Patients of each site, the association of label and site, and what models reach inside of sites.

    entries: {model: its entry of metrics.json}. Patients without a site count as those of "" and are not associated.
    """
    first = tables[0]
    outcome, sites = first.outcome, np.array(first.sites)
    return {
        "sites": {site: outcome.site_counts(first.truth[sites == site]) for site in sorted(set(first.sites))},
        "association": _association(first, seed),
        "within_site": {
            table.name: outcome.within_sites(table, entries[table.name]["scopes"])
            for table in tables
            if not entries[table.name]["control"] or table.name == REFERENCE
        },
    }


def _association(table: Predictions, seed: int) -> dict[str, Any] | None:
    """Cramér's V of label and site with its permutation p. Of several labels the one with the smallest p, which is
    multiplied by their number (Bonferroni); numbers count by quarters, times by thirds of events and of censored."""
    sites = np.array(table.sites)
    labels = table.outcome.labels_by_site(table.truth)
    found: list[dict[str, Any]] = []
    for name, label in labels.items():
        told = (sites != "") & (label >= 0)
        tested = association_test(label[told], sites[told].tolist(), seed) if told.any() else None
        if tested is not None:
            about = {"label": name} if name else {}
            found.append({**tested, "p": min(1.0, tested["p"] * len(labels)), **about})
    return min(found, key=lambda tested: tested["p"], default=None)
