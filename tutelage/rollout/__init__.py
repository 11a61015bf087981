"""Rollouts: answers that a model generates during training, and the advantages of their tokens."""
