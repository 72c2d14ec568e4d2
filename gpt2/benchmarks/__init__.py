"""Speed benchmarks against other programs. Imports the product and is never imported by it."""
