"""Sets made of what every machine has: glyphs, scenes, English text, rendered pages."""
