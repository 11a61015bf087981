"""Before a run starts: shape, FLOPs, memory, time, energy, cost, and what this machine can do. No torch at import."""
