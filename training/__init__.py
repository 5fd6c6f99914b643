"""One training run: begin or resume it, record it, finish it."""
