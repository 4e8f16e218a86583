"""Both sides of `lockstep bench rl`."""
