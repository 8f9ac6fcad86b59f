"""Hugging Face model directories in and out: name tables, strict reading, staged writing."""
