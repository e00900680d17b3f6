"""Preference data -> reward model: read, check, train, evaluate. Importing this imports nothing heavy."""
