"""Every other model of `transformers`, behind the interface of our own decoder."""
