"""The only code that edits a module tree: adapted layers go in here, and come out."""
