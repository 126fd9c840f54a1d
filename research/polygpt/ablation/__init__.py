"""The ablation lab: variants of an experiment, run over seeds and compared."""
