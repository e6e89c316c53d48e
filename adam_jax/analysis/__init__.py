"""What an optimizer costs and does: memory reports, diagnostics, comparisons, and their plots."""
