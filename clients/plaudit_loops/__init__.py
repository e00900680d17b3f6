"""Loops that train and sample policies against a reward model, with torch and transformers."""
