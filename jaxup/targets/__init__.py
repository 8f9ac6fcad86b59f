"""What a compiler plans for chips that are not here: topologies, the programs it makes, and what bounds their time."""
