"""Accuracy, the paper's table and the pictures of a run."""
