"""How fast this is, against whom, and on what evidence."""
