"""What is predicted: a label in the sheet becomes a type of task, and predictions become its tables.

In reading order: labels (what a task names in the sheet), base (what a type of task is), class_predictions, then a file
for each type: classes, ordinal, multilabel, regression, survival; registry (which types there are), controls,
prediction_table.
"""
