"""What the benchmarks share: cells that are never run twice, the order of runs, training, tables, the command line."""
