"""The training step and the loop around it: loss, optimizer, what trains, checkpoints, metrics, the run directory."""
