"""The demo: an embedded base model, a task of its own making, and a run that compares three ways to train on it."""
