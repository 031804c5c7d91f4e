"""Features of a patient in, a prediction out: bags, models, their training on one fold, and the bundle they travel in.

In reading order: bags, places (of tiles on their slide), scaling, batches, losses, optimisers, members (a fitted
model), fitting (one model), automatic (a mixture of models), bundle, bundle_checks (no torch: planning uses it),
prediction. Models: `aggregators`; robust training: `invariance`.
"""
