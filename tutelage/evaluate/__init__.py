"""How good is it, and why believe it: bits per byte, questions, yardsticks, intervals, the report."""
