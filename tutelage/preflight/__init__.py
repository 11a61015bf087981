"""What is known before anything runs: one check and one estimate for each stage. Imports without torch."""
