"""Models on disk in the layout of Hugging Face transformers: read strictly, written atomically."""
