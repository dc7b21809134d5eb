"""Records by number: from tar shards, documents, folders, databases and the built-in sets."""
