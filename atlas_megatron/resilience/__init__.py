"""What a run does about NaN, hung steps, slow processes, signals, and a second job in its directory."""
