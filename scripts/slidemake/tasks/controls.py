"""The controls of every task: what stands beside the user's models so that a figure can be believed. No torch here.

A name of a control is no name for a model. What each is: docs/guide.md#controls.
"""

from __future__ import annotations

REFERENCE = "mean_pool_lr"  # the baseline that every model must beat to be worth its parameters
INSTANCE_LINEAR = "instance_linear"  # the control that attention must beat to be worth its own parameters
SITE_ONLY = "site_only"
SHUFFLED = "shuffled_label"
TRAINED = (REFERENCE, INSTANCE_LINEAR, SITE_ONLY, SHUFFLED)  # always trained beside the configured models
PREVALENCE = "prevalence"
CHANCE = (PREVALENCE, "mean", "kaplan_meier")  # what knows nothing, by type of task; computed, not trained
CONTROLS = (*TRAINED, PREVALENCE)
NOT_A_RIVAL = (SHUFFLED, *CHANCE)  # nulls: being compared with them claims nothing
CHOSEN = "best_by_validation"  # no control: the model that its training patients would have chosen
RESERVED = (*TRAINED, *CHANCE, CHOSEN)  # names that models may not take
