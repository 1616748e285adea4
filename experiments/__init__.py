"""What this project measured, each experiment a command: `python -m experiments.NAME`; results in docs/results."""
