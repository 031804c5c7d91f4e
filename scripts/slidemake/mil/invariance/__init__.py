"""Training that resists scanner and site, with frozen encoders: penalties, groups, harmonisation, augmentation.

A *domain* is a scanner or a site (a column of the sheet). A *scan* is what a patient's slides from one domain are
together; a patient with scans in two domains is re-scanned. With any of these options a training step sees scans
instead of patients, and every patient keeps the weight of one. `robust` has the one class that `fitting` calls;
`groups` makes scans, `penalties`, `adversary`, `combat` and `augmentation` are methods, `guard` chooses how strong.
"""

from slidemake.mil.invariance.robust import (
    OPTIONS,
    Robust,
    active,
    domain_names,
    domain_numbers,
    make_robust,
    options_of,
    warn_where_label_and_domain_coincide,
)

__all__ = [
    "OPTIONS",
    "Robust",
    "active",
    "domain_names",
    "domain_numbers",
    "make_robust",
    "options_of",
    "warn_where_label_and_domain_coincide",
]
