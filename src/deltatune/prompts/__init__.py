"""Methods that hand learned tokens to a model. `prefix` is the one to read first, `attention` the seam it acts at."""
