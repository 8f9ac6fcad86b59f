"""What the network computes: one decoder for every family, its configuration and its sampling."""
