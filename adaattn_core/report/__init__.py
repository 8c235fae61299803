"""What a run says about every head: sums, tables, a figure, an HTML page."""
