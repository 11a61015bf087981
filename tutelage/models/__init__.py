"""Models: decoder, attention, heads, adapters."""
