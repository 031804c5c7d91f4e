"""Features of a patient in, a prediction out: bags, models, their training on one fold, and the bundle they travel in.

In reading order: bags, scaling, batches, losses, fitting (one model), automatic (a mixture of models), bundle,
bundle_checks and bundle_place (no torch: planning uses them), prediction. Models: `aggregators`; robust training:
`invariance`.
"""
