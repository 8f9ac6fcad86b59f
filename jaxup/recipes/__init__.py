"""How plans are spelled (one line, mergekit, a plan file), where their models are found, and what they come to."""
