"""What only a GPU can show; ``python -m tests.gpu`` (``make gpu``) runs all of it."""
