"""The one training loop. It knows no objective, rollout or engine by name."""
