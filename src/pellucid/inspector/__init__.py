"""Looking into a run: the report, and the inspector that shows every token of what was recorded."""
