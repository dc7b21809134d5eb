"""What models are asked to restore: text, pictures and pages, spoilt as the papers do.

Pure functions of arrays and a generator; nothing here knows of records or batches. Of a text, `words` says for every
token which word it is of; special tokens have -1 and are never touched.
"""
