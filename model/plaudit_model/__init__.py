"""What a reward model is, shared by training and serving. Importing this costs nothing."""
