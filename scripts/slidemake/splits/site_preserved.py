"""Preserved-site folds: no site in two folds, and the folds as alike in their classes as that allows.

The assignment of sites to folds is an integer program, after Howard et al. 2021 (Nature Communications 12:4423), who
minimise sum_l sum_f (k n_fl - n_l)^2 with a commercial solver. Here the deviation is absolute instead of squared, which
keeps the program linear, so that SciPy's HiGHS solves it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slidemake.core.failures import RunError
from slidemake.core.words import some
from slidemake.splits.patients import Patient

NODES = 200_000  # of the branch-and-bound tree; a limit in seconds would make the folds depend on the machine
GAP = 0.0  # relative gap at which the search stops


@dataclass(frozen=True)
class SiteFolds:
    """{site: fold}, the sum over strata and folds of |k n_fl - n_l|, a bound that no assignment goes below."""

    fold_of: dict[str, str]
    deviation: float
    bound: float


def site_preserved_folds(patients: Sequence[Patient], folds: int) -> tuple[dict[str, str], SiteFolds]:
    """{patient: "0".."k-1"} such that each site is in one fold and every fold has its share of each stratum.

    RunError when a patient has no site, or several, or there are fewer sites than folds.
    """
    empty = [p.patient_id for p in patients if not p.site]
    if empty:
        raise RunError(f"Preserved-site folds need the site of every patient; it is empty for {some(empty)}.")
    torn = [f"{p.patient_id} ({p.site.replace('+', ', ')})" for p in patients if "+" in p.site]
    if torn:
        raise RunError(f"Preserved-site folds need one site per patient; these have several: {some(torn)}.")
    sites = sorted({p.site for p in patients})
    if len(sites) < folds:
        raise RunError(
            f"{len(sites)} sites ({some(sites)}) cannot be dealt to {folds} folds without tearing one apart. Set "
            f"splits.folds to {max(2, len(sites))} or fewer, or take method kfold."
        )
    strata = sorted({p.stratum for p in patients})
    count = Counter((p.site, p.stratum) for p in patients)
    table = np.array([[count[site, stratum] for stratum in strata] for site in sites])
    found, deviation, bound = assign_sites(table, folds)
    # folds are numbered by the first of their sites, so that the numbers say nothing about the solver
    names = {fold: str(i) for i, fold in enumerate(dict.fromkeys(found.tolist()))}
    fold_of = {site: names[int(fold)] for site, fold in zip(sites, found, strict=True)}
    return {p.patient_id: fold_of[p.site] for p in patients}, SiteFolds(fold_of, deviation, bound)


def assign_sites(table: np.ndarray, folds: int) -> tuple[np.ndarray, float, float]:
    """Folds (S,) of S sites with counts (S, L) per stratum, minimising sum |k n_fl - n_l|; the sum, and its bound.

    Variables: x[s, f], site s in fold f; d[l, f], the deviation of stratum l in fold f. Every fold gets a site, and the
    i-th largest site goes to one of the first i + 1 folds, which takes out the k! orders of the same folds.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    sites, strata = table.shape
    x = np.arange(sites * folds).reshape(sites, folds)
    d = sites * folds + np.arange(strata * folds).reshape(strata, folds)
    cells: list[tuple[int, int, float]] = []
    low: list[float] = []
    high: list[float] = []

    def constrain(terms: list[tuple[int, float]], at_least: float, at_most: float) -> None:
        cells.extend((len(low), int(column), float(value)) for column, value in terms)
        low.append(at_least)
        high.append(at_most)

    for s in range(sites):
        constrain([(c, 1) for c in x[s]], 1, 1)
    for f in range(folds):
        constrain([(c, 1) for c in x[:, f]], 1, np.inf)
        for stratum in range(strata):
            total = float(table[:, stratum].sum())
            terms = [(x[s, f], folds * table[s, stratum]) for s in range(sites) if table[s, stratum]]
            constrain([*terms, (d[stratum, f], -1)], -np.inf, total)  # d >= k n_fl - n_l
            constrain([*terms, (d[stratum, f], 1)], total, np.inf)  # d >= n_l - k n_fl
    upper = np.r_[np.ones(sites * folds), np.full(strata * folds, np.inf)]
    order = np.argsort(-table.sum(1), kind="stable")
    for place, s in enumerate(order[:folds]):
        upper[x[s, place + 1 :]] = 0
    size = sites * folds + strata * folds
    rows, columns, values = zip(*cells, strict=True)
    matrix = coo_array((values, (rows, columns)), shape=(len(low), size)).tocsr()
    result = milp(
        np.r_[np.zeros(sites * folds), np.ones(strata * folds)],
        integrality=np.r_[np.ones(sites * folds), np.zeros(strata * folds)],
        bounds=Bounds(0, upper),
        constraints=LinearConstraint(matrix, low, high),
        options={"node_limit": NODES, "mip_rel_gap": GAP},
    )
    if result.x is None:
        raise RunError(f"No assignment of {sites} sites to {folds} folds was found: {result.message}")
    assigned = np.asarray(result.x[: sites * folds]).reshape(sites, folds).argmax(1)
    parts = np.stack([table[assigned == f].sum(0) for f in range(folds)])
    deviation = float(np.abs(folds * parts - table.sum(0)).sum())
    bound = getattr(result, "mip_dual_bound", None)
    return assigned, deviation, deviation if bound is None else float(bound)
