"""Wiring shared by the stages: from configuration and artifacts to models and batches. Config objects stop here."""
