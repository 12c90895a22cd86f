"""One file per method: what you set (its config) and what it computes (its adapter)."""
