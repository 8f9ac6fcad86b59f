"""How plans are spelled (one line, mergekit, a plan file), and where their models are found."""
