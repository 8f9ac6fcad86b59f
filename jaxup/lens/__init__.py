"""What training did to each layer of a model, what each layer does, and where a model came from."""
