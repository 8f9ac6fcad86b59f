"""Continuous tokens: images, clips and stored features that a decoder is fed and predicts beside the words."""
