"""Teachers of other kinds than a bigger sibling; each file is short enough to copy."""
