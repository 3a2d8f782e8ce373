"""Pictures of the chapters: a module each, of functions that draw data on matplotlib's axes."""
