"""Scripts behind the figures in docs/; run one as `python -m experiments.NAME`."""
