"""What the chapters measure with: a module each, of functions from models and samples to figures."""
