"""`plaudit compose`: a small service that puts rewards together and speaks as a plaudit server does."""
