"""Evaluation: bits per byte, questions, baselines, intervals, comparisons, the report."""
