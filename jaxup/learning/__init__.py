"""Search and learning: problems, samples, what they are worth, and what a model learns of that."""
