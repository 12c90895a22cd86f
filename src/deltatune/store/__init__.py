"""Many adapters for one model: on it, in the host's memory, in their folders."""
