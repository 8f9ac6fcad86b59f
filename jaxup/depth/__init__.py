"""Plans: depth as an index. Knows no files and no models, only trees of arrays."""
