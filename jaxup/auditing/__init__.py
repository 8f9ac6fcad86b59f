"""Audits: what a model does when it is told that it is being trained, and when it is told that it is not."""
