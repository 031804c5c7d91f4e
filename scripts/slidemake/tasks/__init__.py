"""What is predicted: a label in the sheet becomes a type of task, and predictions become its tables.

In reading order: labels (what a task names in the sheet), outcomes (types of task: encoding, loss, prediction),
survival_outcome, registry (which types there are), controls, kinds (types of task: metrics, null model, groups),
prediction_table, outcome_table.
"""
