"""Memory reports, diagnostics, comparisons of optimizers, and their figures."""
