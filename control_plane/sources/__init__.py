"""Where endpoints and policies come from."""
