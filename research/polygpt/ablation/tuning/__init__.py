"""Hyperparameter search: storage, trials and reports."""
