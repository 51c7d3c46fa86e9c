"""One module per model family: load, encode, decode, predict, render."""
