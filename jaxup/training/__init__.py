"""The training step and the loop around it, and procedures (inherit and grow) on top of the loop."""
