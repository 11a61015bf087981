"""Typed configuration: small frozen sections, unknown keys refused, no torch."""
