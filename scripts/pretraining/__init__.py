"""What the embedded base model learns from: a tokenizer, invented names, copying puzzles, records, and public text."""
