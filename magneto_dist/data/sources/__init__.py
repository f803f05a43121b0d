"""Where data sets come from: a source lists rows and loads one; the writer does the rest."""
