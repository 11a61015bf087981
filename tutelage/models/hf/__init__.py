"""Every other model of `transformers`, with the interface of our own decoder."""
