"""What a run would cost, from closed forms: memory, traffic, time. No process, no data, no tensor."""
