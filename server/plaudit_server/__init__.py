"""Serves the scores of a reward model over HTTP. The front process imports no torch; a worker process does."""
