"""The command line. `main` imports only what the command needs."""
