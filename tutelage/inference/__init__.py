"""Files in, files out: batch generation, prediction, and the batch files of the OpenAI API."""
