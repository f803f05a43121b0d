"""Where data sets come from: each source lists rows, loads one row, and hands both to the writer."""
