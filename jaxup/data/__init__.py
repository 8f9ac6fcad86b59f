"""Text in, packed token rows in a TensorStore array, batches as a pure function of (seed, step)."""
