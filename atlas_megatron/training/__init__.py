"""The training loop: schedule, gradients, validation, metrics."""
