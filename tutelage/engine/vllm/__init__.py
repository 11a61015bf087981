"""vLLM behind the protocol of our own engine. Only these files import vLLM."""
