"""Tokens that are not words: what forms a step and is fed (layouts), and which distribution is predicted (heads)."""
