"""slidemake: a cohort of gigapixel pathology slides to predictions, explanations and a report."""

__version__ = "0.1.0"
