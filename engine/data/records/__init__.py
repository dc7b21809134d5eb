"""Records: what the parts of one are, checked, and what becomes of broken ones."""
