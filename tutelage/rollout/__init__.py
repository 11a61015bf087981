"""Rollouts: answers that a model gives while it learns, and what each of their tokens is worth."""
